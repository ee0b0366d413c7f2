"""The page of worst and best images that `evaluate.py` writes, in a browser."""

import html
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.drawing.overlay import FOUND, MISSED, SUPERFLUOUS, UNCOUNTED
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from tests.browser import console, press, requests, resize
from tests.trainer import tiny
from tests.trainer.metrics import scenes
from trainer.metrics.coco import CocoMetric
from trainer.metrics.openimages import OpenImagesMetric, match
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections
from trainer.report.best_worst_page import BestWorstPage, ImageScore, annotation_marks, detection_marks
from trainer.report.pictures import Mark
from trainer.report.scorecard import Evaluation

HOSTILE = "</style></title><img src=x onerror=window.broken=1><script>window.broken=1</script>\u202e\"'&amp;<!--"
CATEGORIES = (Category(1, HOSTILE, HOSTILE), Category(2, "Disc", "/m/di"))
TITLE = f"s3://bucket/{'a-very-long-name' * 8}, step 7, on val of {HOSTILE}"


def found_in(sample: Sample, count: int) -> Detections:
    """The first `count` objects that have a mask, as detections; the last of them as the other class."""
    masked = [one for one in sample.instances if one.segmentation is not None][:count]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (one.bbox for one in masked)]
    labels = [one.category_id for one in masked[:-1]] + [3 - one.category_id for one in masked[-1:]]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.linspace(0.9, 0.6, len(masked), dtype=np.float32),
        tuple(one.segmentation for one in masked if one.segmentation),
    )


def render(samples: list[Sample], count: int = 5, ranks: int = 1) -> str:
    pages = [BestWorstPage(CATEGORIES, {}, count, 0.5) for _ in range(ranks)]
    coco, open_images = CocoMetric(CATEGORIES), OpenImagesMetric(CATEGORIES)
    for number, sample in enumerate(samples):
        pixels = torch.from_numpy(np.array(sample.picture())).permute(2, 0, 1)
        image = EvaluatedImage(sample, found_in(sample, number % 4))
        pages[number % ranks].add([pixels], [image])
        coco.process([image])
        open_images.process([image])
    gathered: list[Any] = []
    for page in pages:
        assert page.render(TITLE, gather=lambda own: gathered.extend(own)) is None
    by_coco, by_open_images = coco.evaluate(), open_images.evaluate()
    assert by_coco
    assert by_open_images
    text = pages[0].render(TITLE, Evaluation(by_coco, by_open_images), lambda own: gathered)
    assert text is not None
    return text.decode("utf-8")


# Ids and classes are markup. The images are small: names are drawn on enlarged pictures.
SAMPLES = [replace(tiny.draw_sample(n), image_id=f"{n}{HOSTILE}") for n in range(1, 13)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.html"
    path.write_text(render(SAMPLES), "utf-8")
    return path


@pytest.fixture
def page(browser: Any, written: Path) -> Any:
    resize(browser, 1280, 900)
    requests(browser)
    console(browser)
    browser.get(written.as_uri())
    yield browser
    assert console(browser) == []


def widths(driver: Any, selector: str) -> list[float]:
    return [one.rect["width"] for one in driver.find_elements("css selector", selector)]


def texts(driver: Any, selector: str) -> list[str]:
    return [one.get_property("textContent") for one in driver.find_elements("css selector", selector)]


def shown(driver: Any, selector: str = "figure") -> list[Any]:
    return [one for one in driver.find_elements("css selector", selector) if one.is_displayed()]


def test_the_page_shows_all_pictures_with_names_and_loads_nothing(page: Any, written: Path) -> None:
    assert texts(page, "h3") == ["The 5 worst", "The 5 best"]
    # Pictures are decoded when they come near the viewport.
    page.execute_script("for (const one of document.images) one.loading = 'eager'")
    decoded = page.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map((one) => one.decode().then(() => one.naturalWidth)))"
        ".then(done, (error) => done(String(error)))"
    )
    assert len(decoded) == 20
    assert min(decoded) > 300
    assert [url for url in requests(page) if not url.startswith("data:image/jpeg") and url != written.as_uri()] == []
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [n for n in nodes if not n["ignored"] and n["role"]["value"] in ("checkbox", "image")]
    assert len(named) == 10 + 20
    assert [n for n in named if not n.get("name", {}).get("value")] == []


def test_names_and_ids_are_never_markup(page: Any) -> None:
    assert page.execute_script("return window.broken") is None
    assert (
        page.execute_script(
            "return document.querySelectorAll('script:not(body > :last-child), img:not([width]), iframe, link').length"
        )
        == 0
    )
    assert page.title.startswith("Worst and best images: s3://bucket/")
    assert texts(page, ".title") == [TITLE]
    names, what = set(texts(page, "figcaption b")), texts(page, ".what")
    assert len(names) >= 3
    assert all(name.endswith(HOSTILE) for name in names)
    assert any(text.startswith("annotated: ") and HOSTILE in text for text in what)
    alts = [one.get_attribute("alt") for one in page.find_elements("css selector", "img")]
    assert all(alt.endswith(text) for alt, text in zip(alts, what, strict=True))


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_fits_any_width(page: Any, width: int) -> None:
    resize(page, width, 844, phone=width < 700)
    assert page.execute_script("return document.scrollingElement.scrollWidth") <= width
    one, other = (half.rect for half in page.find_elements("css selector", ".pair > span")[:2])
    if width < 700:
        assert one["y"] + one["height"] <= other["y"]  # one below the other, as wide as the screen
        assert one["width"] > 0.85 * width
    else:
        assert one["y"] == other["y"]
        assert one["x"] + one["width"] <= other["x"]


def test_a_pair_is_enlarged_by_keyboard_and_by_click(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    small = widths(page, "figure")
    page.find_element("id", "class").click()
    press(page, Keys.ESCAPE, Keys.TAB)
    assert page.switch_to.active_element.accessible_name.startswith("enlarge ")
    ring = "return getComputedStyle(document.querySelector('.pair')).outlineStyle"
    assert page.execute_script(ring) == "solid"
    press(page, Keys.SPACE)
    large = widths(page, "figure")
    assert large[0] > 1.9 * small[0]
    press(page, Keys.SPACE)
    assert widths(page, "figure") == small
    page.find_elements("css selector", ".pair img")[2].click()
    assert widths(page, "figure")[1] == large[0]


def test_pictures_fill_every_row_but_the_last(page: Any) -> None:
    for section in page.find_elements("css selector", ".images"):
        rows: dict[float, float] = {}
        for figure in section.find_elements("css selector", "figure"):
            rect = figure.rect
            rows[rect["y"]] = max(rows.get(rect["y"], 0), rect["x"] + rect["width"])
        assert len(rows) > 1
        edge = section.rect["x"] + section.rect["width"]
        assert all(abs(end - edge) < 2 for end in [*rows.values()][:-1])


def test_a_narrow_picture_is_no_higher_than_its_neighbours_and_a_phone(browser: Any, tmp_path: Path) -> None:
    picture, buffer = Image.new("RGB", (30, 120)), io.BytesIO()
    picture.save(buffer, "JPEG")
    missed = Instance(1, (5.0, 5.0, 20.0, 20.0), rle.encode(np.eye(120, 30, dtype=np.uint8)))
    narrow = Sample("narrow", buffer.getvalue(), 30, 120, (missed,) * 9, verified_present=(1, 2))
    (tmp_path / "images.html").write_text(render([narrow, SAMPLES[4]]), "utf-8")
    resize(browser, 1280, 900)
    browser.get((tmp_path / "images.html").as_uri())
    first, *_, last = (one.rect for one in shown(browser, "section:first-of-type img"))
    assert (first["y"], first["height"]) == (last["y"], pytest.approx(last["height"], abs=4))
    resize(browser, 390, 844, phone=True)
    assert max(one.rect["height"] for one in shown(browser, "img")) < 844


def test_a_phone_shows_four_images_of_each_list_at_a_time(page: Any) -> None:
    resize(page, 390, 844, phone=True)
    first = [one.id for one in shown(page)]
    assert (len(first), [one.text for one in shown(page, "output")]) == (8, ["1 of 2", "1 of 2"])
    shown(page, "[aria-label='next page']")[0].click()
    assert len(shown(page)) == 1 + 4
    assert shown(page)[0].id not in first
    assert not shown(page, "[aria-label='next page']")[0].is_enabled()
    resize(page, 1280, 900)
    assert len(shown(page)) == 10


def test_the_class_filter_shows_the_images_in_which_a_class_is_annotated_or_found(page: Any) -> None:
    from selenium.webdriver.support.select import Select

    choice = Select(page.find_element("id", "class"))
    assert [one.get_property("textContent") for one in choice.options] == ["all", HOSTILE, "Disc"]
    choice.select_by_index(1)
    kept, figures = shown(page), page.find_elements("tag name", "figure")
    assert 0 < len(kept) < len(figures)
    assert all((HOSTILE in "".join(texts(figure, ".what"))) == (figure in kept) for figure in figures)


def test_the_page_has_the_ap_of_the_classes_and_links_to_the_other_results(page: Any) -> None:
    rows = [row.find_elements("css selector", "th, td") for row in page.find_elements("css selector", "tr")]
    assert [cell.get_property("textContent") for cell in rows[0]][-1] == "Open Images AP50"
    assert [row[0].get_property("textContent") for row in rows[1:]] == [HOSTILE, "Disc", "mean"]
    assert float(rows[2][-1].text) > 0
    links = {one.get_dom_attribute("href") for one in page.find_elements("tag name", "a")}
    assert links == {"curves.png", "confusion.png", "classes.csv", "evaluation.json"}


def test_the_content_security_policy_forbids_scripts(browser: Any, written: Path) -> None:
    browser.get(written.as_uri())
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.broken = 1';"
        "document.body.append(script);"
    )
    assert browser.execute_script("return window.broken") is None
    assert all("Content Security Policy" in message for message in console(browser))


def test_the_page_shows_the_worst_and_the_best_of_all_ranks(written: Path) -> None:
    page = written.read_text("utf-8")
    assert render(SAMPLES, ranks=3) == page
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img ") == 2 * 10
    assert html.escape(TITLE) in page
    assert "F1 0.00, 0 right, " in page
    assert "2 × Disc" in page
    assert ": nothing" in page


def test_the_page_without_right_or_wrong_detections() -> None:
    sample = tiny.draw_sample(1)
    assert "No image has a right detection." in render([sample])
    page = render([replace(sample, instances=())])
    assert "No image has an error." in page
    assert "<figure" not in page
    assert "<h3>" not in render([sample], count=0)


def test_images_are_sorted_by_f1_then_by_counts() -> None:
    counts = {"good": (5, 0, 0), "fair": (1, 1, 0), "bad": (0, 0, 1), "awful": (0, 3, 2)}
    good, fair, bad, awful = (ImageScore(name, *numbers) for name, numbers in counts.items())
    assert (good.f1, fair.f1, bad.f1) == pytest.approx((1, 2 / 3, 0))
    assert sorted([good, fair, bad, awful], key=lambda v: v.worst) == [awful, bad, fair, good]
    assert sorted([fair, ImageScore("h", 6, 0, 0), good], key=lambda v: v.best)[0].right == 6


def test_annotations_and_detections_are_marked_by_their_outcome() -> None:
    person, car, _ = scenes.CATEGORIES
    box, other, third = (20.0, 20.0, 50.0, 50.0), (100.0, 20.0, 50.0, 50.0), (20.0, 100.0, 50.0, 50.0)
    annotated = (
        scenes.instance(person.id, box),
        scenes.instance(person.id, other),
        scenes.instance(person.id, third, mask=False),
        scenes.instance(person.id, third, mask=False, group=True),
    )
    found = scenes.found((person.id, box, 0.9), (person.id, box, 0.8), (car.id, box, 0.7), (person.id, other, 0.3))
    image, names = EvaluatedImage(scenes.sample(*annotated), found), {person.id: "Person", car.id: "Car"}
    matches = match(image, {})
    assert annotation_marks(image, matches, names, 0.5) == [
        Mark(FOUND, "Person"),
        Mark(MISSED, "Person missed"),  # its detection has a lower score
        Mark(UNCOUNTED, "(Person)"),
        Mark(UNCOUNTED, "(Person group)"),
    ]
    assert annotation_marks(image, matches, names, 0.2)[1] == Mark(FOUND, "Person")
    assert detection_marks(found, matches, names)[:3] == [
        Mark(FOUND, "Person 0.90"),
        Mark(SUPERFLUOUS, "Person 0.80 wrong"),
        Mark(UNCOUNTED, "(Car 0.70)"),
    ]
