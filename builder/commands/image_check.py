"""A look at a few images of each split before any is packed: a wrong `--images` root ends at once, in one line."""

import random
from collections.abc import Collection, Mapping, Sequence

from builder.fetching.fetch import Refusal, Request, fetch
from builder.planning.plan_build import MIN_TRIED, PlannedBuild
from builder.planning.selection import Quotas
from builder.sources.base import Source
from builder.tasks.plan import PlannedImage
from shards.common.errors import UserError
from shards.common.text import counted
from shards.storage.location import Location

LOOKED_FOR = 256  # of a split of which none of the first `MIN_TRIED` images is there: a mirror may hold only some


def check_images(source: Source, planned: PlannedBuild, *, packed: Collection[str] = ()) -> None:
    """Look for a few images of each split, and for many of a split that seems to have none; one request per image.

    Args:
        packed: splits of which images were packed already; they are not looked at.

    Raises:
        UserError: all splits together, or one of them, have no image at `--images`, or access to all was refused. A
            split of fewer than `MIN_TRIED` images is not judged by itself, nor are the splits of a list of images.
        StorageError: the images cannot be read at all.
    """
    images: dict[str, list[PlannedImage]] = {}
    for task in planned.plan.tasks:
        images.setdefault(task.split, []).extend(task.images)
    lots = random.Random(planned.scope.seed)
    drawn = {
        split: lots.sample(found, min(LOOKED_FOR, len(found))) for split, found in images.items() if split not in packed
    }
    refusals = _look(source, {split: found[:MIN_TRIED] for split, found in drawn.items()})
    more = _look(source, {split: drawn[split][MIN_TRIED:] for split in refusals})
    refusals = {split: refusals[split] | more[split] for split in more}
    if len(refusals) < len(images):
        judged = isinstance(planned.scope.images, Quotas)
        refusals = {split: found for split, found in refusals.items() if judged and len(found) >= MIN_TRIED}
    found = {url: reason for split in refusals for url, reason in refusals[split].items()}
    if len(found) >= MIN_TRIED:
        raise UserError(_nothing_there(source, planned, list(refusals), found))


def _look(source: Source, images: Mapping[str, Sequence[PlannedImage]]) -> dict[str, dict[str, str]]:
    """Return the splits without any of the given images: a dict from URLs to `missing` or `refused` for each."""
    flat = [(split, image.url) for split, found in images.items() for image in found]
    requests = [Request(Location(url, source.images.anonymous)) for _, url in flat]
    answers = fetch(requests, largest=1)  # no image is as short: the answer is "too-large", and its bytes are not read
    refusals: dict[str, dict[str, str]] = {split: {} for split in images}
    for (split, url), answer in zip(flat, answers, strict=True):
        if isinstance(answer, Refusal) and answer.reason in ("missing", "refused"):
            if split in refusals:
                refusals[split][url] = answer.reason
        else:
            refusals.pop(split, None)
    return refusals


def _nothing_there(source: Source, planned: PlannedBuild, splits: Sequence[str], refusals: Mapping[str, str]) -> str:
    """Return the message about images of which none can be read."""
    url = next(iter(refusals))
    count, places = counted(len(refusals), "image"), " and ".join(", ".join(splits).rsplit(", ", 1))
    if "missing" not in refusals.values():
        return (
            f"{source.images}: access was refused to {count} of {places}, which is all that were tried, such as {url}: "
            "check the credentials, or try --anonymous; S3 also refuses missing objects to those who may not list the "
            f"bucket, so check --images as well: the images must be at {source.image_layout}"
        )
    remedy = f"check --images: the images must be at {source.image_layout}"
    if isinstance(planned.scope.images, Quotas):
        if "train" not in splits:
            remedy += "; --eval-per-class 0 packs train only"
        remedy += "; if only some images are there, name them with --images-list"
    return f"{source.images}: none of {count} of {places} is there, such as {url}: {remedy}"
