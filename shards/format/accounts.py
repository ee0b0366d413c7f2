"""The rows of `accounts.parquet`: what became of every image and every mask that was requested."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from shards.format.dataset import ACCOUNTS_SCHEMA, SPLITS, accounts_table
from shards.format.index_schema import parquet_bytes

PACKED = "packed"
FILTERED = "mask-filtered"  # left out by the command's own filters: requested at the source, and not a failure
UNKNOWN = "image-unknown"  # listed, but not at the source
RECOVERED = "at first "  # prefix of the detail of what failed in the build and was packed by --retry-failed

# Remarks in the detail of what was packed, one after another with `; ` between them.
TURNED = "annotations turned to the stored pixels, as the EXIF orientation says"
BOX_FROM_MASK = "box taken from the mask, which is mostly outside the source's box"
PARTS_LEFT_OUT = "parts of the mask that are no polygons left out"
EXIF_IGNORED = "EXIF orientation ignored: check whether the annotations are for the picture as stored"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one image or mask; the columns of `ACCOUNTS_SCHEMA`.

    `kind` is image or mask, `box_id` "" for an image, `source` the name of the file at the source. `status` is
    `packed`, or one of image-unknown, image-missing, image-refused, image-undecodable, image-too-large, image-shape;
    mask-missing, mask-undecodable, mask-empty, mask-shape; image-failed for the masks of an image that was not packed;
    and mask-filtered for what the command itself leaves out.
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
        """What identifies an image or mask within its split."""
        return self.kind, self.image_id, "" if self.kind == "image" else self.source, self.box_id

    @property
    def failed(self) -> bool:
        """Whether it was wanted and could not be packed."""
        return self.status not in (PACKED, FILTERED)


def failed_images(accounts: Iterable[Account], split: str, *, at_first: bool = False) -> set[str]:
    """Return the images of a split that failed; with `at_first` also those that were recovered since."""
    images = (account for account in accounts if account.kind == "image" and account.split == split)
    return {one.image_id for one in images if one.failed or (at_first and one.detail.startswith(RECOVERED))}


def reasons(accounts: Iterable[Account]) -> dict[str, int]:
    """Count the images and masks that were not packed by reason, sorted by reason."""
    return dict(sorted(Counter(account.status for account in accounts if account.status != PACKED).items()))


def remarks(accounts: Iterable[Account]) -> dict[str, int]:
    """Count the remarks on images and masks that were packed, sorted by text."""
    details = (one.detail.split("; ") for one in accounts if one.status == PACKED and one.detail)
    found = Counter(text for texts in details for text in texts if not text.startswith(RECOVERED))
    return dict(sorted(found.items()))


def write_accounts(accounts: Iterable[Account]) -> bytes:
    """Return the bytes of `accounts.parquet`; the same rows in any order give the same bytes."""
    ordered = sorted(accounts, key=lambda a: (SPLITS.index(a.split), a.image_id, a.kind, a.source, a.box_id))
    return parquet_bytes(ordered, ACCOUNTS_SCHEMA)


def read_accounts(data: bytes, where: str) -> list[Account]:
    """Parse the bytes of `accounts.parquet`; a DatasetError that names `where` if they are not such a table."""
    return [Account(**row) for row in accounts_table(data, where).to_pylist()]
