import io
import json
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageFilter

from builder.commands.cli import main
from builder.sources.listing import files_under
from builder.sources.mask_images import objects_in
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import samples_of
from tests.support import jpeg

WIDTH, HEIGHT = 60, 40
Capture = pytest.CaptureFixture[str]


def masks_of(number: int) -> list[np.ndarray]:
    """Two objects, bool [H, W], that do not overlap."""
    rng = np.random.default_rng(number)
    return [np.pad(rng.random((20, 20)) < 0.7, ((10, 10), (left, WIDTH - 20 - left))) for left in (5, 30)]


def save(path: Path, image: Image.Image | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


def numbered(number: int) -> np.ndarray:
    one, other = masks_of(number)
    return (one * 3 + other * 200).astype(np.uint8)


def pennfudan(root: Path, number: int) -> None:
    save(root / "PNGImages" / f"street{number}.png", Image.open(io.BytesIO(jpeg(WIDTH, HEIGHT, number))))
    save(root / "PedMasks" / f"street{number}_mask.png", numbered(number))


def palette(root: Path, number: int) -> None:
    """As VOC: the palette's first colours, of which two are the same."""
    save(root / "JPEGImages" / f"street{number}.jpg", Image.open(io.BytesIO(jpeg(WIDTH, HEIGHT, number))))
    image = Image.fromarray(numbered(number), "P")
    image.putpalette([0, 0, 0] * 256)
    save(root / "Objects" / f"street{number}.png", image)


def bowl(root: Path, number: int) -> None:
    """As the Data Science Bowl 2018: images with an alpha channel, a file per nucleus."""
    image = Image.open(io.BytesIO(jpeg(WIDTH, HEIGHT, number))).convert("RGBA")
    save(root / f"street{number}" / "images" / f"street{number}.png", image)
    for place, mask in enumerate(masks_of(number)):
        save(root / f"street{number}" / "masks" / f"{place}.png", mask.astype(np.uint8) * 255)


LAYOUTS: list[tuple[Callable[[Path, int], None], str, str]] = [
    (pennfudan, "PNGImages", "PedMasks"),
    (palette, "JPEGImages", "Objects"),
    (bowl, ".", "."),
]


def run(root: Path, images: str, masks: str, *arguments: str, name: str = "person") -> int:
    places = ["--images", str(root / images), "--annotations", str(root / masks), "--out", str(root.parent / "out")]
    named = ["--class-name", name] if name else []
    return main(["--source", "masks", *places, *named, "--workers", "1", *arguments])


@pytest.mark.parametrize(("write", "images", "masks"), LAYOUTS)
def test_masks_of_each_layout_are_packed_pixel_for_pixel(
    tmp_path: Path, capsys: Capture, write: Callable[[Path, int], None], images: str, masks: str
) -> None:
    root = tmp_path / "data"
    for number in range(3):
        write(root, number)
    assert run(root, images, masks, "--list-classes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["person"] == {"images": 3, "masks": 6, "boxes": 6}
    assert run(root, images, masks, "--dry-run") == 0
    assert run(root, images, masks) == 0
    samples = samples_of(tmp_path / "out")["train"]
    assert sorted(samples) == ["street0", "street1", "street2"]
    for number in range(3):
        for mask, wanted in zip(samples[f"street{number}"].masks(), masks_of(number), strict=True):
            assert (mask == wanted).all()
    [category] = open_dataset(tmp_path / "out").categories
    assert category.name == "person"
    assert "PNG masks" in (tmp_path / "out" / "README.md").read_text()


def test_images_without_a_mask_are_background_and_splits_have_their_own_folders(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            pennfudan(root / split, number)
    (root / "val" / "PedMasks" / "street1_mask.png").unlink()
    images = [f"{split}={root / split / 'PNGImages'}" for split in ("train", "val")]
    masks = [f"{split}={root / split / 'PedMasks'}" for split in ("train", "val")]
    places = ["--images", *images, "--annotations", *masks, "--out", str(tmp_path / "out"), "--keep-empty"]
    assert main(["--source", "masks", *places, "--class-name", "person", "--workers", "1"]) == 0
    found = samples_of(tmp_path / "out")
    assert {split: sorted(samples) for split, samples in found.items()} == {
        split: [f"{split}-street{number}" for number in range(2)] for split in ("train", "val")
    }
    empty = found["val"]["val-street1"]
    assert (empty.instances, empty.verified_absent) == ((), (1,))


def test_objects_in_an_array_are_those_of_each_value() -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (30, 50)) ** 3
    found = objects_in(pixels)
    assert list(found) == [value**3 for value in range(1, 9)]
    assert all(mask == rle.encode(pixels == value) for value, mask in found.items())
    assert objects_in(np.zeros((3, 4), np.bool_)) == {}


def test_smooth_edges_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pennfudan(tmp_path / "data", 0)
    blurred = Image.fromarray(numbered(0)).filter(ImageFilter.GaussianBlur(1))
    save(tmp_path / "data" / "PedMasks" / "street0_mask.png", blurred)
    assert run(tmp_path / "data", "PNGImages", "PedMasks") == 0
    assert "pixels or fewer: were they saved with smooth edges, or as a JPEG first?" in caplog.text


def faults(root: Path, change: str) -> tuple[str, str, str]:
    """Spoil a dataset of PennFudan's layout; return images, masks and class name."""
    images, masks = root / "PNGImages", root / "PedMasks"
    mask = masks / "street0_mask.png"
    if change == "no png":
        mask.write_bytes(jpeg(WIDTH, HEIGHT, 0))
    elif change == "photograph":
        save(mask, np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH * 3), dtype=np.uint16))
    elif change == "sizes":
        mask.unlink()
        for number, size in enumerate(((40, 60), (30, 60))):
            save(masks / "street0" / f"{number}.png", np.ones(size, np.uint8))
    elif change == "other size":
        for path in masks.iterdir():
            save(path, np.ones((HEIGHT, HEIGHT), np.uint8))
    elif change == "twice":
        save(images / "street0.jpg", Image.new("RGB", (WIDTH, HEIGHT)))
    elif change == "a file":
        return "PNGImages", "PedMasks/street0_mask.png", "person"
    elif change == "backslash":
        (images / "street0.png").rename(images / "a\\b.png")
    elif change == "other names":
        for path in masks.iterdir():
            path.rename(path.with_stem(f"mask of {path.stem}"))
    elif change == "no masks":
        return "PNGImages", "elsewhere", "person"
    elif change == "no images":
        return "PedMasks/empty", "PedMasks", "person"
    return "PNGImages", "PedMasks", "" if change == "no class" else "person"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no png", "street0_mask.png: cannot be read as a mask (not a PNG): give PNGs"),
        ("photograph", "values: is it a photograph? check --annotations"),
        ("sizes", "street0/1.png: the mask is 60x30, another one of the same image 60x40: correct it"),
        ("other size", "the annotations are for 40x40 pixels, the image has 60x40"),
        ("twice", "street0.jpg and street0.png are both the image street0: keep one of them"),
        ("no masks", "elsewhere: there is no file in this folder: check --annotations"),
        ("a file", "street0_mask.png is a file, not a folder: correct the path"),
        ("backslash", "the name 'a\\\\b.png' has a backslash or a control character: rename the file"),
        ("other names", "has a mask there: masks must be at <image>.png, <image>_mask.png"),
        ("no images", "there is no such folder: check --images"),
        ("no class", "masks have no class names: give that of the objects, --class-name NAME"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, capsys: Capture, change: str, message: str) -> None:
    root = tmp_path / "data"
    for number in range(2):
        pennfudan(root, number)
    images, masks, name = faults(root, change)
    assert run(root, images, masks, name=name) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("masks", "name"), [("masks", "cat"), ("objects.csv", "")])
def test_masks_in_the_folder_of_the_images_are_no_images(tmp_path: Path, masks: str, name: str) -> None:
    root = tmp_path / "data"
    for number in range(2):
        save(root / f"{number}.png", Image.open(io.BytesIO(jpeg(WIDTH, HEIGHT, number))))
        save(root / "masks" / f"{number}.png", masks_of(number)[0])
    (root / "objects.csv").write_text("image,class,mask\n0,cat,masks/0.png\n1, cat ,masks/1.png\n")
    assert run(root, "", masks, "--keep-empty", name=name) == 0
    assert sorted(samples_of(tmp_path / "out")["train"]) == ["0", "1"]
    assert [category.name for category in open_dataset(tmp_path / "out").categories] == ["cat"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("street0,cat,,5,5,0,5,0", "line 2: the box has no extent inside of the image: correct it"),
        ("street0,cat,,90,5,5,5,0", "line 2: the box has no extent inside of the image: correct it"),
        ("street0,cat,,5,5,5,x,0", "line 2: the box '5 5 5 x' is not x, y, width, height in pixels"),
        ("street0,cat,,5,5,5,5,True", "line 2: is_group_of is 'True': give 0 or 1"),
        ("street0,cat,,,,,,", "line 2: has neither a mask nor a box"),
        ("street9,cat,,5,5,5,5,0", "line 2: --images has no image 'street9'"),
        (f"street0,{'cat' * 50_000},,5,5,5,5,0", "not a CSV table (field larger than field limit"),
    ],
)
def test_wrong_lines_of_a_table_are_named(tmp_path: Path, capsys: Capture, line: str, message: str) -> None:
    pennfudan(tmp_path / "data", 0)
    (tmp_path / "data/objects.csv").write_text(f"image,class,mask,x,y,width,height,is_group_of\n{line}\n")
    assert run(tmp_path / "data", "PNGImages", "objects.csv", name="") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_files_are_found_through_links_and_on_web_servers(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number in range(2):
        pennfudan(root, number)
    (root / "PNGImages" / "street1.png").rename(root / "PNGImages" / "straße 1%20.png")
    (linked := tmp_path / "linked").mkdir()
    (linked / "inner").symlink_to(root / "PNGImages")
    (linked / "loop").symlink_to(linked)
    names = ["straße 1%20.png", "street0.png"]
    assert files_under(Location(str(linked))) == [f"inner/{name}" for name in names]
    assert files_under(Location(str(root / "nowhere"))) == []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(root))) as server:
        Thread(target=server.serve_forever).start()
        found = files_under(Location(f"http://127.0.0.1:{server.server_port}/PNGImages"))
        server.shutdown()
    assert found == names
