"""Reports of a build, a retry and a dry run: tables for people, and JSON for programs."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from builder.commands.build import Summary
from builder.commands.dry_run import Estimate
from builder.fetching.traffic import Traffic
from builder.planning.class_report import MASKS_FROM_BOXES, ClassReport, without_masks
from shards.common.redact import redact_url
from shards.common.tables import text_table
from shards.common.text import counted, duration
from shards.format.accounts import FILTERED
from shards.format.dataset_card import ClassCounts

RETRIABLE = ("image-missing", "image-refused")  # the store may answer otherwise another time; a file stays what it is


def render_summary(summary: Summary, out: str) -> str:
    """Return the report of a build or a retry."""
    out = redact_url(out)
    after = f"next: inspect-shards {shlex.quote(out)}"
    if summary.already_built:
        built = f"already built: {out} contains exactly this dataset; nothing to do"
        return "\n".join([built, *_shortfalls(summary), after])
    failures = ", ".join(f"{reason} {count}" for reason, count in summary.failures)
    lines = [
        *_class_lines(summary.chosen, summary.counts, "packed"),
        f"not packed: {failures} (see accounts.parquet)" if failures else "not packed: nothing",
    ]
    lines += [f"remark: {text} ({count}, see accounts.parquet)" for text, count in summary.remarks]
    if summary.replaced:
        lines.append(f"replaced: {counted(summary.replaced, 'image')} fetched to replace images that failed")
    if summary.recovered is not None:
        lines.append(_recovered(summary))
    resumed = f", {summary.resumed} of them from an earlier run" if summary.resumed else ""
    return "\n".join(
        [
            *lines,
            *_shortfalls(summary),
            "",
            *_traffic_lines("measured", summary.tables, summary.images, summary.masks),
            f"{_images_in(summary.samples, summary.shards)}{resumed}, {_size(summary.nbytes)}, in {out}",
            _speed(summary),
            after,
        ]
    )


def render_estimate(found: Estimate, out: str) -> str:
    """Return the report of a dry run."""
    error = f"+- {_size(found.jpegs_error)}, from the lengths of {counted(found.sampled, 'image')}"
    if found.unavailable:
        error += f", {found.unavailable} of them unavailable"
    mask_bytes = f"{_size(found.masks_wanted)} of the masks' bytes are masks; the others are between them in the zips"
    lines = [
        *_class_lines(found.chosen, found.counts, "to be packed"),
        "",
        *_traffic_lines("to fetch", found.tables, found.jpegs, found.masks, jpegs=f"estimated: {error}"),
        mask_bytes,
        "",
        *text_table(_whole_downloads(found), {"bytes": _size}),
    ]
    if found.whole_images is None:
        lines.append("The size of all images of this source is not known.")
    return "\n".join(
        [
            *lines,
            "",
            f"{_images_in(found.images, found.shards)}, about {_size(found.output)}, for {redact_url(out)}",
            "dry run: only tables and zip directories were read, and nothing was written to --out",
        ]
    )


def to_json(result: Summary | Estimate, out: str) -> str:
    """Return the result as one JSON object, whose keys are the attributes of `Summary` and `Estimate`."""
    value: dict[str, Any] = {"dry_run": isinstance(result, Estimate), "out": redact_url(out), **asdict(result)}
    if isinstance(result, Summary):
        value["failures"] = dict(result.failures)
        value["remarks"] = dict(result.remarks)
    return json.dumps(value, indent=2, allow_nan=False)


def _class_lines(chosen: Sequence[ClassReport], counts: Sequence[ClassCounts], state: str) -> list[str]:
    """Return a table of the requested classes and what is packed of them, with lines on masks, shortages and others."""
    found = {(one.split, one.name): one for one in counts}
    rows = []
    for report in chosen:
        one = found.pop((report.split, report.name), ClassCounts(report.split, report.name, 0, 0, 0, 0))
        rows.append((one.split, one.name, report.asked, report.available, one.images, one.masks, one.boxes))
    columns = ["split", "class", "requested", "available", "images", "masks", "boxes"]
    lines = text_table(pd.DataFrame(rows, columns=columns))
    lines.append(f"requested: images; available: images of the class at the source; images, masks, boxes: {state}")
    lines += [MASKS_FROM_BOXES] if without_masks(chosen) else []
    short: dict[str, list[str]] = {}
    for report in chosen:
        if report.reason:
            short.setdefault(report.split, []).append(f"{report.name} has {report.reason}")
    lines += [f"{split}: {'; '.join(reasons)}" for split, reasons in short.items()]
    packed = {one.split for one in counts}
    for split in dict.fromkeys(report.split for report in chosen if report.split not in packed):
        empty = not any(report.available for report in chosen if report.split == split)
        reason = "the source has no image of these classes for it" if empty else "none of its images could be packed"
        lines.append(f"{split}: no image: {reason}")
    if found:
        masks, boxes = sum(one.masks for one in found.values()), sum(one.boxes for one in found.values())
        lines.append(f"other classes in these images: {counted(masks, 'mask')}, {counted(boxes, 'box', 'boxes')}")
    return lines


def _traffic_lines(title: str, tables: Traffic, images: Traffic, masks: Traffic, jpegs: str = "") -> list[str]:
    """Return a table of requests and bytes."""
    total = tables + images + masks
    rows = [
        ("tables", tables.requests, tables.nbytes, "with zip directories, unless cached"),
        ("images", images.requests, images.nbytes, jpegs),
        ("masks", masks.requests, masks.nbytes, ""),
        ("total", total.requests, total.nbytes, ""),
    ]
    return text_table(pd.DataFrame(rows, columns=[title, "requests", "bytes", ""]), {"bytes": _size})


def _whole_downloads(found: Estimate) -> pd.DataFrame:
    """Return a table of what a download of everything would fetch, as far as it is known."""
    rows = [
        ("tables", found.whole_tables, "sizes of the tables"),
        ("images", found.whole_images, "published sizes of all images of these splits"),
        ("masks", found.whole_zips, "zips that contain any of these masks"),
    ]
    known = [row for row in rows if row[1] is not None]
    return pd.DataFrame(known, columns=["whole downloads", "bytes", ""])


def _recovered(summary: Summary) -> str:
    if summary.recovered:
        return f"recovered: {counted(summary.recovered, 'image or mask', 'images and masks')}"
    if any(reason != FILTERED for reason, _ in summary.failures):
        return "recovered: nothing, because the same images and masks failed again"
    return "recovered: nothing had failed"


def _shortfalls(summary: Summary) -> list[str]:
    may_help = summary.recovered is None and any(reason in RETRIABLE for reason, _ in summary.failures)
    hint = "try --retry-failed" if may_help else "accounts.parquet has the reasons"
    return [
        f"short: {f'{short.split} {short.name}'.strip()}: {short.packed} of {short.wanted} ({hint})"
        for short in summary.shortfalls
    ]


def _speed(summary: Summary) -> str:
    seconds = max(summary.packing, 1e-3)
    rate = (summary.images.nbytes + summary.masks.nbytes) / 1e6 / seconds
    return (
        f"{counted(summary.handled, 'image')} in {duration(summary.packing)} "
        f"({summary.handled / seconds:.1f} images/s, {rate:.1f} MB/s), {duration(summary.seconds)} in total"
    )


def _images_in(images: int, shards: int) -> str:
    return f"{counted(images, 'image')} in {counted(shards, 'shard')}"


def _size(nbytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} B"
