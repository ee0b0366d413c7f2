"""What a build, a dry run and a retry tell at their end: a table for people, JSON for machines. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from builder.commands.build import Summary
from builder.commands.dry_run import Estimate
from builder.commands.progress import duration
from builder.fetching.traffic import Traffic
from builder.planning.class_report import ClassReport
from shards.common.redact import redact
from shards.common.text import counted
from shards.format.accounts import FILTERED
from shards.format.dataset_card import ClassCounts


def render_summary(summary: Summary, out: str) -> str:
    """The table that ends a build or a retry."""
    out = redact(out)
    after = f"next: inspect-shards {shlex.quote(out)}"
    if summary.already_built:
        built = f"already built: {out} holds exactly this dataset, nothing was done"
        return "\n".join([built, *_short(summary), after])
    lines = _class_table(summary.chosen, summary.counts, packed=True)
    failures = ", ".join(f"{reason} {count}" for reason, count in summary.failures)
    lines.append(f"not packed: {failures} (see accounts.parquet)" if failures else "not packed: nothing")
    if summary.replaced:
        lines.append(f"replaced: {counted(summary.replaced, 'other image')} tried for those that failed")
    if summary.recovered is not None:
        lines.append(_recovered(summary))
    lines += _short(summary)
    resumed = f", {summary.resumed} of them by an earlier run" if summary.resumed else ""
    lines += [
        "",
        *_cost_table(summary.tables, summary.images, summary.masks, "measured"),
        f"{_images_in(summary.samples, summary.shards)}{resumed}, {_size(summary.nbytes)}, in {out}",
        _speed(summary),
        after,
    ]
    return "\n".join(lines)


def render_estimate(found: Estimate, out: str) -> str:
    """The table of a dry run."""
    error = f"+- {_size(found.jpegs_error)}, from the lengths of {found.sampled}"
    if found.unavailable:
        error += f", {found.unavailable} of which cannot be had"
    whole = [
        ("tables", found.whole_tables, "the tables' own sizes"),
        ("images", found.whole_images, "all of these splits, by the published figures"),
        ("masks", found.whole_zips, "the zips that hold any of them"),
    ]
    lines = [
        *_class_table(found.chosen, found.counts, packed=False),
        "",
        *_cost_table(found.tables, found.jpegs, found.masks, "to fetch", jpegs=f"an estimate: {error}"),
        f"of the masks' bytes {_size(found.masks_wanted)} are masks, the others lie between them",
        "",
        f"{'whole downloads':<16} {'bytes':>10}",
        *(f"{name:<16} {_size(size):>10}  {source}" for name, size, source in whole if size is not None),
    ]
    if found.whole_images is None:
        lines.append("images           not known for this source: left out")
    return "\n".join(
        [
            *lines,
            "",
            f"{_images_in(found.images, found.shards)}, about {_size(found.output)}, for {redact(out)}",
            "a dry run: nothing was written there; tables and zip directories were read to make the plan",
        ]
    )


def to_json(result: Summary | Estimate, out: str) -> str:
    """The same for machines: one JSON object. Its keys are the attributes of `Summary` and `Estimate`."""
    value: dict[str, Any] = {"dry_run": isinstance(result, Estimate), "out": redact(out), **asdict(result)}
    if isinstance(result, Summary):
        value["failures"] = dict(result.failures)
    return json.dumps(value, indent=2, allow_nan=False)


def _class_table(chosen: Sequence[ClassReport], counts: Sequence[ClassCounts], *, packed: bool) -> list[str]:
    """Classes that were asked for; of the others, which only --all-annotations keeps, a line with their sums."""
    reports = {(report.split, report.name): report for report in chosen}
    asked = [entry for entry in counts if (entry.split, entry.name) in reports]
    width = max([len("class"), *(len(entry.name) for entry in asked)])
    lines = [f"{'split':<6} {'class':<{width}} {'asked':>7} {'found':>7} {'images':>7} {'masks':>8} {'boxes':>8}"]
    notes = []
    for entry in asked:
        report = reports[entry.split, entry.name]
        lines.append(
            f"{entry.split:<6} {entry.name:<{width}} {report.asked:>7} {report.available:>7} {entry.images:>7} "
            f"{entry.masks:>8} {entry.boxes:>8}"
        )
        if report.reason:
            notes.append(f"{entry.split} {entry.name}: {report.reason}")
    others = [entry for entry in counts if (entry.split, entry.name) not in reports]
    if others:
        boxes, masks = sum(entry.boxes for entry in others), sum(entry.masks for entry in others)
        notes.append(f"of other classes in these images: {counted(masks, 'mask')}, {counted(boxes, 'box', 'boxes')}")
    done = "packed" if packed else "to be packed"
    legend = f"asked: images; found: images at the source that count for the class; images, masks, boxes: {done}"
    return [*lines, legend, *notes]


def _cost_table(tables: Traffic, images: Traffic, masks: Traffic, title: str, jpegs: str = "") -> list[str]:
    rows = [
        ("tables", tables, "and zip directories, as far as they were not cached"),
        ("images", images, jpegs),
        ("masks", masks, ""),
        ("in all", tables + images + masks, ""),
    ]
    lines = [f"{title:<16} {'requests':>10} {'bytes':>10}"]
    return lines + [f"{n:<16} {t.requests:>10} {_size(t.nbytes):>10}  {note}".rstrip() for n, t, note in rows]


def _recovered(summary: Summary) -> str:
    if summary.recovered:
        return f"recovered: {counted(summary.recovered, 'image or mask', 'images and masks')}"
    again = any(reason != FILTERED for reason, _ in summary.failures)
    return "recovered: nothing, what had failed has failed again" if again else "nothing had failed: nothing to recover"


def _short(summary: Summary) -> list[str]:
    return [
        f"short: {f'{short.split} {short.name}'.strip()}: {short.packed} of {short.wanted} (try --retry-failed)"
        for short in summary.shortfalls
    ]


def _speed(summary: Summary) -> str:
    seconds = max(summary.packing, 1e-3)
    rate = (summary.images.nbytes + summary.masks.nbytes) / 1e6 / seconds
    return (
        f"{counted(summary.handled, 'image')} in {duration(summary.packing)} "
        f"({summary.handled / seconds:.1f} images/s, {rate:.1f} MB/s), {duration(summary.seconds)} in all"
    )


def _images_in(images: int, shards: int) -> str:
    return f"{counted(images, 'image')} in {counted(shards, 'shard')}"


def _size(nbytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes:.0f} B"
