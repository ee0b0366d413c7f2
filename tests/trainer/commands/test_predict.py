import base64
import csv
import io
import json
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from shards.common.errors import UserError
from shards.format.dataset import Category
from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import predict
from trainer.data.collate import IMAGE_FORMATS
from trainer.prediction import image_inputs
from trainer.prediction.image_inputs import check_image_ids, find_images, picture_names, read_image
from trainer.prediction.output_files import submission_labels


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A JPEG, a grey PNG, and a JPEG of the first one's name in another folder."""
    first, second, third = (tmp_path / name for name in ("in/street.jpg", "in/grey.png", "more/street.jpg"))
    for path, number in ((first, 1), (third, 2)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.draw_sample(number).image)
    Image.open(io.BytesIO(tiny.draw_sample(3).image)).convert("L").save(second)
    return [first, second, third]


class Endless(BaseHTTPRequestHandler):
    """Sends bytes without end, or nothing, until the client leaves."""

    def do_GET(self) -> None:
        if "missing" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        with suppress(ConnectionError):
            while "endless" in self.path:
                self.wfile.write(bytes(2**16))
            self.rfile.read(1)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def endless() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def predicted(checkpoint: Path | str, out: Path | Location, *words: object) -> dict[str, Any]:
    """Run the command, and return what is in predictions.json."""
    assert predict.main(["--checkpoint", str(checkpoint), "--out", str(out), *map(str, words)]) == 0
    content: dict[str, Any] = json.loads(Location(f"{out}/predictions.json").read())
    return content


def test_predict_writes_pictures_and_coco_json(
    checkpoint: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    predicted(checkpoint, out, "--score", 0.1, *(image.relative_to(tmp_path) for image in images))
    text = capsys.readouterr().out
    pictures = ["street.jpg", "grey.jpg", "street-2.jpg"]
    assert all(str(out / name) in text for name in [*pictures, "predictions.json"])
    with Image.open(out / "street.jpg") as picture, Image.open(images[0]) as source:
        factor = picture.width // source.width
        assert picture.size == (source.width * factor, source.height * factor)
        assert np.asarray(picture).std() > 5

    coco = COCO(str(out / "predictions.json"))
    expected = list(zip(map(str, images), pictures, strict=True))  # absolute, which FiftyOne finds from anywhere
    assert [(entry["file_name"], entry["picture"]) for entry in coco.dataset["images"]] == expected
    assert [Category(c["id"], c["name"], c["mid"]) for c in coco.dataset["categories"]] == list(tiny.CATEGORIES)
    found = coco.dataset["annotations"]
    assert {a["image_id"] for a in found} == {1, 2, 3}
    for annotation in found:
        info = coco.imgs[annotation["image_id"]]
        assert annotation["segmentation"]["size"] == [info["height"], info["width"]]
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"]
        assert annotation["category_id"] in (1, 2)
        assert 0.1 <= annotation["score"] <= 1
        x, y, w, h = annotation["bbox"]
        assert -0.01 <= x <= x + w <= info["width"] + 0.01
        assert -0.01 <= y <= y + h <= info["height"] + 0.01
    assert coco.loadRes(found).dataset["annotations"]


def test_an_image_that_cannot_be_read_is_skipped_and_a_thin_one_is_not(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, broken, text, thin = (tmp_path / name for name in ("missing.jpg", "broken.jpg", "text.jpg", "thin.png"))
    broken.write_bytes(images[0].read_bytes()[:200])
    text.write_text("not an image")
    Image.new("RGB", (600, 3), "red").save(thin)  # 64 x 0 pixels by torchvision's resize
    sources = [str(place) for place in (missing, broken, text, thin, images[0])]
    assert predict.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), *sources]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"predict: {missing}: there is no such object"
    assert re.match(f"predict: {broken}: .*cannot be decoded", errors[1])
    assert (
        errors[2] == f"predict: {text}: an image of 12 bytes cannot be decoded: not one of {', '.join(IMAGE_FORMATS)}"
    )
    assert len(errors) == 3
    entries = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert [(entry["picture"], entry["width"]) for entry in entries] == [("thin.jpg", 600), ("street.jpg", 72)]
    assert all((tmp_path / "out" / entry["picture"]).exists() for entry in entries)


def test_an_image_is_read_within_limits_of_bytes_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endless: str
) -> None:
    monkeypatch.setattr(image_inputs, "LARGEST", 100_000)
    place = Location(f"memory://{tmp_path.name}/a.jpg")
    for size, local in ((100_000, tmp_path / "a.jpg"), (100_001, tmp_path / "b.jpg")):
        local.write_bytes(bytes(size))
        place.write(bytes(size))
        for name in (str(local), str(place)):
            if size == 100_000:
                assert read_image(name) == bytes(size)
                continue
            with pytest.raises(UserError, match=f"^{name}: it has more than 0 MiB"):
                read_image(name)
    with pytest.raises(UserError, match=r"/endless\.jpg: it has more than 0 MiB"):
        read_image(f"{endless}/endless.jpg")
    with pytest.raises(UserError, match=r"/missing\.jpg: there is no such object"):
        read_image(f"{endless}/missing.jpg")
    monkeypatch.setattr(image_inputs, "TIMEOUT_S", 0.05)
    with pytest.raises(UserError, match=r"/silent\.jpg: it did not arrive within 0 s"):
        read_image(f"{endless}/silent.jpg")


def test_picture_names_are_unique(tmp_path: Path) -> None:
    out = str(tmp_path)
    same = ["a.png", "b/a.jpg", "https://h/x/a.jpeg?size=3", "s3://b/"]
    assert picture_names(same, out) == ["a.jpg", "a-2.jpg", "a-3.jpg", "image.jpg"]
    assert picture_names(["A.png", "a.png"], out) == ["A.jpg", "a-2.jpg"]
    assert picture_names(["s3://b/my%20photo.tar.jpg", "50%.jpg"], out) == ["my photo.tar.jpg", "50%.jpg"]
    # A picture never overwrites its image.
    assert picture_names([f"{out}/a.jpg", f"{out}/a-2.jpg"], out) == ["a-3.jpg", "a-2-2.jpg"]


def test_find_images_in_folders_and_globs(images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in" / "notes.txt").write_text("no image")
    first, second, third = map(str, images)
    folder = sorted([first, second])
    assert find_images([str(tmp_path / "in"), third]) == [*folder, third]
    assert find_images([f"{tmp_path}/in/"]) == folder
    assert find_images([f"{tmp_path}/**/*.jpg"]) == [first, third]
    assert find_images([f"{tmp_path}/in/*"]) == folder
    odd = tmp_path / "in" / "a[1].jpg"
    odd.write_bytes(b"")
    assert find_images([str(odd), "nowhere.jpg"]) == [str(odd), "nowhere.jpg"]
    http = "https://example.org/a.jpg?size=*"
    assert find_images([http]) == [http]
    root = Location(f"memory://{tmp_path.name}/folders")
    for name in ("b.png", "a.jpg", "c.csv"):
        (root / name).write(b"x")
    for asked in (str(root), f"{root}/*"):
        found = find_images([asked])
        assert [name.rsplit("/", 1)[-1] for name in found] == ["a.jpg", "b.png"]
        assert [Location(name).read() for name in found] == [b"x", b"x"]


def test_find_images_returns_each_image_once(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = map(str, images)
    monkeypatch.chdir(tmp_path)
    again = ["in", first, "in/street.jpg", "./more/../in/grey.png", f"file://{first}", "**/*.jpg"]
    assert find_images(again) == [*sorted([first, second]), third]
    assert find_images(["more/street.jpg", third]) == ["more/street.jpg"]
    root = Location(f"memory://{tmp_path.name}")
    (root / "a.jpg").write(b"")
    assert find_images([str(root), str(root / "a.jpg")]) == find_images([str(root)])
    assert len(find_images([first, third, "https://h/a.jpg?n=1", "https://h/a.jpg?n=2"])) == 4
    (tmp_path / "in" / "link.jpg").symlink_to(first)  # another name, and so another ImageID
    assert len(find_images(["in"])) == 3
    check_image_ids(find_images(["in", first]))


def test_images_under_a_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict.main(["--checkpoint", "run", "--out", "out", "a.jpg"]) == 2
    assert "images need a single process" in capsys.readouterr().err


def test_submission(checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, words = tmp_path / "out", ["--submission", "--no-pictures"]
    coco = predicted(checkpoint, out, *words, "--score", 0.1, *images[:2])
    assert read_submission(out / "submission.csv") == submission_of(coco, {1: ["/m/sq"], 2: ["/m/di"]})

    tree = {"LabelName": "/m/all", "Subcategory": [{"LabelName": "/m/sq", "Subcategory": [{"LabelName": "/m/di"}]}]}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    predicted(checkpoint, out, *words, "--score", 0.1, "--hierarchy", tmp_path / "tree.json", *images[:2])
    assert read_submission(out / "submission.csv") == submission_of(coco, {1: ["/m/sq"], 2: ["/m/di", "/m/sq"]})

    # A folder without a detection above the score.
    capsys.readouterr()
    coco = predicted(checkpoint, out, *words, "--score", 1, images[0].parent)
    rows = (out / "submission.csv").read_text().splitlines()
    assert rows == ["ImageID,ImageWidth,ImageHeight,PredictionString", "grey,72,60,", "street,72,60,"]
    assert {path.name for path in out.iterdir()} == {"predictions.json", "submission.csv"}
    assert [sorted(entry) for entry in coco["images"]] == [["file_name", "height", "id", "width"]] * 2
    assert coco["annotations"] == []
    lines = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ["0 objects", "0 objects", "0 objects in 2 images"]

    assert predict.main(["--checkpoint", str(checkpoint), "--out", str(out), *words, *map(str, images)]) == 2
    assert "would both have the ImageID street" in capsys.readouterr().err
    with pytest.raises(UserError, match="class Kite has no MID"):
        submission_labels([Category(3, "Kite", "")], {})


def read_submission(path: Path) -> list[tuple[Any, ...]]:
    """Image, size, label, score and pixels of each object, read as by the Challenge's own evaluation."""
    csv.field_size_limit(2**30)
    objects = []
    for row in csv.DictReader(io.StringIO(path.read_text())):
        size, words = (int(row["ImageWidth"]), int(row["ImageHeight"])), row["PredictionString"].split()
        for label, score, mask in zip(words[::3], words[1::3], words[2::3], strict=True):
            counts = zlib.decompress(base64.b64decode(mask, validate=True))
            pixels = coco_mask.decode({"size": size[::-1], "counts": counts}).tobytes()
            objects.append((row["ImageID"], *size, label, float(score), pixels))
    return objects


def submission_of(coco: dict[str, Any], labels: dict[int, list[str]]) -> list[tuple[Any, ...]]:
    """The expected result of `read_submission`, from predictions.json."""
    images = {one["id"]: (Path(one["file_name"]).stem, one["width"], one["height"]) for one in coco["images"]}
    assert images.keys() == {one["image_id"] for one in coco["annotations"]}
    return [
        (*images[one["image_id"]], label, one["score"], coco_mask.decode(one["segmentation"]).tobytes())
        for one in coco["annotations"]
        for label in labels[one["category_id"]]
    ]
