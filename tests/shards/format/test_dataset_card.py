import pytest
import yaml

from shards.format.dataset import Category, Shard
from shards.format.dataset_card import CardPicture, ClassCounts, count_classes, render_card
from shards.format.index_schema import IndexRow
from shards.format.sample import Sample

CATEGORIES = (Category(1, "Dog", "/m/0bt9lr"), Category(2, "Cat", "/m/01yrx"), Category(3, "Ant", "/m/0_k2"))
SHARD = Shard("val/000000.tar", "val", 1, 10240, "00")
COUNTS = [("Dog", 2, 2, 4, 0), ("Cat", 0, 0, 0, 0), ("Ant", 2, 0, 2, 2)]
ROW = IndexRow("a", "val", "val/000000.tar", 0, 2048, 7, 4, 3, (1, 3), (2, 1), (1, 0), (0, 1))


def test_names_and_commands_cannot_leave_their_place_in_the_card() -> None:
    names = [
        "<img src=x onerror=alert(1)>",
        "a|b",
        "[x](http://y)",
        "```\n# z",
        "R&D",
        "back\\slash",
        "snake_case dog's",
    ]
    categories = [Category(number, name, name) for number, name in enumerate(names, start=1)]
    counts = [ClassCounts("val", name, 1, 1, 1, 0) for name in names]
    command = "build-shards --classes '```' '````'"
    text = render_card(categories, counts, [SHARD], command, {}).split("---\n", 2)[2]
    rows = [line for line in text.splitlines() if line.startswith("| val |")]
    assert [row.split(" | ")[1] for row in rows] == [
        "&lt;img src=x onerror=alert(1)&gt;",
        r"a\|b",
        r"\[x\](http://y)",
        r"\`\`\`\\n# z",
        "R&amp;D",
        r"back\\slash",
        "snake_case dog's",
    ]
    assert not any(name in text.replace(command, "") for name in names[:6])
    assert f"`````\n{command}\n`````\n" in text


@pytest.mark.parametrize(
    ("source", "licenses", "expected"),
    [
        ("Open Images", ["cc-by-2.0", "cc-by-4.0"], "Open Images lists the images as [CC BY 2.0]"),
        ("COCO", None, "under the licences of their source"),
    ],
)
def test_render_card_has_source_licence_and_packed_classes(
    source: str, licenses: list[str] | None, expected: str
) -> None:
    counts = count_classes([ROW, ROW], CATEGORIES)
    assert counts == [ClassCounts("val", *values) for values in COUNTS]
    card = render_card(CATEGORIES, counts, [SHARD], "build-shards --x", {"mask-filtered": 3}, source)
    _, front, text = card.split("---\n", 2)
    value = yaml.safe_load(front)
    assert value.get("license") == licenses
    assert value["configs"][0]["data_files"] == [{"split": "validation", "path": "val/*.tar"}]
    assert expected in text
    assert "1 image in 1 tar shard (" in text
    assert "3 mask-filtered" in text
    assert "| val | Ant | 2 | 0 | 2 | 2 |" in text
    assert "Cat" not in card
    assert "build-shards --x" in text


def test_the_picture_has_the_attribution_of_its_samples_and_only_links_to_web_pages() -> None:
    one = Sample(
        "a", b"", 4, 3, title="[x](y)", original_url="https://host/a?b=1", author="Zoë <b>", author_url="javascript:1"
    )
    two = Sample("b", b"", 4, 3, license="https://host/(a) b")
    counts = count_classes([ROW], CATEGORIES)
    card = render_card(CATEGORIES, counts, [SHARD], "x", {}, picture=CardPicture(b"", (one, two)))
    assert "![2 samples with masks and boxes](README.jpg)" in card
    assert r"By rows: [\[x\](y)](https://host/a?b=1), by Zoë &lt;b&gt;; b, licence." in card
    assert "README.jpg" not in render_card(CATEGORIES, counts, [SHARD], "x", {})
