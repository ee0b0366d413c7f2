"""The command `inspect-shards`: count, verify and show a shard dataset, or extract samples."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from shards.common.errors import UserError
from shards.common.output import print_to_reader
from shards.common.text import counted, printable

if TYPE_CHECKING:
    from shards.format.dataset import Dataset
    from shards.inspect.statistics import SplitCounts
    from shards.storage.location import Location

_EPILOG = """\
examples:
  inspect-shards s3://bucket/prefix
  inspect-shards s3://bucket/prefix --html traffic.html --samples 96
  inspect-shards s3://bucket/prefix --verify
  inspect-shards s3://bucket/prefix --extract 000a1249af2bc5f0 --out look

The counts come from the index. Verified labels and flags are not in the index: they are counted in the annotations of
--label-images images per split, chosen by a hash of --seed, and the report says how many these are.

exit status: 0; 1 if --verify finds a fault; 2 with a one-line error; 130 if interrupted; 141 if the output is not read
to its end (| head)
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `inspect-shards`."""
    parser = argparse.ArgumentParser(
        prog="inspect-shards",
        description="Count a shard dataset by split and class, verify it, show it as a page, or extract samples.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("root", metavar="URL", help="the dataset: s3://bucket/prefix, a local path, any fsspec URL")
    parser.add_argument("--anonymous", action="store_true", help="do not sign S3 requests (public buckets)")
    parser.add_argument("--json", action="store_true", help="print the counts, or the faults of --verify, as JSON")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--verify",
        action="store_true",
        help="read all shards and check every hash, member, mask and box; print one line per fault",
    )
    action.add_argument("--html", metavar="FILE", help="write one HTML page with the counts and a gallery of samples")
    action.add_argument("--extract", nargs="+", metavar="ID", help="write the JPEG, JSON and mask PNGs of these images")
    parser.add_argument(
        "--out",
        default="extracted",
        metavar="DIR",
        help="folder or URL that --extract writes to (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=_count, default=48, metavar="N", help="number of images in the gallery (default: %(default)s)"
    )
    parser.add_argument(
        "--label-images",
        type=_count,
        default=200,
        metavar="N",
        help="images per split whose annotations are read; 0 reads the index only (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="seed of the choice of images (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `inspect-shards` and return its exit status."""
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
    # Not at the top: --help answers without pyarrow, whose import takes longer than all else.
    from shards.format.dataset import open_dataset
    from shards.inspect.statistics import count
    from shards.storage.location import Location

    root = Location(arguments.root, anonymous=arguments.anonymous)
    if arguments.verify:
        return _verify(root, as_json=arguments.json)
    dataset = open_dataset(root)
    if arguments.extract:
        return _extract(dataset, arguments.extract, Location(arguments.out))
    splits = count(dataset, label_images=arguments.label_images, seed=arguments.seed)
    if arguments.html:
        return _write_page(dataset, splits, arguments)

    from shards.inspect.text_report import json_report, text_report

    print(json_report(dataset, splits) if arguments.json else text_report(dataset, splits))
    return 0


def _verify(root: Location, *, as_json: bool) -> int:
    from tqdm import tqdm

    from shards.inspect.shard_check import Checked
    from shards.inspect.verify import Verification

    started = time.monotonic()
    verification, checked = Verification(root), Checked()
    with tqdm(total=verification.total, unit="B", unit_scale=True, desc="verifying", disable=None, leave=False) as bar:
        for part in verification.run(bar.update):
            checked.add(part)
            if not as_json:
                for fault in part.faults:
                    tqdm.write(str(fault), file=sys.stdout)
                sys.stdout.flush()
    if verification.note:
        print(f"inspect-shards: note: {verification.note}", file=sys.stderr)
    if as_json:
        print(json.dumps({"root": str(root), **asdict(checked)}, indent=2))
    else:
        print(
            f"{counted(len(checked.faults), 'fault') if checked.faults else 'no fault'}: "
            f"{counted(checked.samples, 'sample')} in {counted(checked.shards, 'shard')}, "
            f"{counted(checked.boxes, 'box', 'boxes')}, {counted(checked.masks, 'mask')}, "
            f"{checked.nbytes / 1e6:.1f} MB read in {time.monotonic() - started:.1f} s"
        )
    return 1 if checked.faults else 0


def _extract(dataset: Dataset, image_ids: Sequence[str], out: Location) -> int:
    from shards.inspect.extract import extract

    for image_id in image_ids:
        for written in extract(dataset, image_id, out):
            print(written)
    return 0


def _write_page(dataset: Dataset, splits: Sequence[SplitCounts], arguments: argparse.Namespace) -> int:
    from shards.inspect.html_page import make_page
    from shards.storage.location import Location

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
