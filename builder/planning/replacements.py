"""Rounds of a build: images that fail are replaced until the quotas are met or no candidates are left.

Round 0 is the plan. Each further round packs replacements of the images that have failed so far into further shards. A
round depends on nothing but the plan and the failures before it, so a resumed build repeats the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from builder.tasks.plan import PlannedImage, ShardTask, cut_tasks
from shards.format.dataset import SPLITS


def next_round(
    replacements: Callable[[str, Collection[str]], Sequence[PlannedImage]],
    tasks: Iterable[ShardTask],
    failed: Callable[[str], set[str]],
    images_per_shard: int,
) -> list[ShardTask]:
    """Return the tasks that replace failed images.

    Args:
        replacements: returns further images for a split, given its failures so far; called once per split and round.
        tasks: tasks of all rounds so far.
        failed: split -> image ids that failed in any of these tasks.
        images_per_shard: images per new shard.
    """
    tasks = list(tasks)
    fresh: list[ShardTask] = []
    for split in SPLITS:
        of_split = [task for task in tasks if task.split == split]
        missing = failed(split) if of_split else set()
        if missing:
            requested = {image.image_id for task in of_split for image in task.images}
            images = [image for image in replacements(split, missing) if image.image_id not in requested]
            fresh += cut_tasks(split, images, images_per_shard, first=1 + max(task.number for task in of_split))
    return fresh
