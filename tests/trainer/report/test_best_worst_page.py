"""The page of worst and best images that `evaluate.py` writes, in a browser."""

import html
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.format.dataset import Category
from shards.format.sample import Sample
from tests.browser import console, press, requests, resize
from tests.trainer import tiny
from tests.trainer.metrics import scenes
from trainer.metrics.openimages import match
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections
from trainer.report.best_worst_page import BestWorstPage, ImageScore, outcome_captions

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


def render(samples: list[Sample], count: int = 3, ranks: int = 1) -> str:
    pages = [BestWorstPage(CATEGORIES, {}, count, 0.5) for _ in range(ranks)]
    for number, sample in enumerate(samples):
        pixels = torch.from_numpy(np.array(sample.picture())).permute(2, 0, 1)
        pages[number % ranks].add([pixels], [EvaluatedImage(sample, found_in(sample, number % 4))])
    gathered: list[Any] = []
    for page in pages:
        assert page.render(TITLE, lambda own: gathered.extend(own)) is None
    text = pages[0].render(TITLE, lambda own: gathered)
    assert text is not None
    return text


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


def test_the_page_shows_all_pictures_with_names_and_loads_nothing(page: Any, written: Path) -> None:
    assert [one.text for one in page.find_elements("css selector", "h2")] == ["The 3 worst", "The 3 best"]
    # Pictures are decoded when they come near the viewport.
    page.execute_script("for (const one of document.images) one.loading = 'eager'")
    shown = page.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map((one) => one.decode().then(() => one.naturalWidth)))"
        ".then(done, (error) => done(String(error)))"
    )
    assert len(shown) == 12
    assert min(shown) > 300
    assert [url for url in requests(page) if not url.startswith("data:image/jpeg") and url != written.as_uri()] == []
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [n for n in nodes if not n["ignored"] and n["role"]["value"] in ("checkbox", "image")]
    assert len(named) == 6 + 12
    assert [n for n in named if not n.get("name", {}).get("value")] == []


def test_names_and_ids_are_never_markup(page: Any) -> None:
    def texts(selector: str) -> list[str]:
        return [one.get_property("textContent") for one in page.find_elements("css selector", selector)]

    assert page.execute_script("return window.broken") is None
    assert page.execute_script("return document.querySelectorAll('script, img:not([width]), iframe, link').length") == 0
    assert page.title.startswith("Worst and best images: s3://bucket/")
    assert texts(".title") == [TITLE]
    names, shown = set(texts("figcaption b")), texts(".what")
    assert len(names) >= 3
    assert all(name.endswith(HOSTILE) for name in names)
    assert any(text.startswith("annotated: ") and HOSTILE in text for text in shown)
    alts = [one.get_attribute("alt") for one in page.find_elements("css selector", "img")]
    assert all(alt.endswith(text) for alt, text in zip(alts, shown, strict=True))


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
    press(page, Keys.TAB)
    assert page.switch_to.active_element.accessible_name.startswith("enlarge ")
    ring = "return getComputedStyle(document.querySelector('.pair')).outlineStyle"
    assert page.execute_script(ring) == "solid"
    press(page, Keys.SPACE)
    large = widths(page, "figure")
    assert large[0] > 1.9 * small[0]
    assert large[1:] == small[1:]
    press(page, Keys.SPACE)
    assert widths(page, "figure") == small
    page.find_elements("css selector", ".pair img")[2].click()
    assert widths(page, "figure")[1] == large[0]


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
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img ") == 2 * 6
    assert html.escape(TITLE) in page
    assert "F1 0.00, 0 right, " in page
    assert "2 × Disc" in page
    assert ": nothing" in page


def test_the_page_without_right_or_wrong_detections() -> None:
    sample = tiny.draw_sample(1)
    assert "No image has a right detection." in render([sample])
    page = render([replace(sample, instances=())])
    assert "No image has an error." in page
    assert "<figure>" not in page
    assert "<h2>" not in render([sample], count=0)


def test_images_are_sorted_by_f1_then_by_counts() -> None:
    counts = {"good": (5, 0, 0), "fair": (1, 1, 0), "bad": (0, 0, 1), "awful": (0, 3, 2)}
    good, fair, bad, awful = (ImageScore(name, *numbers) for name, numbers in counts.items())
    assert (good.f1, fair.f1, bad.f1) == pytest.approx((1, 2 / 3, 0))
    assert sorted([good, fair, bad, awful], key=lambda v: v.worst) == [awful, bad, fair, good]
    assert sorted([fair, ImageScore("h", 6, 0, 0), good], key=lambda v: v.best)[0].right == 6


def test_outcome_captions() -> None:
    person, car, _ = scenes.CATEGORIES
    box = (20.0, 20.0, 50.0, 50.0)
    found = scenes.found((person.id, box, 0.9), (person.id, box, 0.8), (car.id, box, 0.7))
    matches = match(EvaluatedImage(scenes.sample(scenes.instance(person.id, box)), found), {})
    captions = outcome_captions(found, matches, scenes.CATEGORIES)
    assert captions == ["Person 0.90", "Person 0.80 wrong", "(Car 0.70)"]
