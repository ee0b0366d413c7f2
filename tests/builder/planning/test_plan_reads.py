"""Which ranges of the zips are read: each member once, little for nothing, few requests where much is wanted."""

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.fetching.traffic import Meter
from builder.fetching.zip_members import DENSE, locate_members, plan_reads, read_members
from builder.tasks.plan import Member
from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from shards.storage.location import Location


def member(zip_url: str, start: int, size: int) -> Member:
    return Member(zip_url, f"{start}", start, start + size, 0, 0, size, size)


members_of_two_zips = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 500), st.integers(1, 60)), max_size=20
).map(lambda rows: [member(*row) for row in rows])


def stretches(members: list[Member]) -> dict[str, tuple[int, int]]:
    """Zip -> bytes wanted of it, each once, and from the first wanted to the last."""
    found = {}
    for url in {m.zip_url for m in members}:
        held = [m for m in members if m.zip_url == url]
        wanted = {byte for m in held for byte in range(m.start, m.end)}
        found[url] = len(wanted), max(m.end for m in held) - min(m.start for m in held)
    return found


@given(members_of_two_zips, st.integers(0, 300), st.integers(0, 100), st.integers(1, 300))
def test_each_member_is_read_once_and_little_else(members: list[Member], spare: int, gap: int, largest: int) -> None:
    spans = plan_reads(members, spare=spare, gap=gap, largest=largest)
    assert sorted(index for span in spans for index in span.members) == list(range(len(members)))
    for span in spans:
        held = [members[index] for index in span.members]
        assert all(m.zip_url == span.zip_url and span.start <= m.start and m.end <= span.end for m in held)
        assert span.end - span.start <= largest or len(held) == 1
    assert [(span.zip_url, span.start) for span in spans] == sorted((span.zip_url, span.start) for span in spans)
    over = 0
    for url, (wanted, stretch) in stretches(members).items():
        read = len({byte for span in spans if span.zip_url == url for byte in range(span.start, span.end)})
        if wanted > DENSE * stretch:
            assert read - wanted < wanted / 2
        else:
            over += read - wanted
    assert over <= spare


def test_a_zip_of_which_most_is_wanted_is_read_in_few_large_ranges() -> None:
    most = [member("z", n * 20_000, 14_000) for n in range(1000)]  # 70 % of 20 MB, and every gap costs 6 kB
    assert len(plan_reads(most, spare=0)) == 3
    assert all(span.end - span.start <= 8 << 20 for span in plan_reads(most, spare=0))
    less = [member("z", n * 20_000, 12_000) for n in range(1000)]
    assert len(plan_reads(less, spare=0)) == 1000


def test_the_smallest_gaps_are_bridged_first() -> None:
    few = [member("z", start, 100) for start in (0, 300, 1000, 1900)]  # gaps of 200, 600 and 800 bytes
    assert [len(plan_reads(few, spare=spare)) for spare in (0, 199, 200, 799, 800, 1599, 1600)] == [4, 4, 3, 3, 2, 2, 1]


def test_a_member_damaged_on_the_way_is_fetched_again_by_itself(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {f"{n}.png": bytes([n]) * 4000 for n in range(8)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    s3.filesystem().pipe_file(f"{bucket}/m.zip", buffer.getvalue())
    found = locate_members({Location(f"s3://{bucket}/m.zip"): content})
    with S3Proxy(s3.endpoint_url, [Fault("corrupt", "GET", times=2)]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        monkeypatch.setattr("shards.storage.location._instances", {})
        meter = Meter()
        assert read_members(list(found.values()), meter=meter) == [content[name] for name in found]
    assert meter.total.requests == 3  # all in one range, then twice the one that was damaged
    assert meter.total.nbytes < sum(map(len, content.values())) * 1.5
