"""Rounds: what cannot be had is replaced from the classes' reserves, until quotas are met or the reserves are empty.

Round 0 is the plan. Each further round holds the images that take the place of those that failed so far, as further
shards. A round is a function of the plan and of what failed before it, so a build that was killed finds the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from builder.tasks.plan import PlannedImage, ShardTask, cut_tasks
from shards.format.dataset import SPLITS


class Reserve(Protocol):
    """Where replacements come from; `builder.planning.prepare.Preparation` is one."""

    def replacements(self, split: str, failed: Collection[str]) -> Sequence[PlannedImage]:
        """Further images for a split of which `failed` (image ids, of all rounds so far) could not be had."""
        ...


def next_round(
    reserve: Reserve,
    tasks: Iterable[ShardTask],
    failed: Callable[[str], set[str]],
    images_per_shard: int,
) -> list[ShardTask]:
    """The tasks that replace what failed.

    Args:
        reserve: asked once a split and round, always with all that failed so far.
        tasks: of all rounds so far.
        failed: split -> image ids that failed in any of them.
        images_per_shard: the size of the new shards.
    """
    tasks = list(tasks)
    fresh: list[ShardTask] = []
    for split in SPLITS:
        of_split = [task for task in tasks if task.split == split]
        missing = failed(split) if of_split else set()
        if missing:
            asked = {image.image_id for task in of_split for image in task.images}
            images = [image for image in reserve.replacements(split, missing) if image.image_id not in asked]
            fresh += cut_tasks(split, images, images_per_shard, first=1 + max(task.number for task in of_split))
    return fresh
