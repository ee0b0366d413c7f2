import io
import tarfile
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from shards.common.errors import SampleError
from shards.format.selection import with_categories
from shards.format.shard_tar import parse_members
from shards.stream.sample_decoders import parse_sample, read_sample, webdataset_sample
from tests.support import sample, write_dataset


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """An index of one sample, its bytes, and the sample."""
    made = sample(0)
    dataset = write_dataset(tmp_path_factory.mktemp("data"), {"train": [made]})
    index = dataset.index("train")
    with open(f"{dataset.root.path}/{index.shard_paths[0]}", "rb") as file:
        return index, file.read(int(index.nbytes[0])), made


def tar(files, kind=tarfile.REGTYPE):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@given(
    st.dictionaries(st.sampled_from(["jpg", "json", "seg.png", "txt"]), st.binary(max_size=2000), max_size=4),
    st.booleans(),
)
def test_members_are_those_of_webdatasets_iterator(one, values, ended):
    _, _, made = one
    data = tar({f"{made.image_id}.{extension}": value for extension, value in values.items()})
    if not ended:  # as in the middle of a shard
        data = data[: sum(512 + -(-len(value) // 512) * 512 for value in values.values())]
    files = tar_file_iterator(io.BytesIO(data)) if data else ()
    expected = {base_plus_ext(file["fname"])[1]: bytes(file["data"]) for file in files}
    found = parse_members(memoryview(data), made.image_id, where="")
    assert {extension: bytes(value) for extension, value in found.items()} == expected == values
    assert all(value.obj is data for value in found.values())  # none is a copy


def test_both_forms_of_a_sample(one):
    index, data, made = one
    raw = read_sample(memoryview(data), index, 0, "s3://b/d")
    assert raw == {"__key__": made.image_id, "__url__": "s3://b/d/train/000000.tar", **made.to_members()}
    assert all(type(value) in (bytes, str) for value in raw.values())
    assert webdataset_sample(raw) == raw
    assert parse_sample(raw) == made
    # With a choice of classes:
    raw = read_sample(memoryview(data), replace(index, category_ids={1: 7}), 0, "s3://b/d")
    assert parse_sample(raw) == with_categories(made, {1: 7}) != made
    assert set(webdataset_sample(raw)) == {"__key__", "__url__", "jpg", "json"}
    assert parse_sample(webdataset_sample(raw)) == parse_sample(raw)


KEY = f"{0:016x}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar({f"{1:016x}.jpg": b"1"}), f"found {1:016x}.jpg where the index has {KEY}: build"),
        (tar({f"folder/{KEY}.jpg": b"1"}), f"found folder/{KEY}.jpg where the index has {KEY}: build"),
        (tar({f"{KEY}.jpg": b"1"})[:512], f"{KEY}.jpg has 1 bytes, 0 of them are in the range of the index"),
        (tar({f"{KEY}.jpg": b"1"})[:300], f"sample {KEY}: no tar header"),
        (tar({f"{KEY}.jpg": b"1"}, tarfile.DIRTYPE), "no tar header of a plain file"),
        (tar({f"{KEY}.jpg": b"1"}).replace(b"ustar", b"other"), "no tar header of a plain file"),
        (tar({f"{KEY}.jpg": b"1"}).replace(b"0000644", b"0000645"), "no tar header of a plain file"),
        (b"", f"there is no {KEY}.jpg"),
    ],
    ids=["another key", "a folder", "cut after", "cut in", "no file", "no ustar", "checksum", "nothing"],
)
def test_other_bytes_are_refused_in_one_line(one, data, message):
    with pytest.raises(SampleError, match=rf"^[^\n]*s3://b/d/train/000000.tar[^\n]*{message}[^\n]*$"):
        parse_sample(read_sample(memoryview(data), one[0], 0, "s3://b/d"))


@given(st.integers(0, 1023), st.binary(min_size=1, max_size=16))
def test_a_damaged_header_gives_an_error_or_the_same_members(one, place, change):
    """The checksum detects what changes a header; there is no other exception."""
    index, data, made = one
    damaged = bytearray(data)
    damaged[place : place + len(change)] = change
    with suppress(SampleError):
        assert parse_sample(read_sample(memoryview(damaged), index, 0, "s3://b/d")).image_id == made.image_id
