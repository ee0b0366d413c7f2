import contextlib
import io
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.fetching import zip_members
from builder.fetching.table_cache import Cache
from builder.fetching.traffic import Meter, Traffic
from builder.fetching.zip_members import DENSE, MemberError, extract, locate_members, plan_reads, read_members
from builder.tasks.plan import Member
from demo.s3proxy import Fault
from demo.s3server import S3Server
from shards.common.errors import StorageError, UserError
from shards.storage.location import Location
from tests.support import Proxied

RANDOM = np.random.default_rng(3)
CONTENTS = {f"{n:016x}_m01jfm__{n}.png": RANDOM.bytes(int(RANDOM.integers(0, 3000))) + b"\0" * 500 for n in range(40)}


def write_zip(
    path: Path, method: int = zipfile.ZIP_DEFLATED, *, zip64: bool = False, comment: bytes = b"", prefix: bytes = b""
) -> Location:
    path.write_bytes(prefix)
    with zipfile.ZipFile(path, "a", method) as archive:
        for name, data in CONTENTS.items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(data)
        archive.comment = comment
    return Location(str(path))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(("zip64", "comment"), [(False, b"c" * 60000), (True, b"")])
def test_members_are_what_zipfile_reads(tmp_path: Path, method: int, zip64: bool, comment: bytes) -> None:
    location = write_zip(tmp_path / "m.zip", method, zip64=zip64, comment=comment)
    wanted = list(CONTENTS)[::3]
    found = locate_members({location: [*wanted, "not there.png"]})
    assert sorted(found) == sorted(wanted)
    meter = Meter()
    assert read_members([found[name] for name in wanted], meter=meter) == [CONTENTS[name] for name in wanted]
    assert meter.total.nbytes <= Path(location.path).stat().st_size


def test_zip64_end_records_prefixes_and_descriptors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixed = write_zip(tmp_path / "prefixed.zip", prefix=b"#!/bin/sh\n" * 9)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)  # the train zips have more than 65535 members
    zip64 = write_zip(tmp_path / "zip64.zip")
    assert b"PK\x06\x07" in Path(zip64.path).read_bytes()
    with open(tmp_path / "stream.zip", "wb") as file:  # not seekable: the sizes follow the data, in descriptors
        stream = Mock(write=file.write, flush=file.flush, spec=["write", "flush"])
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in CONTENTS.items():
                archive.writestr(name, data)
    for location in (prefixed, zip64, Location(str(tmp_path / "stream.zip"))):
        found = locate_members({location: CONTENTS})
        assert read_members(list(found.values())) == [CONTENTS[name] for name in found]
        assert len(found) == 40


def test_members_are_read_over_s3_and_http_and_damaged_ones_again(
    s3: S3Server, bucket: str, tmp_path: Path, proxied: Proxied
) -> None:
    write_zip(tmp_path / "m.zip", zipfile.ZIP_STORED)
    s3.upload(tmp_path, bucket)
    for location in (Location(f"{s3.endpoint_url}/{bucket}/m.zip"), Location(f"s3://{bucket}/m.zip")):
        found = locate_members({location: CONTENTS})
        assert read_members(list(found.values())) == [CONTENTS[name] for name in found]
    meter = Meter()
    with proxied(Fault("corrupt", "GET", times=2)):
        assert read_members(list(found.values()), meter=meter) == [CONTENTS[name] for name in found]
    assert meter.total.requests == 3  # all members in one range, then the damaged one twice
    assert meter.total.nbytes < sum(map(len, CONTENTS.values())) * 1.5


def test_an_empty_zip_contains_nothing_and_other_files_are_errors(tmp_path: Path) -> None:
    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()
    assert locate_members({Location(str(empty)): ["a.png"]}) == {}
    whole = bytearray(Path(write_zip(tmp_path / "m.zip", zipfile.ZIP_STORED).url).read_bytes())
    whole[-12:-8] = struct.pack("<I", 1 << 30)  # the directory's length
    for data in (b"", b"<html>404</html>", empty.read_bytes()[:-1], b"PK" * 50000, bytes(whole)):
        (tmp_path / "bad.zip").write_bytes(data)
        with pytest.raises(UserError, match=r"bad\.zip: not a readable zip"):
            locate_members({Location(str(tmp_path / "bad.zip")): ["a.png"]})
    with pytest.raises(StorageError, match=r"gone\.zip"):
        locate_members({Location(str(tmp_path / "gone.zip")): ["a.png"]})


def test_damage_in_a_directory_that_zipfile_does_not_call_a_bad_zip_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 5)  # sizes of 64 bits follow the name
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ä.png", b"0123456789")
    data = buffer.getvalue()
    entry = data.index(b"PK\x01\x02")
    name = data.index("ä".encode(), entry)
    size = data.index(struct.pack("<Q", 10), name)
    location = Location(str(tmp_path / "m.zip"))
    for at, damage, reason in (
        (entry + 6, b"\x7f", "zip file version"),
        (name, b"\xff", "decode byte 0xff"),
        (size, b"\xff" * 8, "too large"),
    ):
        location.write(data[:at] + damage + data[at + len(damage) :])
        with pytest.raises(UserError, match=rf"m\.zip: not a readable zip \(.*{reason}"):
            locate_members({location: ["ä.png"]})


def zip_again(path: Path, folders: Sequence[str]) -> Location:
    """Write `CONTENTS` into a zip with folders, one after another."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._x", b"")
        for number, (name, data) in enumerate(CONTENTS.items()):
            archive.writestr(f"{folders[number % len(folders)]}{name}", data)
    return Location(str(path))


@pytest.mark.parametrize("cached", [False, True])
def test_masks_in_one_folder_of_a_zip_are_found(tmp_path: Path, cached: bool) -> None:
    cache = Cache(str(tmp_path / "cache") if cached else "")
    location = zip_again(tmp_path / "m.zip", ["some/train-masks-0/"])
    for _ in range(2):
        found = locate_members({location: CONTENTS}, cache=cache)
        assert found.keys() == CONTENTS.keys()
        assert read_members(list(found.values())) == [CONTENTS[name] for name in found]


def test_a_zip_without_any_of_its_masks_is_an_error_that_says_what_it_holds(tmp_path: Path) -> None:
    names = list(CONTENTS)
    two = zip_again(tmp_path / "two.zip", ["a/", "b/"])
    with pytest.raises(UserError, match=r"two\.zip: it holds 41 files, such as '[ab]/.*none of the 40 masks"):
        locate_members({two: CONTENTS})
    with pytest.raises(UserError, match=r"two\.zip: .*none of the 2 masks"):
        locate_members({two: names[:2]})  # one in each folder
    folder = zip_again(tmp_path / "folder.zip", ["masks/"])
    assert locate_members({folder: ["gone.png"]}) == {}
    good = write_zip(tmp_path / "good.zip")
    assert locate_members({folder: ["gone.png"], good: names[:1]}).keys() == {names[0]}
    others = [f"{number}.png" for number in range(8)]
    with pytest.raises(
        UserError, match=r"good\.zip: it holds 40 files, such as .*none of the 8 masks looked for, such as '0\.png'"
    ):
        locate_members({good: others})
    assert locate_members({good: others[:7]}) == {}  # a few masks of one zip may be missing
    one_each = {zip_again(tmp_path / f"{number}.zip", [""]): [f"gone-{number}.png"] for number in range(8)}
    with pytest.raises(UserError, match=r"none of the 1 mask looked for"):
        locate_members(one_each)
    assert locate_members({**one_each, good: names[:1]}).keys() == {names[0]}


def test_extract_names_the_damage() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.png", b"mask" * 100)
        [info], end = archive.infolist(), archive.start_dir
    data, member = buffer.getvalue()[:end], Member("z", "m.png", 0, end, 8, info.CRC, info.compress_size, 400)
    assert extract(data, member) == b"mask" * 100
    faults = {
        "no room": (data[:20], member),
        "no local header": (b"XX" + data[2:], member),
        "encrypted": (data[:6] + struct.pack("<H", 1) + data[8:], member),
        "next member": (data[: 30 + 5 + 3], member),
        "method 12": (data, replace(member, method=12)),
        "CRC": (data, replace(member, crc32=member.crc32 ^ 1)),
        "its length": (data, replace(member, size=10)),  # inflates to more than the directory says: stopped there
        "inflated": (data[:35] + b"\xff" * (len(data) - 35), member),
    }
    for reason, (broken, planned) in faults.items():
        with pytest.raises(MemberError, match=reason):
            extract(broken, planned)
    meter = Meter()  # what is over the limit is not even fetched
    [answer] = read_members([replace(member, size=zip_members.MEMBER_BYTES + 1)], meter=meter)
    assert isinstance(answer, MemberError)
    assert meter.total == Traffic()


@given(st.binary(max_size=200), st.integers(0, 80), st.integers(0, 80), st.sampled_from([0, 8, 99]))
def test_extract_raises_nothing_but_member_errors(data: bytes, compressed: int, size: int, method: int) -> None:
    member = Member("z", "m", 0, len(data), method, 0, compressed, size)
    for candidate in (data, b"PK\x03\x04" + data):
        with contextlib.suppress(MemberError):
            assert len(extract(candidate, member)) == size


def member(zip_url: str, start: int, size: int) -> Member:
    return Member(zip_url, f"{start}", start, start + size, 0, 0, size, size)


def unwanted_bytes(members: Sequence[Member], start: int, end: int) -> int:
    return end - start - len({byte for m in members for byte in range(m.start, m.end)} & set(range(start, end)))


members_of_two_zips = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(1, 60)), max_size=20
).map(lambda rows: [member(*row) for row in rows])


@given(members_of_two_zips, st.integers(0, 300), st.integers(0, 100), st.integers(1, 300))
def test_plan_reads_covers_each_member_once_within_its_limits(
    members: list[Member], spare: int, gap: int, largest: int
) -> None:
    spans = plan_reads(members, spare=spare, gap=gap, largest=largest)
    assert sorted(map(repr, members)) == sorted(repr(held) for span in spans for held in span.members)
    assert [(span.zip_url, span.start) for span in spans] == sorted((span.zip_url, span.start) for span in spans)
    for span in spans:
        assert {held.zip_url for held in span.members} == {span.zip_url}
        assert span.start == min(held.start for held in span.members)
        assert span.end == max(held.end for held in span.members)
        assert span.end - span.start <= largest or len(span.members) == 1
    over = 0
    for url in {m.zip_url for m in members}:
        held = [m for m in members if m.zip_url == url]
        start, end = min(m.start for m in held), max(m.end for m in held)
        wanted = end - start - unwanted_bytes(held, start, end)
        unwanted = sum(unwanted_bytes(held, span.start, span.end) for span in spans if span.zip_url == url)
        if wanted > DENSE * (end - start):
            assert unwanted < wanted / 2
        else:
            over += unwanted
    assert over <= spare


def test_plan_reads_bridges_neighbours_and_the_shortest_gaps_first() -> None:
    neighbours = [member("z", n * 1700, 1700) for n in range(0, 4000, 4)]
    assert len(plan_reads(neighbours, spare=8 << 20)) == 1
    assert len(plan_reads(neighbours, spare=0)) == 1000
    few = [member("z", start, 100) for start in (0, 300, 1000, 1900)]  # gaps of 200, 600 and 800 bytes
    assert [len(plan_reads(few, spare=spare)) for spare in (0, 199, 200, 799, 800, 1599, 1600)] == [4, 4, 3, 3, 2, 2, 1]


def test_plan_reads_reads_a_dense_zip_in_few_large_ranges() -> None:
    dense = [member("z", n * 20_000, 14_000) for n in range(1000)]  # 70 % of 20 MB, and every gap costs 6 kB
    assert len(plan_reads(dense, spare=0)) == 3
    assert all(span.end - span.start <= 8 << 20 for span in plan_reads(dense, spare=0))
    sparse = [member("z", n * 20_000, 12_000) for n in range(1000)]
    assert len(plan_reads(sparse, spare=0)) == 1000
