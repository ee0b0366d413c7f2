"""What became of every image and every mask that was asked for: the rows of `accounts.parquet`."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from shards.common.errors import DatasetError
from shards.format.dataset import ACCOUNTS_SCHEMA, SPLITS

PACKED = "packed"
FILTERED = "mask-filtered"  # the command itself leaves it out: asked for at the source, and not a failure
RECOVERED = "at first "  # begins the detail of what failed in the build and was packed by --retry-failed


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one image or mask: the columns of `shards.format.dataset.ACCOUNTS_SCHEMA`.

    `status` is `packed`, or one of image-missing, image-refused, image-undecodable, image-too-large; mask-missing,
    mask-undecodable, mask-empty, mask-shape; image-failed for the masks of an image that was not packed; and, for what
    the command itself leaves out, mask-filtered.
    """

    kind: str
    split: str
    image_id: str
    box_id: str
    source: str
    status: str
    detail: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells an image or mask from every other of its split."""
        return self.kind, self.image_id, self.source, self.box_id

    @property
    def failed(self) -> bool:
        """Whether it was wanted and could not be had."""
        return self.status not in (PACKED, FILTERED)

    @property
    def failed_at_first(self) -> bool:
        """Whether it failed in the build, though a later retry may have recovered it."""
        return self.failed or self.detail.startswith(RECOVERED)


def failed_images(accounts: Iterable[Account], split: str, *, at_first: bool = False) -> set[str]:
    """The images of a split that failed; with `at_first` also those that were recovered since."""
    images = (account for account in accounts if account.kind == "image" and account.split == split)
    return {account.image_id for account in images if (account.failed_at_first if at_first else account.failed)}


def reasons(accounts: Iterable[Account]) -> dict[str, int]:
    """Reason -> images and masks that were not packed for it, sorted by reason."""
    return dict(sorted(Counter(account.status for account in accounts if account.status != PACKED).items()))


def write_accounts(accounts: Iterable[Account]) -> bytes:
    """The bytes of `accounts.parquet`; the same rows in any order give the same bytes."""
    ordered = sorted(accounts, key=lambda a: (SPLITS.index(a.split), a.image_id, a.kind, a.source, a.box_id))
    columns = {name: [getattr(account, name) for account in ordered] for name in ACCOUNTS_SCHEMA.names}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=ACCOUNTS_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_accounts(data: bytes, where: str) -> list[Account]:
    """The inverse of `write_accounts`; `where` is named in errors.

    Raises:
        DatasetError: not such a table.
    """
    try:
        return [Account(**row) for row in pq.read_table(io.BytesIO(data), schema=ACCOUNTS_SCHEMA).to_pylist()]
    except (pa.ArrowException, TypeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise DatasetError(f"{where}: damaged ({text}): build the dataset again") from error
