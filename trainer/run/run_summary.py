"""What a finished run says: its length, its best evaluation, where its files are, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from shards.common.redact import redact
from shards.common.text import counted
from shards.storage.location import Location
from trainer.config.settings import DataConfig
from trainer.run.best import best_evaluation


def run_summary(
    run: Location, data: DataConfig, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """Return the summary of a run from the rows of metrics.jsonl and evaluations.jsonl."""
    from shards.format.dataset_card import README_FILE  # not at the top: --help answers without pyarrow

    seconds, images = (sum(row[name] for row in steps) for name in ("seconds", "images"))
    length = f"{counted(len(steps), 'step')}, {counted(images, 'image')} in {timedelta(seconds=round(seconds))}"
    lines = [("finished", f"{length} of training ({images / seconds:.1f} images/s)" if seconds else length)]
    if skipped := sum("skipped" in row for row in steps):
        lines.append(("", f"{counted(skipped, 'step')} skipped, with a loss or gradient that was not finite"))
    if replaced := [bad for row in steps for bad in row.get("replaced", ())]:
        names = ", ".join(f"{bad['image_id']} in {bad['shard']}" for bad in replaced)
        lines.append(("", f"{counted(len(replaced), 'damaged sample')} replaced by neighbours: {names}"))
    weights, card, curves, table, batches, pictures = (
        _shown(run / name) for name in ("best", README_FILE, "curves.png", "metrics.csv", "batches.jpg", "pictures")
    )
    if evaluations:
        best = best_evaluation(evaluations)
        kinds = {"mask": best["segm"]["ap"], "box": best["bbox"]["ap"]}
        scores = " and ".join(f"{kind} AP {100 * ap:.1f} %" for kind, ap in kinds.items() if ap is not None)
        lines.append(("best", f"{scores or 'no AP'} on {best['split']}, after step {best['step']}"))
    else:
        weights = _shown(run)
    lines += [
        ("weights", weights),
        ("card", card),
        ("curves", f"{curves}, {table}"),
        ("pictures", f"{batches}, {pictures}" if evaluations else batches),
        ("next", f"maskstream predict --checkpoint {weights} --out predictions IMAGE ..."),
    ]
    if data.val_split:
        place = f"--data.shards {_shown(data.shards)} --data.split {data.val_split}"
        lines.append(("", f"maskstream evaluate --checkpoint {weights} {place}"))
    return "\n".join(f"{title:<9} {text}" for title, text in lines)


def _shown(place: Location | str) -> str:
    """Return a location as a word for the shell, without credentials."""
    return shlex.quote(redact(str(place)))
