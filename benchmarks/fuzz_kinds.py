"""The kinds of inputs of `fuzz.py`: how each is made, changed and tried."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from builder.packing.pack import pack_image
from builder.sources.base import Filters
from builder.sources.coco_instances import parse_instances
from builder.sources.csv_tables import read_table
from builder.sources.listing import ListedSource
from builder.sources.mask_images import MaskImages
from builder.sources.yolo import Yolo
from shards.commands.option_values import YamlError, read_yaml
from shards.common.class_hierarchy import parse_hierarchy
from shards.common.errors import UserError
from shards.drawing.overlay import draw_instances
from shards.format import rle
from shards.format.dataset import Category, open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Instance, Sample, extension_of
from shards.inspect.verify import Verification
from shards.order.epoch_order import EvaluationOrder
from shards.storage.location import Location
from shards.stream.reader import SampleReader
from shards.stream.sample_decoders import parse_sample, read_sample
from trainer.config.settings import Config, DataConfig
from trainer.data.collate import IMAGE_FORMATS, EvalCollate, TrainCollate, decode_image
from trainer.metrics.coco import CocoMetric
from trainer.metrics.confusion import ConfusionMetric
from trainer.metrics.openimages import OpenImagesMetric
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.checkpoint import State, load, load_newest, save
from trainer.model.inference import Detections
from trainer.model.weights import _from_file

CATEGORIES = (Category(1, "Person", "/m/01g317"), Category(2, "Car", "/m/0k4j"))
WIDTH, HEIGHT = 48, 32
HOSTILE: list[Any] = [0, -1, 1, 3, 0.5, 2**31, 2**31 - 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), None, True]
HOSTILE += ["", "x" * 5000, "\ud800", "../../etc", "1", [], {}, [[]], [1] * 1000, {"size": [1, 1], "counts": "1"}]


class Unnoticed(Exception):
    """A changed input was taken for the original, although a checksum covers it."""


def picture(seed: int) -> bytes:
    """Return a small picture, as JPEG or, for every other seed, as PNG."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((WIDTH, HEIGHT)).save(buffer, "PNG" if seed % 2 else "JPEG", quality=80)
    return buffer.getvalue()


def make_sample(seed: int) -> Sample:
    """Return a sample with a mask, a box without one, and a group-of region."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:20, 6:30] = np.random.default_rng(seed).integers(0, 2, (16, 24))
    instances = (
        Instance(1, (6.0, 4.0, 24.0, 16.0), rle.encode(mask), "b0", "/m/01g317", predicted_iou=0.8, area=300.0),
        Instance(2, (10.0, 2.0, 20.0, 25.0), None, "", "/m/0k4j", is_occluded=True),
        Instance(2, (0.0, 0.0, 40.0, 30.0), None, is_group_of=True),
    )
    return Sample(f"{seed:016x}", picture(seed), WIDTH, HEIGHT, instances, verified_present=(1, 2), author="Zoë")


def write_dataset(root: Path) -> None:
    """Write a dataset of a few samples."""
    with DatasetWriter(str(root), classes=CATEGORIES, samples_per_shard=3) as writer:
        for seed in range(6):
            writer.add(make_sample(seed), "train" if seed < 4 else "val")


def change_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, set, remove, repeat, insert or cut off bytes, once to four times."""
    for _ in range(int(rng.integers(1, 5))):
        start = int(rng.integers(0, len(data) + 1))
        stop = min(start + int(rng.choice([1, 2, 8, 64])), len(data))
        noise = rng.bytes(stop - start)
        flipped = bytes(byte ^ 1 << int(rng.integers(8)) for byte in data[start : start + 1])
        parts = [flipped + data[start + 1 : stop], noise, b"", 2 * data[start:stop], noise + data[start:stop]]
        parts += [bytes(stop - start), b"\xff" * (stop - start)]
        data = data[:start] + parts[int(rng.integers(len(parts)))] + data[stop:] if rng.random() < 0.9 else data[:start]
    return data


def change_value(value: Any, rng: np.random.Generator) -> Any:
    """Replace a part of a JSON value, at a random depth, by a hostile one, or remove or repeat it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[int(rng.integers(len(value)))]
        if rng.random() < 0.1:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        changed = change_value(value[place], rng)
        return [*value[:place], *([changed] * int(rng.choice([0, 1, 1, 1, 1, 2]))), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.6:
        return change_bytes(value.encode("utf-8", "surrogatepass"), rng).decode("latin-1")
    if isinstance(value, int | float) and rng.random() < 0.4:
        return value + int(rng.integers(-3, 4))
    return HOSTILE[int(rng.integers(len(HOSTILE)))]


def to_json(value: Any) -> bytes:
    """Return JSON, with NaN and lone surrogates as Python's reader accepts them."""
    return json.dumps(value, separators=(",", ":")).encode()


def is_one_of(rng: np.random.Generator, share: float) -> bool:
    """Return True in a share of the cases."""
    return bool(rng.random() < share)


class Samples:
    """Samples of a shard: through the reader with their checksum, or hostile ones with the right one."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        write_dataset(folder)
        self.dataset = open_dataset(str(folder))
        self.index = self.dataset.index("train")
        self.shard = folder / self.index.shard_paths[0]
        self.whole = self.shard.read_bytes()
        self.original = [self._read(row) for row in range(3)]
        self.collates = TrainCollate(DataConfig(min_size=48, max_size=64), 0, 3), EvalCollate(3)

    def check(self, rng: np.random.Generator) -> None:
        """Try one changed sample."""
        row = int(rng.integers(3))
        if is_one_of(rng, 0.2):
            self.shard.write_bytes(change_bytes(self.whole, rng))
            try:
                if self._read(row) != self.original[row]:
                    raise Unnoticed(f"sample {row} was read with other contents")
            finally:
                self.shard.write_bytes(self.whole)
            return
        members = self.original[row].to_members()
        if is_one_of(rng, 0.15):
            extension = extension_of(self.original[row].image)
            members[extension] = change_bytes(members[extension], rng)
        elif is_one_of(rng, 0.2):
            members["json"] = change_bytes(members["json"], rng)
        else:
            value = json.loads(members["json"])
            for _ in range(int(rng.integers(1, 4))):
                value = change_value(value, rng)
            members["json"] = to_json(value)
        self.use(Sample.from_members(f"{row:016x}", members, where="train/000000.tar"), rng)

    def _read(self, row: int) -> Sample:
        with patch("shards.common.back_off.time.sleep"):  # between the five reads of a damaged sample
            [(_, data)] = SampleReader(self.dataset.root, self.index).read([row])
        return parse_sample(read_sample(data, self.index, row, str(self.dataset.root)))

    def use(self, sample: Sample, rng: np.random.Generator) -> None:
        """Train on, evaluate and draw a sample that was accepted."""
        train, evaluate = self.collates
        train([sample], 0)
        [one] = evaluate([sample], 0).samples
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[5:20, 8:30] = 1
        boxes = np.array([[8, 5, 30, 20], [10, 2, 30, 27]], np.float32)
        encoded = (rle.encode(mask), rle.encode(mask.T.reshape(HEIGHT, WIDTH)))
        found = Detections(boxes, np.array([1, 2]), np.array([0.9, 0.6], np.float32), encoded)
        image = EvaluatedImage(one, found)
        for metric in (CocoMetric(CATEGORIES), OpenImagesMetric(CATEGORIES), ConfusionMetric(CATEGORIES, 0.5)):
            metric.process([image])
            metric.evaluate()
        draw_instances(sample.picture(), sample.instances, CATEGORIES)
        sample.masks()


class Checkpoints:
    """A run with two checkpoints, the newer of which is changed; and its file as starting weights."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.run = Location(str(folder / "run"))
        weights = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}
        optimizer = {
            "state": {0: {"momentum_buffer": torch.ones(3, 4)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        }
        order = {"seed": 0, "batch_size": 2, "index": "abc"}
        for step in (5, 10):
            state = State(step, 2 * step, order, CATEGORIES, Config(), weights, optimizer)
            self.newest = folder / "run" / save(self.run, state, keep=2).path.rpartition("/run/")[2]
        self.files = {path: path.read_bytes() for path in sorted(self.newest.iterdir())}
        self.states = {step: load(self.run / f"checkpoints/step-{step:06d}") for step in (5, 10)}

    def check(self, rng: np.random.Generator) -> None:
        """Try one changed checkpoint."""
        paths = list(self.files)
        state_file = self.newest / "state.json"
        hostile = is_one_of(rng, 0.4)
        path = state_file if hostile else paths[int(rng.integers(len(paths)))]
        try:
            if hostile:
                path.write_bytes(self._signed(rng))
            elif is_one_of(rng, 0.03):
                path.unlink()
            else:
                path.write_bytes(change_bytes(self.files[path], rng))
            try:
                found = load_newest(self.run)
            except UserError as error:
                raise RuntimeError("the checkpoint before it is not used") from error
            if found is None:
                raise RuntimeError("the run would begin again at step 0")
            if not hostile and not _same_state(found[1], self.states[5 if found[1].step == 5 else 10]):
                raise Unnoticed(f"step {found[1].step} was loaded with other values")
            _from_file(Location(str(self.newest / "model.safetensors")))
        finally:
            for path, data in self.files.items():
                path.write_bytes(data)

    def _signed(self, rng: np.random.Generator) -> bytes:
        """Return a state.json of other values; half of them have the right sha256, the others none, as old ones."""
        value = json.loads(self.files[self.newest / "state.json"])
        del value["sha256"]
        for _ in range(int(rng.integers(1, 4))):
            value = change_value(value, rng)
        if isinstance(value, dict) and is_one_of(rng, 0.5):
            text = json.dumps(value, sort_keys=True, separators=(",", ":"))
            value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return to_json(value)


def _same_state(one: State, other: State) -> bool:
    plain, others = (replace(state, weights={}, optimizer=None) for state in (one, other))
    if plain != others or one.weights.keys() != other.weights.keys():
        return False
    if not all(torch.equal(value, other.weights[name]) for name, value in one.weights.items()):
        return False
    return str(one.optimizer) == str(other.optimizer)


class Images:
    """Pictures of every format that is opened, and of some that are not."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((28, 18))
        self.whole = [self._saved(picture, kind) for kind in (*IMAGE_FORMATS, "ICO", "TGA", "EPS")]
        self.whole += [self._saved(picture.convert(mode), "PNG") for mode in ("1", "L", "P", "LA", "RGBA")]
        self.whole += [self._saved(picture.convert(mode), "TIFF") for mode in ("1", "CMYK", "YCbCr", "F")]
        self.whole += [self._saved(picture, "JPEG", progressive=True), self._saved(picture.convert("CMYK"), "JPEG")]
        self.whole += [self._saved(picture, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_deflate")]

    def _saved(self, picture: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    def check(self, rng: np.random.Generator) -> None:
        """Try one changed picture."""
        data = change_bytes(self.whole[int(rng.integers(len(self.whole)))], rng)
        image = decode_image(data, IMAGE_FORMATS)
        if image.dtype != torch.uint8 or image.shape[0] != 3:
            raise TypeError(f"decoded to {image.dtype} {tuple(image.shape)}")


class Tables:
    """The tables of a dataset and of its sources, and files of options."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.root = folder / "data"
        write_dataset(self.root)
        self.files = {
            name: (self.root / name).read_bytes() for name in ("index.parquet", "dataset.json", "accounts.parquet")
        }
        self.table = open_dataset(str(self.root)).table
        self.csv = folder / "table.csv"
        self.kinds: list[Callable[[np.random.Generator], None]] = [
            *[self._dataset] * 6, self._instances, self._hierarchy, self._csv_table, self._yaml, self._own,
        ]  # fmt: skip

    def check(self, rng: np.random.Generator) -> None:
        """Try one changed table."""
        self.kinds[int(rng.integers(len(self.kinds)))](rng)

    def _dataset(self, rng: np.random.Generator) -> None:
        name = list(self.files)[int(rng.integers(3))]
        data, is_signed = change_bytes(self.files[name], rng), is_one_of(rng, 0.7)
        try:
            if name == "dataset.json" and is_one_of(rng, 0.7):
                data = to_json(change_value(json.loads(self.files[name]), rng))
            elif name == "index.parquet" and is_signed:
                value = json.loads(self.files["dataset.json"])
                value["index"]["sha256"] = hashlib.sha256(data).hexdigest()
                (self.root / "dataset.json").write_bytes(to_json(value))
            (self.root / name).write_bytes(data)
            for _ in Verification(Location(str(self.root))).run():
                pass
            self._use(str(self.root))
            if name == "index.parquet" and not is_signed and not open_dataset(str(self.root)).table.equals(self.table):
                raise Unnoticed("the index was read with other contents")
        finally:
            for path, whole in self.files.items():
                (self.root / path).write_bytes(whole)

    def _use(self, root: str) -> None:
        dataset = open_dataset(root)
        for split in dataset.splits:
            index = dataset.index(split)
            for column in ("images", "instances", "masks", "groups"):
                index.counts(column, dataset.categories)
            order = EvaluationOrder(index, 2)
            for position in range(min(len(order), 3)):
                order.rows(position, 0)
            dataset.to_pandas(split)
        dataset.accounts()

    def _instances(self, rng: np.random.Generator) -> None:
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 9.5, "iscrowd": 0}
        value: Any = {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 8, "license": 1}],
            "categories": [{"id": 1, "name": "dog", "supercategory": "animal"}],
            "annotations": [annotation, {**annotation, "id": 2, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
            "licenses": [{"id": 1, "url": "http://example.org"}],
        }
        parse_instances(self._changed(value, rng), "instances.json")

    def _own(self, rng: np.random.Generator) -> None:
        """Read a dataset in Ultralytics' layout, or with PNG masks in a table, one file of which is changed."""
        root = self.root.parent / "own"
        mask = io.BytesIO()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(mask, "PNG")
        files = {
            "images/train/a.jpg": picture(0),
            "data.yaml": b"path: .\ntrain: images/train\nnames: {0: cat, 1: dog}\n",
            "labels/train/a.txt": b"0 0.1 0.1 0.5 0.1 0.5 0.75 0.1 0.75\n1 0.5 0.5 0.25 0.5\n",
            "objects.csv": b"image,class,x,y,width,height,mask\na,cat,,,,,a.png\na,dog,1,2,3.5,4,\n",
            "a.png": mask.getvalue(),
        }
        name = list(files)[int(rng.integers(1, len(files)))]
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(change_bytes(data, rng) if path == name else data)
        place, images = Location(str(root)), Location(str(root / "images/train"))
        if name in ("objects.csv", "a.png"):
            source: ListedSource = MaskImages(images, (("train", place / "objects.csv"),))
        else:
            source = Yolo.open(place / "data.yaml", None)
        split = source.open_split("train", source.taxonomy().choose([]), Filters())
        for image in split.describe(split.candidates()[1].masked).values():
            pack_image(image, files["images/train/a.jpg"], {}, "train")

    def _hierarchy(self, rng: np.random.Generator) -> None:
        leaf = {"LabelName": "/m/c"}
        parse_hierarchy(self._changed({"LabelName": "/m/a", "Subcategory": [leaf], "Part": [leaf]}, rng), "tree.json")

    def _yaml(self, rng: np.random.Generator) -> None:
        text = b"data: {shards: s3://a/b, batch_size: 8}\noptim:\n  lr: 1e-3\n  milestones: &m [1, 2]\nx: *m\n"
        try:
            read_yaml(change_bytes(text, rng))
        except YamlError as error:
            raise UserError(str(error)) from error

    def _csv_table(self, rng: np.random.Generator) -> None:
        lines = b"".join(b"%04x,x click,/m/%c,0.%d\n" % (n, b"abc"[n % 3], n * 7) for n in range(12))
        self.csv.write_bytes(change_bytes(b"ImageID,Source,LabelName,XMin\n" + lines, rng))
        columns = {"ImageID": "string", "LabelName": "string", "XMin": "float64"}
        read_table(Location(str(self.csv)), columns, {"LabelName": pa.array(["/m/a", "/m/b"])})

    def _changed(self, value: Any, rng: np.random.Generator) -> bytes:
        return change_bytes(to_json(value), rng) if is_one_of(rng, 0.3) else to_json(change_value(value, rng))


KINDS: dict[str, Any] = {"checkpoints": Checkpoints, "images": Images, "samples": Samples, "tables": Tables}
