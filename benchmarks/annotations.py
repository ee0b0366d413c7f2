"""Time and memory to read the annotation tables of a whole train split, with and without the cache.

    python benchmarks/annotations.py               # full size: about 4 GB in a temporary folder, some minutes
    python benchmarks/annotations.py --scale 0.1

Writes seeded tables with the row counts of Open Images' train split and values of the same lengths and frequencies (a
quarter of the boxes are of a Person or its children) to a temporary folder on disk, and deletes them afterwards. Each
line of the Markdown table that it prints was measured in a process of its own: its time, and its peak resident memory
with everything imported (VmHWM). The reference is `pandas.read_csv` with the same columns of the same tables, one after
the other, without filters; no table is kept. Its memory grows with the rows; `--peer-rows` limits them on a small
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

sys.path.insert(0, str(Path(__file__).parents[1]))

IMAGES, BOXES, MASKS, LABELS = 1_743_042, 14_610_229, 2_686_666, 8_996_795
CHUNK = 500_000
# Shares of the boxes of the train split by label; the rest is distributed over 590 labels by Zipf's law.
SHARES = {
    "/m/04yx4": 0.097,  # Man
    "/m/01g317": 0.071,  # Person
    "/m/03bt1vf": 0.053,  # Woman
    "/m/05r655": 0.010,  # Girl
    "/m/01bl7v": 0.005,  # Boy
    "/m/0k4j": 0.017,  # Car
    "/m/015qff": 0.003,  # Traffic light
    "/m/01mqdt": 0.0015,  # Traffic sign
}
HIERARCHY = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": "/m/01g317", "Subcategory": [{"LabelName": m} for m in list(SHARES)[:5] if m != "/m/01g317"]},
        *({"LabelName": mid} for mid in list(SHARES)[5:]),
    ],
}
NAMES = dict(zip(SHARES, ("Man", "Person", "Woman", "Girl", "Boy", "Car", "Traffic light", "Traffic sign")))
STEPS = {
    "first": "first build: four CSVs and 16 zip directories are read and cached",
    "cached": "later build: everything is read from the cache",
    "joined": "the same with `--drop depiction`: every mask of the classes is joined to its box",
    "peer": "`pandas.read_csv(usecols=…)` of the four CSVs",
}
CLASSES = ("Person", "Car", "Traffic light", "Traffic sign")


def main() -> None:
    """Write the tables, measure each step and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows to write [%(default)s]")
    parser.add_argument("--peer-rows", type=int, help="read at most this many rows per table with pandas [all]")
    parser.add_argument("--per-class", type=int, default=1000, help="images to choose per class [%(default)s]")
    parser.add_argument("--folder", help="where to create the temporary folder [the system's default]")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options)))
        return
    with tempfile.TemporaryDirectory(prefix="maskstream-annotations-", dir=options.folder) as folder:
        started = time.monotonic()
        Tables(Path(folder), options.scale).write()
        print(f"tables written in {time.monotonic() - started:.0f} s", file=sys.stderr)
        results = [in_a_child(what, folder, options) for what in STEPS]
        print(render(results, options, folder))


class Tables:
    """A mirror of Open Images' annotations under `root`."""

    def __init__(self, root: Path, scale: float) -> None:
        self.root, self.scale = root, scale
        self.rng = np.random.default_rng(1)
        numbers = np.arange(self.scaled(IMAGES), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.ids = pa.array(np.char.mod("%016x", numbers).tolist(), pa.string())
        rest = 1 / np.arange(1, 591)
        shares = [*SHARES.values(), *(rest / rest.sum() * (1 - sum(SHARES.values())))]
        self.labels = pa.array([*SHARES, *(f"/m/0{number:04x}" for number in range(590))])
        self.cumulative = np.cumsum(shares)
        # 54 % of the images have masks; there, four boxes in ten have one.
        self.with_masks = self.rng.random(len(self.ids)) < 0.54

    def scaled(self, rows: int) -> int:
        """Return the number of rows to write instead of `rows`."""
        return max(1, round(rows * self.scale))

    def write(self) -> None:
        """Write all tables, zips and class names."""
        from builder.sources.openimages.layout import Layout
        from shards.storage.location import Location

        source = Layout(Location(str(self.root)), Location(str(self.root)))
        self.write_boxes_and_masks(source)
        self.write_labels(source)
        self.write_metadata(source)
        source.class_names.write("\n".join(f"{mid},{name}" for mid, name in NAMES.items()).encode())
        source.hierarchy.write(json.dumps(HIERARCHY).encode())
        first = Path(source.mask_zip("train", "0").path)
        self.write_zip(first)
        for digit in "123456789abcdef":  # 16 directories of the right length; their names do not matter
            os.link(first, source.mask_zip("train", digit).path)

    def images_of(self, rows: int) -> Iterator[np.ndarray]:
        """Yield chunks of ascending image numbers; all images have about the same number of rows."""
        for start in range(0, rows, CHUNK):
            positions = np.arange(start, min(start + CHUNK, rows))
            yield (positions + self.rng.random(len(positions)) * 3).astype(np.int64) * len(self.ids) // (rows + 3)

    def label_numbers(self, rows: int) -> np.ndarray:
        """Draw labels: int [rows]."""
        return np.searchsorted(self.cumulative, self.rng.random(rows)).clip(max=len(self.labels) - 1)

    def write_boxes_and_masks(self, source: Any) -> None:
        """Write the box table, and the mask table with some of its rows."""
        boxes, masks = writer_to(source.boxes("train")), writer_to(source.masks("train"))
        with boxes as write_boxes, masks as write_masks:
            for image in self.images_of(self.scaled(BOXES)):
                label = self.label_numbers(len(image))
                x1, y1 = self.rng.random((2, len(image))) * 0.7
                x2, y2 = x1 + 0.02 + self.rng.random(len(image)) * 0.28, y1 + 0.02 + self.rng.random(len(image)) * 0.28
                corners = [np.round(side, 6) for side in (x1, x2, y1, y2)]
                write_boxes(self.box_rows(image, label, corners))
                chosen = self.with_masks[image] & (self.rng.random(len(image)) < 0.34)
                write_masks(self.mask_rows(image[chosen], label[chosen], [side[chosen] for side in corners]))

    def box_rows(self, image: np.ndarray, label: np.ndarray, corners: list[np.ndarray]) -> pa.Table:
        """Return rows of the box table with all its columns."""
        rows = len(image)
        columns: dict[str, Any] = {
            "ImageID": self.ids.take(pa.array(image)),
            "Source": pa.repeat("xclick", rows),
            "LabelName": self.labels.take(pa.array(label)),
            "Confidence": pa.repeat(1, rows),
            **dict(zip(("XMin", "XMax", "YMin", "YMax"), corners)),
        }
        for name, share in zip(("Occluded", "Truncated", "GroupOf", "Depiction", "Inside"), (0.6, 0.2, 0.06, 0.05, 0)):
            columns[f"Is{name}"] = (self.rng.random(rows) < share).astype(np.int8)
        for number in range(8):
            columns[f"XClick{number % 4 + 1}{'XY'[number // 4]}"] = corners[number % 4]
        return pa.table(columns)

    def mask_rows(self, image: np.ndarray, label: np.ndarray, corners: list[np.ndarray]) -> pa.Table:
        """Return rows of the mask table with all its columns."""
        rows = len(image)
        ids, labels = self.ids.take(pa.array(image)), self.labels.take(pa.array(label))
        box_ids = pa.array(np.char.mod("%08x", self.rng.integers(0, 1 << 32, rows)).tolist())
        mids = pc.replace_substring(labels, "/", "")
        clicks = np.round(self.rng.random(4096), 5).tolist()
        texts = pa.array(
            [";".join(f"{clicks[(i * 7 + j) % 4096]:.5f} 0.50000 1" for j in range(8)) for i in range(997)]
        )
        columns: dict[str, Any] = {
            "MaskPath": pc.binary_join_element_wise(ids, mids, pc.binary_join_element_wise(box_ids, ".png", ""), "_"),
            "ImageID": ids,
            "LabelName": labels,
            "BoxID": box_ids,
            **dict(zip(("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"), corners)),
            "PredictedIoU": np.round(self.rng.random(rows), 5),
            "Clicks": texts.take(pa.array(self.rng.integers(0, len(texts), rows))),
        }
        return pa.table(columns)

    def write_labels(self, source: Any) -> None:
        """Write the table of verified labels."""
        with writer_to(source.labels("train")) as write:
            for image in self.images_of(self.scaled(LABELS)):
                columns = {
                    "ImageID": self.ids.take(pa.array(image)),
                    "Source": pa.repeat("verification", len(image)),
                    "LabelName": self.labels.take(pa.array(self.label_numbers(len(image)))),
                    "Confidence": (self.rng.random(len(image)) < 0.55).astype(np.int8),
                }
                write(pa.table(columns))

    def write_metadata(self, source: Any) -> None:
        """Write the table of licences, authors and URLs."""
        with writer_to(source.metadata("train"), quoted=True) as write:
            for start in range(0, len(self.ids), CHUNK):
                ids = self.ids.slice(start, CHUNK)
                digits = np.char.mod("%010d", self.rng.integers(0, 10**10, len(ids)))
                texts = pa.array(digits.tolist())
                authors = pc.utf8_slice_codeunits(texts, 0, 5)
                columns: dict[str, Any] = {
                    "ImageID": ids,
                    "Subset": pa.repeat("train", len(ids)),
                    "OriginalURL": joined("https://c4.staticflickr.com/4/3210/", texts, "_1f0f5a8a70_o.jpg"),
                    "OriginalLandingURL": joined("https://www.flickr.com/photos/dead/", texts, ""),
                    "License": pa.repeat("https://creativecommons.org/licenses/by/2.0/", len(ids)),
                    "AuthorProfileURL": joined("https://www.flickr.com/people/", authors, "/"),
                    "Author": joined("Author ", authors, ""),
                    "Title": joined("A title, of some length ", texts, ""),
                    "OriginalSize": self.rng.integers(10**5, 10**7, len(ids)),
                    "OriginalMD5": joined("", texts, "kGFVFvTAWw=="),
                    "Thumbnail300KURL": joined("https://c1.staticflickr.com/4/3210/", texts, "_9a1b2c3d4e_z.jpg"),
                    "Rotation": pa.repeat(0.0, len(ids)),
                }
                write(pa.table(columns))

    def write_zip(self, path: Path) -> None:
        """Write a zip of small members, of which only the directory is read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for _ in range(self.scaled(MASKS // 16)):
                name = f"{self.rng.bytes(8).hex()}_m04yx4_{self.rng.bytes(4).hex()}.png"
                archive.writestr(name, self.rng.bytes(int(self.rng.integers(8, 40))))


def joined(before: str, texts: pa.Array, after: str) -> pa.Array:
    """Return the texts with a prefix and a suffix."""
    return pc.binary_join_element_wise(before, texts, after, "")


@contextmanager
def writer_to(location: Any, *, quoted: bool = False) -> Iterator[Callable[[pa.Table], None]]:
    """Yield a function that appends rows to a CSV in the style of Open Images."""
    path = Path(location.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    with open(path, "wb") as file:

        def write(rows: pa.Table) -> None:
            if not written:
                file.write((",".join(rows.column_names) + "\n").encode())
                written.append("header")
            style = "needed" if quoted else "none"
            csv.write_csv(rows, file, csv.WriteOptions(include_header=False, quoting_style=style))

        yield write


def in_a_child(what: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a step in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, folder, "--per-class", str(options.per_class)]
    if options.peer_rows is not None:
        command += ["--peer-rows", str(options.peer_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{what}: {done.stdout.strip()}", file=sys.stderr)
    return {"what": what, **json.loads(done.stdout)}


def measure(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds, the peak memory in bytes and the result of a step."""
    work = measure_peer if what == "peer" else measure_builder
    started, busy = time.perf_counter(), time.process_time()
    rows = work(what, folder, options)
    spent = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - busy}
    return {**spent, "peak": peak_bytes(), "result": rows}


def measure_builder(what: str, folder: Path, options: argparse.Namespace) -> str:
    """Choose and describe images as `builder.planning.plan_build` does for a train split."""
    from builder.fetching.table_cache import Cache
    from builder.planning.selection import select_images
    from builder.sources.base import Filters
    from builder.sources.openimages.source import OpenImages
    from shards.storage.location import Location

    root = Location(str(folder))
    source = OpenImages(root, root, Cache(str(folder / "cache")))
    filters = Filters(drop=("depiction",)) if what == "joined" else Filters()
    split = source.open_split("train", source.taxonomy().choose(CLASSES), filters)
    candidates = split.candidates()
    chosen = select_images(candidates, options.per_class, 0)
    planned = split.describe(chosen)
    objects = sum(len(image.objects) for image in planned.values())
    return f"{sum(map(len, candidates.values()))} candidates, {len(planned)} images, {objects} objects"


def measure_peer(what: str, folder: Path, options: argparse.Namespace) -> str:
    """Read the same columns of the same tables with pandas."""
    import pandas as pd

    from builder.sources.openimages import layout
    from shards.storage.location import Location

    source, rows = layout.Layout(Location(str(folder)), Location(str(folder))), 0
    for location, columns in (
        (source.masks("train"), layout.MASK_COLUMNS),
        (source.boxes("train"), layout.BOX_COLUMNS),
        (source.labels("train"), layout.LABEL_COLUMNS),
        (source.metadata("train"), layout.METADATA_COLUMNS),
    ):
        rows += len(pd.read_csv(location.path, usecols=list(columns), nrows=options.peer_rows))
    return f"{rows} rows"


def peak_bytes() -> int:
    """Return the peak resident memory of this process (`ru_maxrss` includes the parent's)."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def render(results: list[dict[str, Any]], options: argparse.Namespace, folder: str) -> str:
    """Return Markdown: machine, sizes, and one line per process."""
    peer = next(result for result in results if result["what"] == "peer")
    csvs = sum(path.stat().st_size for path in Path(folder).rglob("*.csv"))
    tables = sum(path.stat().st_size for path in Path(folder).glob("cache/*.csv-*"))
    zips = sum(path.stat().st_size for path in Path(folder).glob("cache/*.zip-*"))
    lines = [
        f"{machine()}; {round(BOXES * options.scale):,} boxes, about {round(MASKS * options.scale):,} masks, "
        f"{round(LABELS * options.scale):,} verified labels, {round(IMAGES * options.scale):,} images: "
        f"{csvs / 1e6:,.0f} MB of CSV on a local disk; {options.per_class} images per class of {', '.join(CLASSES)}.",
        f"The cache takes {(tables + zips) / 1e6:.0f} MB ({tables / 1e6:.0f} for tables, {zips / 1e6:.0f} for zips).",
        "",
        "| | seconds | to pandas | CPU seconds | peak memory, MiB | to pandas |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lines.append(
            f"| {STEPS[result['what']]} | {result['seconds']:.1f} | {result['seconds'] / peer['seconds']:.2f} "
            f"| {result['cpu']:.1f} | {result['peak'] / 2**20:.0f} | {result['peak'] / peer['peak']:.2f} |"
        )
    if options.peer_rows is not None:
        lines.append(f"\npandas read only the first {options.peer_rows:,} rows of each table.")
    return "\n".join(lines)


def machine() -> str:
    """Return the number and model of the processor's cores."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
