"""A dataset that `fill` writes: its shards one by one, and at the end the tables that finish it.

    <out>/.fill/plan.json             an unfinished dataset: what determines it
          .fill/shard-00003.json      a shard that is done: its entry, its index rows, and what was predicted

The plan in `dataset.json` is a key: a hash of everything that determines the bytes. A folder with another key is
refused, so that shards of two runs are never mixed. A finished dataset has no `.fill`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from shards.common.errors import DatasetError, UserError
from shards.common.redact import redact_values
from shards.common.text import counted, shown
from shards.format.dataset import ACCOUNTS_FILE, DATASET_FILE, SPLITS, Dataset, DatasetInfo, Shard, read_value
from shards.format.dataset_card import PICTURE_FILE, README_FILE, features
from shards.format.dataset_writer import finish_dataset
from shards.format.index_schema import IndexRow
from shards.format.sample import canonical_json
from shards.format.shard_tar import PackedShard
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from shards.storage.reads import Read, read_many
from shards.storage.retry import delete, retrying, write
from trainer.model.checkpoint import names_in, numbers_in
from trainer.prediction.box_objects import Tally

RECORDS = ".fill"
PLAN_FILE = "plan.json"
ORIGIN = "filled"  # the entry of `source` in dataset.json
HEADING = "## Predicted masks"
_SECTION = """\
`maskstream fill` predicted {masks} of {boxes} with a box only in {splits}, with the run `{run}`. Their mean score is
{score:.2f}. They are not counted above: in the annotations they have `mask_source` "predicted", `mask_score` (0 to 1)
and `mask_run`. Images and all other annotations are unchanged. With the predicted masks, the shards have
{megabytes:.1f} MB.
"""


class _Record(NamedTuple):
    """A shard that is done: its entry and rows, and what was predicted in it."""

    shard: Shard
    rows: Sequence[IndexRow]
    tally: Tally

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> _Record:
        """Return a record from JSON, in which class ids are texts."""
        tally = value["tally"]
        masks = Counter({int(number): count for number, count in tally["masks"].items()})
        rows = [IndexRow.from_values(row) for row in value["rows"]]
        return cls(Shard(**value["shard"]), rows, Tally(tally["boxes"], masks, tally["score"]))


@dataclass(frozen=True)
class FilledDataset:
    """The dataset that is being written to `out`, with masks predicted in some splits of `source`.

    Attributes:
        key: hash of what determines the bytes.
        splits: in which masks are predicted; the shards of the others are copied.
        about: what the hash is made of, for messages and for `dataset.json`; JSON-serialisable, without credentials.
    """

    source: Dataset
    out: Location
    key: str
    splits: tuple[str, ...]
    about: dict[str, Any]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of the source, which are those of the result by path."""
        return self.source.info.shards

    def claim(self) -> None:
        """Mark the folder as this dataset's; UserError if something else is in it."""
        found = [name for name in (DATASET_FILE, *SPLITS) if retrying((self.out / name).exists)]
        if DATASET_FILE in found:
            info = DatasetInfo.from_json(read_value(self.out), str(self.out / DATASET_FILE))
            if info.plan != self.key:
                raise self._refusal("dataset", info.source.get(ORIGIN))
            self._clean_up()  # what a process left that was killed after it wrote dataset.json
            return
        place = self.out / RECORDS / PLAN_FILE
        if retrying(place.exists):
            try:
                plan = json.loads(retrying(place.read))
                before, key = plan["about"], plan["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{place}: damaged ({error!r}): delete {self.out} and start again") from error
            if key != self.key:
                raise self._refusal("unfinished dataset", before)
        elif found:
            raise UserError(f"{self.out}: contains parts of another dataset: choose another --out")
        else:
            write(place, canonical_json({"key": self.key, "about": self.about}))

    def _refusal(self, what: str, before: Any) -> UserError:
        if not isinstance(before, Mapping):
            return UserError(f"{self.out}: contains another {what}: choose another --out")
        differ = [name for name in self.about if before.get(name) != self.about[name]]
        why = "other weights or another state of the dataset"
        if differ:
            why = f"{differ[0]} {shown(before.get(differ[0]))}, not {shown(self.about[differ[0]])}"
        return UserError(
            f"{self.out}: contains the {what} of a fill with {why}: give the same options, choose another --out, or "
            "delete it"
        )

    def is_complete(self) -> bool:
        """Return whether a claimed folder has the finished dataset."""
        return retrying((self.out / DATASET_FILE).exists)

    def missing(self) -> list[int]:
        """Return the positions in `shards` of those that are not done, or whose file is gone, ascending."""
        done = set(numbers_in(self.out / RECORDS, r"shard-(\d+)\.json"))
        folders = {posixpath.dirname(shard.path) for shard in self.shards}
        there = {posixpath.join(folder, name) for folder in folders for name in names_in(self.out / folder)}
        return [i for i, shard in enumerate(self.shards) if i not in done or shard.path not in there]

    def copy(self, number: int) -> None:
        """Copy a shard byte for byte; DatasetError if it is damaged."""
        shard = self.shards[number]
        place = self.source.root / shard.path
        [data] = _read_all([place])
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise DatasetError(f"{place}: its sha256 is not the one in {DATASET_FILE}: build the dataset again")
        self.write(number, PackedShard(data, shard, ()), Tally(0, Counter(), 0.0))

    def write(self, number: int, packed: PackedShard, tally: Tally) -> None:
        """Write a shard, then the record that it is done."""
        write(self.out / packed.shard.path, packed.data)
        record = _Record(packed.shard, packed.rows, tally)
        write(self._record(number), canonical_json(record._asdict()))

    def _record(self, number: int) -> Location:
        return self.out / RECORDS / f"shard-{number:05d}.json"

    def finish(self) -> Tally:
        """Write what the dataset has besides its shards, dataset.json last; return what was predicted in all."""
        info, records, table = self.source.info, self._read_records(), self.source.table
        shards = [record.shard for record in records]
        filled = [row for record in records for row in record.rows]
        total = sum((record.tally for record in records), Tally(0, Counter(), 0.0))
        copied = table.filter(pc.invert(pc.is_in(table["split"], pa.array(self.splits))))
        for name in (ACCOUNTS_FILE, PICTURE_FILE, README_FILE):
            if retrying((self.source.root / name).exists):
                data = retrying((self.source.root / name).read)
                write(self.out / name, self._card(data, shards, total) if name == README_FILE else data)
        origin = {**info.source, ORIGIN: {**self.about, "boxes": total.boxes, "masks": total.masks.total()}}
        rows = [*filled, *map(IndexRow.from_values, copied.to_pylist())]
        retrying(
            lambda: finish_dataset(self.out, rows, shards, info.categories, plan=self.key, source=redact_values(origin))
        )
        self._clean_up()
        return total

    def _read_records(self) -> list[_Record]:
        places = [self._record(number) for number in range(len(self.shards))]
        records = []
        for place, data in zip(places, _read_all(places), strict=True):
            try:
                records.append(_Record.from_json(json.loads(data)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{place}: damaged ({error!r}): delete it and run the command again") from error
        return records

    def _clean_up(self) -> None:
        """Remove the records of a finished dataset, and what processes left that were killed while they wrote."""
        delete(self.out / RECORDS, recursive=True)
        if self.out.is_local:
            for left in Path(self.out.path).glob("*/*.tar.*.tmp"):
                left.unlink(missing_ok=True)

    def _card(self, card: bytes, shards: Sequence[Shard], tally: Tally) -> bytes:
        """Return the source's card with the features of the new format version and a section on the masks."""
        text = re.sub(rf"\n{HEADING}\n.*?(?=\n## |\Z)", "", card.decode("utf-8", "replace"), flags=re.DOTALL)
        opening, *front_and_body = text.split("---\n", 2)
        if not opening and len(front_and_body) == 2:
            front, body = front_and_body
            text = f"---\n{_with_features(front, max(shard.version for shard in shards))}---\n{body}"
        section = _SECTION.format(
            masks=counted(tally.masks.total(), "mask"),
            boxes=counted(tally.boxes, "object"),
            splits=" and ".join(self.splits),
            run=self.about["run"],
            score=tally.mean,
            megabytes=sum(shard.nbytes for shard in shards) / 1e6,
        )
        return f"{text}\n{HEADING}\n\n{section}".encode()


def _with_features(front: str, version: int) -> str:
    """Return a card's YAML with the features of a format version; unchanged if its owner gave it another form."""
    try:
        values = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError):  # a ValueError: a date that does not exist
        return front
    if not isinstance(values, dict) or not isinstance(values.setdefault("dataset_info", {}), dict):
        return front
    values["dataset_info"]["features"] = features(version)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _read_all(places: Sequence[Location]) -> list[bytes]:
    """Read whole objects; StorageError if one is unavailable."""
    found = []
    for place, answer in zip(places, read_many([Read(place) for place in places], before_fork=True), strict=True):
        if isinstance(answer, Exception):
            with storage_errors(place.url):
                raise answer
        found.append(answer)
    return found
