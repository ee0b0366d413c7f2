"""The picture of a dataset card: a few samples with their annotations."""

import io
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

from builder.fetching.fetch import Refusal, Request, fetch
from shards.drawing.contact_sheet import fit_rows, join_rows
from shards.drawing.thumbnail import draw_thumbnail
from shards.format.dataset import SPLITS, Category
from shards.format.dataset_card import CardPicture
from shards.format.image import ImageError
from shards.format.index_schema import IndexRow
from shards.format.sample import Sample
from shards.format.shard_tar import parse_members
from shards.storage.location import Location

SAMPLES = 8
WIDTH, HEIGHT = 1200, 240  # pixels of the picture, and about of a row
QUALITY = 85  # of the JPEG


def draw_card_picture(
    rows: Sequence[IndexRow], categories: Sequence[Category], locate: Callable[[str], Location]
) -> CardPicture | None:
    """Draw samples of the first shard, which `locate` finds by its path: a function of the shard's content alone.

    None if Pillow refuses to decode one, such as an image of more pixels than its limit. StorageError if the shard
    cannot be read.
    """
    chosen = choose_rows(rows)
    answers = fetch([Request(locate(row.shard), row.offset, row.offset + row.nbytes) for row in chosen])
    samples = []
    for row, data in zip(chosen, answers, strict=True):
        if isinstance(data, Refusal):  # something deletes there: the build reports it
            return None
        members = parse_members(data, row.image_id, where=row.shard)
        samples.append(Sample.from_members(row.image_id, members, where=row.shard))
    left = iter(samples)
    fitted = fit_rows([(sample.width, sample.height) for sample in samples], WIDTH, HEIGHT)
    try:
        sheet = join_rows([[draw_thumbnail(next(left), size, categories) for size in row] for row in fitted])
    except ImageError:
        return None
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY)
    return CardPicture(buffer.getvalue(), tuple(samples))


def choose_rows(rows: Sequence[IndexRow]) -> list[IndexRow]:
    """Choose rows of the first shard: its classes take turns, and images with a mask of the class come first."""
    shard = min(rows, key=_place).shard
    own = sorted((row for row in rows if row.shard == shard), key=_place)
    queues = [
        sorted((row for row in own if number in row.classes), key=lambda row: not row.masks[row.classes.index(number)])
        for number in sorted({number for row in own for number in row.classes})
    ]
    in_turn = chain(*zip_longest(*queues), own)
    return list({row.image_id: row for row in in_turn if row is not None}.values())[:SAMPLES]


def _place(row: IndexRow) -> tuple[int, str, int]:
    return SPLITS.index(row.split), row.shard, row.offset
