import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.drawing.thumbnail import small_mask
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from shards.inspect.cli import main
from shards.inspect.html_page import OUTLINE_BYTES, PICTURE_BYTES, SIDE, small_picture
from tests.browser import console, press, requests, resize
from tests.support import CATEGORIES, filled, jpeg, sample, write_dataset

CARD = "#gallery .card"
HOSTILE = "</script><img src=x onerror=window.broken=1><script>window.broken=1</script>\u202e\"'`&amp;{{data}}<!--"


def page_of(root: Path | str, out: Path, *options: str) -> str:
    assert main([str(root), "--html", str(out), *options]) == 0
    return out.read_text("utf-8")


def data_of(page: str) -> Any:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def hostile_dataset(root: Path) -> None:
    """Write a dataset in which every text is markup, and every URL a script."""
    one = replace(
        sample(1),
        title=HOSTILE,
        author=HOSTILE,
        license="javascript:window.broken=1",
        author_url="javascript:window.broken=1",
        original_url="data:text/html,<script>window.broken=1</script>",
        instances=tuple(replace(instance, label=HOSTILE) for instance in sample(1).instances),
    )
    categories = (Category(1, HOSTILE, "/m/01g317"), CATEGORIES[1])
    write_dataset(root, {"train": [one, sample(2)]}, categories=categories, plan=HOSTILE)


def test_the_size_of_a_sample_on_the_page_is_limited(tmp_path: Path) -> None:
    """Noise, which compresses badly, under masks with ragged edges."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (512, 768, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=85)
    instances = []
    for x in range(0, 720, 24):
        mask = np.zeros((512, 768), np.uint8)
        mask[x % 400 : x % 400 + 80, x : x + 80] = rng.random((80, min(80, 768 - x))) < 0.6
        instances.append(Instance(1, rle.bounds(rle.encode(mask)), rle.encode(mask)))
    noise = Sample(f"{0:016x}", buffer.getvalue(), 768, 512, tuple(instances))
    write_dataset(tmp_path / "data", {"train": [noise]})
    [one] = data_of(page_of(tmp_path / "data", tmp_path / "page.html"))["samples"]
    assert len(one["picture"]) < PICTURE_BYTES * 4 / 3 + 100
    assert max(one["size"]) <= SIDE
    assert sum(len(item["outline"]) for item in one["objects"]) <= OUTLINE_BYTES
    assert all(item["outline"] for item in one["objects"])


def test_small_pictures_and_masks() -> None:
    size, data = small_picture(replace(sample(0), image=jpeg(2000, 500, 0), width=2000, height=500))
    assert size == (640, 160)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == ("JPEG", size)
        assert "exif" not in picture.info
    mask = np.zeros((500, 2000), np.uint8)
    mask[100:300, 400:1200] = 1
    small = small_mask(rle.encode(mask), size)
    assert (small.shape, small.sum(), small[32:96, 128:384].sum()) == ((160, 640), 64 * 256, 64 * 256)
    mask[:] = 0
    mask[250, 1000] = 1
    assert small_mask(rle.encode(mask), size).sum() == 1


def test_samples_and_seed_choose_the_gallery(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": [sample(n) for n in range(12)]})
    options = (("--samples", "4"), ("--samples", "4", "--seed", "1"), ())
    pages = [data_of(page_of(tmp_path / "data", tmp_path / "page.html", *each)) for each in options]
    ids = [[one["id"] for one in page["samples"]] for page in pages]
    assert ids[0] != ids[1]
    assert [len(own) for own in ids] == [4, 4, 12]


def test_the_file_has_no_markup_from_the_dataset(tmp_path: Path) -> None:
    hostile_dataset(tmp_path / "data")
    page = page_of(tmp_path / "data", tmp_path / "page.html")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert data_of(page)["plan"] == data_of(page)["classes"][0]["name"] == HOSTILE


def street(number: int) -> Sample:
    """A sample whose size varies, and whose car, if it has one, may be a group."""
    one = sample(number, width=96, height=128 if number % 3 == 0 else 64)
    return replace(one, instances=tuple(replace(each, is_group_of=number % 4 == 1) for each in one.instances))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a dataset with 24 samples in three splits."""
    root = tmp_path_factory.mktemp("streets")
    splits = {"train": range(15), "val": range(15, 20), "test": range(20, 24)}
    write_dataset(root / "data", {split: [street(n) for n in numbers] for split, numbers in splits.items()})
    page_of(root / "data", root / "page.html")
    return root / "page.html"


def open_page(driver: Any, file: Path) -> Any:
    resize(driver, 1280, 900)
    requests(driver)
    console(driver)
    driver.get(file.as_uri())
    return driver


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    yield open_page(browser, file)
    assert console(browser) == []


def choose(driver: Any, name: str, text: str) -> int:
    """Choose an option of a filter and return the number of samples that are shown."""
    from selenium.webdriver.support.select import Select

    select = Select(driver.find_element("id", name))
    [option] = [o.text for o in select.options if o.text == text or o.text.startswith(f"{text} (")]
    select.select_by_visible_text(option)
    return len(all_of(driver, CARD))


def all_of(driver: Any, selector: str) -> Any:
    return driver.find_elements("css selector", selector)


def visible(driver: Any, selector: str) -> int:
    return sum(element.is_displayed() for element in all_of(driver, selector))


def test_the_page_shows_counts_and_samples_and_loads_nothing(page: Any, file: Path) -> None:
    value = data_of(file.read_text("utf-8"))
    rows = all_of(page, "#classes tbody tr")
    assert [row.text.split()[0] for row in rows] == ["Person", "Car"]  # by number of boxes
    page.find_element("xpath", "//*[@id='tabs']/button[text()='val']").click()
    [val] = [split for split in value["splits"] if split["split"] == "val"]
    shown = [[cell.text for cell in all_of(row, "th, td")] for row in all_of(page, "#classes tbody tr")]
    assert {cells[0]: int(cells[3]) for cells in shown} == {row["name"]: row["boxes"] for row in val["classes"]}
    assert len(all_of(page, CARD)) == 24
    assert page.execute_script("return [...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    assert visible(page, ".card:first-of-type .area") > 0
    assert [url for url in requests(page) if not url.startswith("data:") and url != file.as_uri()] == []
    notes = [page.find_element("id", name).text for name in ("split-facts", "label-note", "gallery-note")]
    for note, start in zip(notes, ("val: 5 images", "Verified labels: share of all images.", "24 samples, chosen")):
        assert note.startswith(start)
    grounds = []
    for dark in (False, True):  # the page follows the dark mode of the user
        resize(page, 1280, 900, dark=dark)
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        grounds.append([int(part) for part in re.findall(r"\d+", colour)[:3]])
    assert min(grounds[0]) > 200 > 60 > max(grounds[1])


def test_filters_by_class_split_and_flag(page: Any, file: Path) -> None:
    value = data_of(file.read_text("utf-8"))
    cars = [[item for item in one["objects"] if item["class"] == 2] for one in value["samples"]]
    assert choose(page, "by-class", "Car") == sum(map(bool, cars)) == 12
    bare = sum(any(not item["outline"] and 0 not in item["flags"] for item in own) for own in cars)
    assert choose(page, "by-flag", "a box only") == bare == 6
    assert page.find_element("id", "shown").text == f"{bare} of 24 shown"
    choose(page, "by-class", "all")
    groups = sum(any(0 in item["flags"] for item in one["objects"]) for one in value["samples"])
    assert choose(page, "by-flag", "group-of") == groups == 6
    choose(page, "by-flag", "any annotations")
    assert choose(page, "by-split", "test") == 4


def test_masks_and_boxes_are_toggled(page: Any) -> None:
    masks, boxes = (page.find_element("css selector", f"#filters [data-kind={kind}]") for kind in ("masks", "boxes"))
    assert visible(page, "#gallery .area") > 0
    masks.click()
    assert (visible(page, "#gallery .area"), masks.get_attribute("aria-pressed")) == (0, "false")
    assert visible(page, "#gallery .box") > 0
    press(page, "b")
    assert (visible(page, "#gallery .box"), boxes.get_attribute("aria-pressed")) == (0, "false")
    # The mask pane, next to the photograph, keeps its masks.
    all_of(page, CARD)[0].click()
    assert visible(page, "#photo .area") == 0 < visible(page, "#mask .area")
    photo, mask = (page.find_element("id", name).rect for name in ("photo", "mask"))
    assert photo["y"] == mask["y"]
    assert photo["x"] + photo["width"] <= mask["x"]
    press(page, "mb")
    assert visible(page, "#photo .area") > 0 < visible(page, "#photo .box")


def test_masks_are_coloured_by_instance_or_by_class_and_rows_and_shapes_highlight_each_other(page: Any) -> None:
    place = next(n for n, one in enumerate(data_of(page.page_source)["samples"]) if len(one["objects"]) > 1)
    all_of(page, CARD)[place].click()

    def fills() -> set[str]:
        return {shape.get_attribute("stroke") for shape in all_of(page, "#mask .box")}

    objects = len(all_of(page, "#mask .box"))
    assert len(fills()) == objects == len(all_of(page, "#photo .name")) > 1
    press(page, "c")
    assert fills() == {shape.get_attribute("stroke") for shape in all_of(page, "#photo .box")}
    page.find_element("id", "colours").click()
    assert len(fills()) == objects
    row = all_of(page, "#objects tbody tr")[0]
    script = "arguments[0].dispatchEvent(new MouseEvent(arguments[1], { bubbles: true }))"
    for over_shape, over_row, count in (("mouseover", "mouseenter", 1), ("mouseout", "mouseleave", 0)):
        page.execute_script(script, page.find_element("css selector", "#mask .shape[data-place='0'] .box"), over_shape)
        assert len(all_of(page, "#objects tr.highlighted")) == len(all_of(page, "#mask .highlighted")) == count
        page.execute_script(script, row, over_row)
        assert len(all_of(page, "#photo .highlighted")) == count


def test_hatches_of_groups_have_the_colour_of_their_box_and_are_bright_on_black(page: Any) -> None:
    data = data_of(page.page_source)
    group = data["flags"].index("group-of")
    place = next(n for n, one in enumerate(data["samples"]) if any(group in o["flags"] for o in one["objects"]))
    all_of(page, CARD)[place].click()
    opacities = []
    for pane in ("#photo", "#mask"):
        hatch = page.find_element("css selector", f"{pane} .hatch")
        stripe = page.find_element("css selector", f"{hatch.get_attribute('fill')[4:-1]} rect")
        box = page.find_element("css selector", f"{pane} .shape:has(.hatch) .box")
        assert stripe.get_attribute("fill") == box.get_attribute("stroke")
        opacities.append(float(hatch.value_of_css_property("fill-opacity")))
    assert opacities == [0.4, 0.85]


def test_predicted_masks_are_counted_filtered_and_dashed_only_where_there_are_any(
    page: Any, browser: Any, tmp_path: Path
) -> None:
    assert visible(page, ".if-predicted") == len(all_of(page, ".area.predicted")) == 0
    write_dataset(tmp_path / "data", {"train": [filled(n) for n in range(6)]})
    page_of(tmp_path / "data", tmp_path / "page.html")
    open_page(browser, tmp_path / "page.html")
    assert visible(page, ".if-predicted") == 2  # in the legend and the table
    [car] = [row for row in all_of(page, "#classes tbody tr") if row.text.startswith("Car")]
    assert [cell.text for cell in all_of(car, "td")][1:6] == ["3", "3", "0", "3", "0 %"]
    assert (choose(page, "by-flag", "a predicted mask"), choose(page, "by-flag", "a mask")) == (3, 6)
    choose(page, "by-flag", "a predicted mask")
    all_of(page, CARD)[0].click()
    [area] = all_of(page, "#photo .area.predicted")
    assert area.value_of_css_property("stroke-dasharray") != "none"
    assert len(all_of(page, "#photo .box")) == 2 > len(all_of(page, "#photo .box.dashed")) == 1
    assert [name.text for name in all_of(page, "#photo .name")] == ["Person", "Car predicted 0.93"]
    assert "mask predicted by seed-1, score 0.93" in page.find_element("id", "objects").text


def nameless_controls(driver: Any) -> list[Any]:
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "combobox", "image", "dialog", "link", "region", "search")
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert controls
    return [node for node in controls if not node.get("name", {}).get("value")]


def test_the_keyboard_reaches_everything_and_every_control_has_an_accessible_name(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def focused() -> str:
        return str(page.execute_script("return document.activeElement.getAttribute('aria-label') || ''"))

    labels = [card.get_attribute("aria-label") for card in all_of(page, CARD)]
    for _ in range(40):
        press(page, Keys.TAB)
        if focused() in labels:
            break
    assert focused() == labels[0]
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(page, Keys.ARROW_RIGHT)
    assert focused() == labels[1]
    press(page, Keys.ENTER)
    title = page.find_element("id", "detail-title")
    assert title.is_displayed()
    assert labels[1].startswith(title.text)
    press(page, Keys.ARROW_RIGHT)
    assert labels[2].startswith(title.text)
    row = page.find_element("css selector", "#objects tbody tr")
    page.execute_script("arguments[0].focus()", row)
    assert len(page.find_elements("css selector", ".shape.highlighted")) == 2  # on the photograph and on the mask
    unnamed = nameless_controls(page)
    press(page, Keys.ESCAPE)
    assert not title.is_displayed()
    assert unnamed == nameless_controls(page) == []  # in the dialog, and on the page behind it
    WebDriverWait(page, 60).until(lambda _: focused() == labels[2])  # the dialog's close event comes later


@pytest.mark.parametrize("width", [390, 320])
def test_nothing_is_cut_off_on_a_phone(page: Any, width: int) -> None:
    resize(page, width, 844, phone=True)
    assert page.execute_script("return document.scrollingElement.scrollWidth") <= width
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", all_of(page, CARD)[0])
    all_of(page, CARD)[0].click()
    photo, mask = (page.find_element("id", name).rect for name in ("photo", "mask"))
    assert photo["y"] + photo["height"] <= mask["y"]  # one below the other
    assert photo["width"] > 0.85 * width
    assert page.execute_script("return document.getElementById('detail').scrollWidth") <= width
    close = page.find_element("id", "close").rect
    assert close["width"] >= 40 <= close["height"]
    assert close["x"] + close["width"] <= width


def test_markup_in_the_dataset_is_shown_as_text_and_the_policy_forbids_other_scripts_and_images(
    browser: Any, tmp_path: Path
) -> None:
    hostile_dataset(tmp_path / "data")
    value = data_of(page_of(tmp_path / "data", tmp_path / "page.html"))
    open_page(browser, tmp_path / "page.html")
    place = next(n for n, one in enumerate(value["samples"]) if one["title"])
    all_of(browser, CARD)[place].click()
    assert browser.execute_script("return window.broken") is None
    about = browser.find_element("id", "about")
    assert about.find_element("xpath", "./dd[1]").get_property("textContent") == HOSTILE
    assert about.find_elements("css selector", "a") == []  # none of the URLs is http
    assert len(browser.find_elements("css selector", "img, script")) == 2 + 2 + 1
    assert [url for url in requests(browser) if not url.startswith(("data:image/jpeg", "file:"))] == []
    assert console(browser) == []
    browser.execute_script(
        "const image = new Image(); image.src = 'https://example.org/x.png'; document.body.append(image);"
        "const script = document.createElement('script'); script.textContent = 'window.broken = 1';"
        "document.body.append(script);"
    )
    assert browser.execute_script("return window.broken") is None
    assert all("Content Security Policy" in message for message in console(browser))


def test_a_direction_mark_in_a_name_does_not_affect_the_next_name(browser: Any, tmp_path: Path) -> None:
    categories = (Category(1, "\u202eevil", "/m/01g317"), CATEGORIES[1])
    write_dataset(tmp_path, {"train": [replace(sample(1), verified_present=(1, 2))]}, categories=categories)
    page_of(tmp_path, tmp_path / "page.html")
    open_page(browser, tmp_path / "page.html")
    all_of(browser, CARD)[0].click()
    for where in ("//dt[.='Verified present']/following-sibling::dd[1]//bdi", "//*[@class='caption']//bdi"):
        first, second = browser.find_elements("xpath", where)
        assert [first.get_property("textContent"), second.get_property("textContent")] == ["\u202eevil", "Car"]
        assert first.rect["x"] + first.rect["width"] <= second.rect["x"]  # left to right
