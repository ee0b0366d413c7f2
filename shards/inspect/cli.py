"""`inspect-shards`: what a shard dataset holds, whether it is whole, and how it looks."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from shards.common.errors import UserError
from shards.common.output import print_to_reader
from shards.common.text import columns_of, counted, padded, printable
from shards.format.dataset import Dataset, open_dataset
from shards.format.sample import FLAGS
from shards.inspect.statistics import ClassCounts, ClassLabels, LabelCounts, SplitCounts, count, totals
from shards.storage.location import Location

WIDEST_NAME = 60  # columns; a longer name of a class shifts its own line, and not all others
FLAG_NAMES = {flag: flag.removeprefix("is_").replace("_", "-") for flag in FLAGS}

_EPILOG = """\
examples:
  inspect-shards s3://bucket/prefix
  inspect-shards s3://bucket/prefix --html traffic.html --samples 96
  inspect-shards s3://bucket/prefix --verify
  inspect-shards s3://bucket/prefix --extract 000a1249af2bc5f0 --out look

The counts come from the index. Verified labels and flags are not in it: they are counted in the annotations of
--label-images images of each split, which are chosen by a hash of --seed, and the report says of how many.

exit status: 0, or 1 when --verify found a fault, or 2 with one line that says what was wrong, or 130 when interrupted,
or 141 when the output is not read to its end (| head)
"""


def render(dataset: Dataset, splits: Sequence[SplitCounts]) -> str:
    """The counts as a text that a person reads."""
    lines = [f"{dataset.root}", f"plan {printable(dataset.info.plan[:16]) or 'unknown'}", ""]
    for split in splits:
        lines += [*_split_lines(split), ""]
    gaps = sorted((row for row in totals(splits) if row.box_only), key=lambda row: -row.box_only)
    for row in gaps[:5]:
        objects = row.boxes - row.groups
        name = printable(row.name)
        lines.append(f"{name}: {row.box_only_share:.0%} of objects have a box only ({row.box_only} of {objects})")
    if gaps:
        more = f" Such objects are in {counted(len(gaps) - 5, 'more class', 'more classes')}." if len(gaps) > 5 else ""
        lines.append(
            f"A box only teaches class and box, but no mask; COCO's mask AP counts finding it as an error.{more}"
        )
    lines.append("boxes: all annotations; group-of: regions of several objects, which box only leaves aside")
    return "\n".join(lines)


def _split_lines(split: SplitCounts) -> list[str]:
    where = f"{counted(split.images, 'image')} in {counted(split.shards, 'shard')}"
    lines = [f"{split.split}: {where}, {split.nbytes / 1e6:.1f} MB"]
    if split.sizes is not None:
        (least_w, width, most_w), (least_h, height, most_h) = split.sizes.width, split.sizes.height
        lines.append(
            f"  median {width}x{height} pixels, width {least_w} to {most_w}, height {least_h} to {most_h}, "
            f"{split.sizes.portrait:.0%} upright"
        )
    labels = split.labels
    lines += _class_lines([row for row in split.classes if row.images], labels)
    empty = sum(not row.images for row in split.classes)
    if empty:
        lines.append(f"  (in no image: {counted(empty, 'more class', 'more classes')})")
    if labels is not None:
        flags = ", ".join(f"{labels.flags[flag]} {name}" for flag, name in FLAG_NAMES.items() if labels.flags[flag])
        of = "all images" if labels.images == split.images else f"a random {labels.images} of the {split.images} images"
        lines.append(
            f"  verified as present, as absent: share of {of}; {counted(labels.objects, 'annotation')} in them"
            + (f", {flags}" if flags else "")
        )
    return lines


def _class_lines(rows: Sequence[ClassCounts], labels: LabelCounts | None) -> list[str]:
    """A table of classes, a head and a line a class."""
    table = [["class", "images", "boxes", "masks", "box only", "group-of"]]
    for row in rows:
        table.append([printable(row.name), *map(str, (row.images, row.boxes, row.masks)), _share(row), str(row.groups)])
    if labels is not None:
        table[0] += ["present", "absent"]
        for row, cells in zip(rows, table[1:]):
            told = labels.classes.get(row.id, ClassLabels(0, 0))
            cells += [f"{number / labels.images:.0%}" for number in (told.present, told.absent)]
    columns = min(max([24, *(columns_of(cells[0]) for cells in table)]), WIDEST_NAME)
    return [f"  {padded(name, columns)} {' '.join(f'{cell:>9}' for cell in cells)}" for name, *cells in table]


def _share(row: ClassCounts) -> str:
    return "-" if row.box_only_share is None else f"{row.box_only_share:.0%}"


def to_json(dataset: Dataset, splits: Sequence[SplitCounts]) -> str:
    """The counts for machines."""
    value = {"root": str(dataset.root), "plan": dataset.info.plan, "splits": [asdict(split) for split in splits]}
    return json.dumps(value, indent=2, ensure_ascii=False)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `inspect-shards`."""
    parser = argparse.ArgumentParser(
        prog="inspect-shards",
        description="Tell what a shard dataset holds; or check all of it, show it as a page, take a sample out of it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("root", metavar="URL", help="the dataset: s3://bucket/prefix, a local path, any fsspec URL")
    parser.add_argument("--anonymous", action="store_true", help="do not sign S3 requests (public buckets)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines (counts, or faults of --verify)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify",
        action="store_true",
        help="read everything and check every hash, member, mask and box; each fault is a line",
    )
    what.add_argument("--html", metavar="FILE", help="write one page with the counts and a gallery, for any browser")
    what.add_argument("--extract", nargs="+", metavar="ID", help="write JPEG, JSON and mask PNGs of these images")
    parser.add_argument(
        "--out", default="extracted", metavar="DIR", help="where --extract writes, any URL (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=_count, default=48, metavar="N", help="images in the gallery (default: %(default)s)"
    )
    parser.add_argument(
        "--label-images",
        type=_count,
        default=200,
        metavar="N",
        help="images a split whose annotations are read for the counts; 0: the index alone (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="another seed shows other images (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command `inspect-shards`; returns its exit status."""
    return print_to_reader(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"inspect-shards: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inspect-shards: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    root = Location(arguments.root, anonymous=arguments.anonymous)
    if arguments.verify:
        return _verify(root, as_json=arguments.json)
    dataset = open_dataset(root)
    if arguments.extract:
        return _extract(dataset, arguments.extract, Location(arguments.out))
    splits = count(dataset, label_images=arguments.label_images, seed=arguments.seed)
    if arguments.html:
        return _page(dataset, splits, arguments)
    print(to_json(dataset, splits) if arguments.json else render(dataset, splits))
    return 0


def _verify(root: Location, *, as_json: bool) -> int:
    from tqdm import tqdm

    from shards.inspect.verify import Checked, Verification

    started = time.monotonic()
    verification = Verification(root)
    done, faults = Checked(), []
    with tqdm(total=verification.total, unit="B", unit_scale=True, desc="verifying", disable=None, leave=False) as bar:
        for part in verification.run(bar.update):
            done.add(part)
            faults += part.faults
            if not as_json:
                for fault in part.faults:
                    tqdm.write(str(fault), file=sys.stdout)
                sys.stdout.flush()
    if verification.note:
        print(f"inspect-shards: note: {verification.note}", file=sys.stderr)
    counts = {name: getattr(done, name) for name in ("shards", "samples", "boxes", "masks", "nbytes")}
    if as_json:
        print(json.dumps({"root": str(root), **counts, "faults": [asdict(fault) for fault in faults]}, indent=2))
        return int(bool(faults))
    told = "no fault" if not faults else counted(len(faults), "fault")
    print(
        f"{told}: {counted(done.samples, 'sample')} in {counted(done.shards, 'shard')}, "
        f"{counted(done.boxes, 'box', 'boxes')}, {counted(done.masks, 'mask')}, "
        f"{done.nbytes / 1e6:.1f} MB read in {time.monotonic() - started:.1f} s"
    )
    return int(bool(faults))


def _extract(dataset: Dataset, image_ids: Sequence[str], out: Location) -> int:
    from shards.inspect.extract import extract

    for image_id in image_ids:
        for written in extract(dataset, image_id, out):
            print(written)
    return 0


def _page(dataset: Dataset, splits: Sequence[SplitCounts], arguments: argparse.Namespace) -> int:
    from shards.inspect.html_page import make_page

    page = make_page(dataset, splits, samples=arguments.samples, seed=arguments.seed)
    target = Location(arguments.html)
    target.write(page)
    print(f"{target}: {len(page) / 1e6:.1f} MB")
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


if __name__ == "__main__":
    sys.exit(main())
