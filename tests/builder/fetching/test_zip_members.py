import contextlib
import io
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.fetching import zip_members as maskzip
from builder.fetching.traffic import Meter, Traffic
from builder.fetching.zip_members import MemberError, extract, locate_members, merge_spans, read_members
from builder.tasks.plan import Member
from demo.s3server import S3Server
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location

members_of_two_zips = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(1, 60)), max_size=20
).map(
    lambda rows: [
        Member(name, f"{i}", start, start + size, 0, 0, size, size) for i, (name, start, size) in enumerate(rows)
    ]
)


def contents(count: int = 40) -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    return {f"{n:016x}_m01jfm__{n}.png": rng.bytes(int(rng.integers(0, 3000))) + b"\0" * 500 for n in range(count)}


def write_zip(path: Path, method: int, *, zip64: bool = False, comment: bytes = b"", prefix: bytes = b"") -> Location:
    path.write_bytes(prefix)
    with zipfile.ZipFile(path, "a", method) as archive:
        for name, data in contents().items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(data)
        archive.comment = comment
    return Location(str(path))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("comment", [b"", b"c" * 60000])
def test_members_are_what_zipfile_reads(tmp_path: Path, method: int, zip64: bool, comment: bytes) -> None:
    location = write_zip(tmp_path / "m.zip", method, zip64=zip64, comment=comment)
    wanted = list(contents())[::3]
    found = locate_members({location: [*wanted, "not there.png"]})
    assert sorted(found) == sorted(wanted)
    meter = Meter()
    read = read_members([found[name] for name in wanted], meter=meter)
    assert read == [contents()[name] for name in wanted]
    assert meter.total.nbytes <= location.size()


def test_a_real_zip64_directory_is_read(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(66_000):  # more than 16 bits count: a ZIP64 end record, as in the real train zips
            archive.writestr(f"{n:06x}.png", b"")
        archive.writestr("last.png", b"here")
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 66_001
    found = locate_members({Location(str(path)): ["last.png"]})
    assert read_members([found["last.png"]]) == [b"here"]


def test_members_after_a_prefix_and_from_a_stream_are_read(tmp_path: Path) -> None:
    location = write_zip(tmp_path / "m.zip", zipfile.ZIP_DEFLATED, prefix=b"#!/bin/sh\n" * 9)
    found = locate_members({location: contents()})
    assert read_members(list(found.values())) == [contents()[name] for name in found]

    class Stream(io.BytesIO):  # not seekable: the sizes follow the data, in descriptors
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise OSError("not seekable")

        def tell(self) -> int:
            raise OSError("not seekable")

    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"a" * 1000)
        archive.writestr("b.png", b"b" * 1000)
    (tmp_path / "s.zip").write_bytes(stream.getvalue())
    found = locate_members({Location(str(tmp_path / "s.zip")): ["a.png", "b.png"]})
    assert read_members(list(found.values())) == [b"a" * 1000, b"b" * 1000]


@given(members_of_two_zips, st.integers(0, 100), st.integers(1, 300))
def test_merged_spans_hold_each_member_once_and_keep_their_limits(
    members: list[Member], gap: int, largest: int
) -> None:
    spans = merge_spans(members, gap=gap, largest=largest)
    assert sorted(index for span in spans for index in span.members) == list(range(len(members)))
    for span in spans:
        held = [members[index] for index in span.members]
        assert all(m.zip_url == span.zip_url and span.start <= m.start and m.end <= span.end for m in held)
        assert span.end - span.start <= largest or len(held) == 1
        assert span.start == min(m.start for m in held)
        assert span.end == max(m.end for m in held)
        reach = held[0].end
        for member in held[1:]:
            assert member.start - reach <= gap
            reach = max(reach, member.end)
    order = [(span.zip_url, span.start) for span in spans]
    assert order == sorted(order)


def test_neighbours_are_read_with_few_requests() -> None:
    members = [Member("z", f"{n}", n * 1700, (n + 1) * 1700, 0, 0, 1600, 1600) for n in range(0, 4000, 4)]
    assert len(merge_spans(members)) == 1
    assert len(merge_spans(members, gap=0)) == 1000


def one_member(method: int = zipfile.ZIP_DEFLATED) -> tuple[bytes, Member]:
    buffer = io.BytesIO()
    data = b"mask" * 100
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("m.png", data)
        info = archive.infolist()[0]
        end = archive.start_dir if archive.start_dir else buffer.tell()
    return buffer.getvalue()[:end], Member("z", "m.png", 0, end, method, info.CRC, info.compress_size, len(data))


def test_damaged_members_are_told_apart() -> None:
    data, member = one_member()
    assert extract(data, member) == b"mask" * 100
    faults = {
        "no room": (data[:20], member),
        "no local header": (b"XX" + data[2:], member),
        "encrypted": (data[:6] + struct.pack("<H", 1) + data[8:], member),
        "next member": (data[: 30 + 5 + 3], member),
        "method 12": (data, replace(member, method=12)),
        "CRC": (data, replace(member, crc32=member.crc32 ^ 1)),
        "its length": (data, replace(member, size=member.size - 1)),
        "inflated": (data[:35] + b"\xff" * (len(data) - 35), member),
    }
    for told, (broken, planned) in faults.items():
        with pytest.raises(MemberError, match=told):
            extract(broken, planned)


@given(st.binary(max_size=200), st.integers(0, 80), st.integers(0, 80), st.sampled_from([0, 8, 99]))
def test_no_bytes_make_extract_fail_in_another_way(data: bytes, compressed: int, size: int, method: int) -> None:
    member = Member("z", "m", 0, len(data), method, 0, compressed, size)
    for candidate in (data, b"PK\x03\x04" + data):
        with contextlib.suppress(MemberError):
            assert len(extract(candidate, member)) == size


def test_a_bomb_is_neither_fetched_nor_inflated(tmp_path: Path) -> None:
    location = write_zip(tmp_path / "m.zip", zipfile.ZIP_DEFLATED)
    member = next(iter(locate_members({location: list(contents())[:1]}).values()))
    meter = Meter()
    [answer] = read_members([replace(member, size=maskzip.MEMBER_BYTES + 1)], meter=meter)
    assert isinstance(answer, MemberError)
    assert meter.total == Traffic()
    data, small = one_member()
    with pytest.raises(MemberError, match="its length"):
        extract(data, replace(small, size=10))  # inflates to more than the directory says: stopped there


def test_an_empty_zip_holds_nothing_and_no_zip_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()
    assert locate_members({Location(str(empty)): ["a.png"]}) == {}
    for data in (b"", b"<html>404</html>", empty.read_bytes()[:-1], b"PK" * 50000):
        (tmp_path / "bad.zip").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.zip: not a zip"):
            locate_members({Location(str(tmp_path / "bad.zip")): ["a.png"]})
    with pytest.raises(StorageError, match=r"gone\.zip"):
        locate_members({Location(str(tmp_path / "gone.zip")): ["a.png"]})


def test_a_directory_that_lies_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = Path(write_zip(tmp_path / "m.zip", zipfile.ZIP_STORED).url)
    data = bytearray(path.read_bytes())
    data[-12:-8] = struct.pack("<I", 1 << 30)  # the directory's length
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="not a zip"):
        locate_members({Location(str(path)): ["a.png"]})


def test_members_over_s3_and_http(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    write_zip(tmp_path / "m.zip", zipfile.ZIP_DEFLATED)
    s3.upload(tmp_path, bucket)
    for url in (f"s3://{bucket}/m.zip", f"{s3.endpoint_url}/{bucket}/m.zip"):
        found = locate_members({Location(url): contents()})
        assert read_members(list(found.values())) == [contents()[name] for name in found]
