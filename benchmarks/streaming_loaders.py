"""One measurement of `benchmarks/streaming.py`, in its own process.

    python -m benchmarks.streaming_loaders '<a Job as JSON>'

Every loader yields the same samples (bytes of JPEG and JSON) in batches of the same size, shuffled, by the same number
of worker processes, with the settings that its own documentation recommends. Each imports only what it needs, so that
the peers can be installed in a separate environment.

Prints one line of JSON on stdout, a `Result`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEED = 0
WINDOW = 256  # samples that are shuffled together, for all that shuffle in a buffer

Raw = tuple[str, bytes, bytes]  # key, JPEG, JSON


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        loader: a name of `LOADERS`, "convert" or "limit".
        root: URL or path of the data in the loader's format.
        decode: measure training batches; otherwise the bytes.
        samples: the number of samples to read.
        batch_size, workers: of the loader.
        min_size, max_size: of the images in training batches.
        scratch: an empty folder for what the loader keeps on disk.
        save: stop after `samples` and write the loader's state there.
        resume: a state to continue from.
        started: the wall clock when the process was started.
    """

    loader: str
    root: str
    decode: bool = False
    samples: int = 0
    batch_size: int = 8
    workers: int = 2
    min_size: int = 800
    max_size: int = 1024
    scratch: str = ""
    save: str = ""
    resume: str = ""
    started: float = 0.0

    @property
    def remote(self) -> bool:
        return "://" in self.root


@dataclass
class Result:
    """What was measured.

    Attributes:
        start_s: from the start of the process until everything is imported.
        first_s: from there to the first batch.
        rate: samples per second after the first batch.
        cpu_ms: processor time per sample of all processes, after the first batch.
        samples: the number of samples.
        keys: of the first batch; with `save`: of the batch after the saved state.
    """

    start_s: float
    first_s: float
    rate: float
    cpu_ms: float
    samples: int
    keys: list[str]


@dataclass
class Opened:
    """An opened loader: its batches, the keys of a batch, and its state."""

    batches: Iterable[Any]
    keys: Callable[[Any], list[str]]
    state: Callable[[int], Any]  # after a number of batches


def main() -> int:
    """Measure and print."""
    job = Job(**json.loads(sys.argv[1]))
    if job.loader in ("convert", "limit"):
        from benchmarks import streaming_pipelines

        print(json.dumps(getattr(streaming_pipelines, job.loader)(job)))
        return 0
    load = LOADERS[job.loader]()
    if job.decode:
        import torchvision.transforms.v2  # noqa: F401 - not a part of the time to the first batch
    imported = time.time()
    print(json.dumps(asdict(measure(job, load, imported - job.started))), flush=True)
    os._exit(0)  # without waiting for threads and workers; the parent ends those that are left


def measure(job: Job, load: Callable[[Job], Opened], start_s: float) -> Result:
    """Read `job.samples` samples and time it."""
    begin = time.perf_counter()
    opened = load(job)
    batches = iter(opened.batches)
    first = next(batches)
    first_s = time.perf_counter() - begin
    keys = opened.keys(first)
    size, taken = len(keys), 1
    begin, spent = time.perf_counter(), processor_time()
    while taken * size < job.samples:
        keys_now = next(batches)
        taken += 1
    rate = (taken - 1) * size / max(time.perf_counter() - begin, 1e-9)
    cpu_ms = 1000 * (processor_time() - spent) / max((taken - 1) * size, 1)
    if job.save:
        _save(opened.state(taken), job.save)
        keys = opened.keys(next(batches))
    elif taken > 1:
        opened.keys(keys_now)  # fails if a loader yielded something else at the end
    return Result(start_s, first_s, rate, cpu_ms, taken * size, keys)


def processor_time() -> float:
    """Return the processor time of all processes of this session, also those that have ended, in seconds."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                values = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(values[3]) == os.getsid(0):
                    ticks += sum(map(int, values[11:15]))  # its own, and that of its ended children
    return ticks / os.sysconf("SC_CLK_TCK")


def _save(state: Any, path: str) -> None:
    import pickle  # the state of torch's StatefulDataLoader contains its own objects

    Path(path).write_bytes(pickle.dumps(state))


def _state(job: Job) -> Any:
    import pickle

    return pickle.loads(Path(job.resume).read_bytes()) if job.resume else None  # noqa: S301 - we wrote it


# --- the loaders: each function imports its package and returns what opens the data


def maskstream() -> Callable[[Job], Opened]:
    """`shards.stream.streams`; training batches by `trainer.data.collate`."""
    from shards.format.dataset import open_dataset
    from shards.stream.loader import loader
    from shards.stream.sample_decoders import parse_sample, webdataset_sample
    from shards.stream.streams import ShardStream

    def load(job: Job) -> Opened:
        collate: Any = None
        parse: Any = webdataset_sample
        if job.decode:
            from trainer.config.settings import DataConfig
            from trainer.data.collate import TrainCollate

            parse = parse_sample
            classes = max(category.id for category in open_dataset(job.root).categories) + 1
            collate = TrainCollate(DataConfig(min_size=job.min_size, max_size=job.max_size), SEED, classes)
        start = _state(job) or 0
        stream: Any = ShardStream(
            open_dataset(job.root),
            "train",
            batch_size=job.batch_size,
            seed=SEED,
            start=start,
            parse=parse,
            collate=collate,
        )

        def keys(batch: Any) -> list[str]:
            return list(batch.image_ids) if job.decode else [sample["__key__"] for sample in batch]

        return Opened(loader(stream, workers=job.workers), keys, lambda taken: start + taken)

    return load


def webdataset() -> Callable[[Job], Opened]:
    """The package webdataset on the same tars, over HTTP by curl as it does itself; it resumes by skipping."""
    import webdataset as wds

    def load(job: Job) -> Opened:
        pieces = (
            wds.WebDataset(_tars(job), shardshuffle=100, detshuffle=True, seed=SEED)
            .compose(wds.detshuffle(WINDOW, seed=SEED))
            .to_tuple("__key__", "jpg", "json")
            .batched(job.batch_size, collation_fn=_collate(job))
        )
        loader = wds.WebLoader(pieces, batch_size=None, num_workers=job.workers)
        return Opened(_skip(loader, _state(job) or 0), _keys, lambda taken: taken)

    return load


def mosaicml() -> Callable[[Job], Opened]:
    """mosaicml-streaming on MDS."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    def load(job: Job) -> Opened:
        clean_stale_shared_memory()
        place = {"remote": job.root, "local": job.scratch} if job.remote else {"local": job.root}
        dataset = StreamingDataset(**place, shuffle=True, shuffle_seed=SEED, batch_size=job.batch_size)
        loader = StreamingDataLoader(
            dataset, batch_size=job.batch_size, num_workers=job.workers, collate_fn=_collate_dicts(job)
        )
        loader._get_batch_size = len  # it counts samples by it, and knows dicts and tensors only
        if job.resume:
            loader.load_state_dict(_state(job))
        return Opened(loader, _keys, lambda taken: loader.state_dict())

    return load


def litdata() -> Callable[[Job], Opened]:
    """LitData on its own chunks."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # Its fast S3 client only accepts https, and has no setting for that; the server here uses http.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True

    def load(job: Job) -> Opened:
        cache = {"cache_dir": job.scratch} if job.remote else {}
        dataset = StreamingDataset(job.root, shuffle=True, drop_last=True, seed=SEED, **cache)
        loader = StreamingDataLoader(
            dataset, batch_size=job.batch_size, num_workers=job.workers, collate_fn=_collate_dicts(job)
        )
        if job.resume:
            loader.load_state_dict(_state(job))
        return Opened(loader, _keys, lambda taken: loader.state_dict())

    return load


def datasets_tars() -> Callable[[Job], Opened]:
    """Hugging Face `datasets` on the same tars, streamed over HTTP: its tar reader passes s3fs a wrong option."""
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

    def load(job: Job) -> Opened:
        files = _tars(job)
        stored = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        return _hugging_face(stored.decode(False), job, StatefulDataLoader)

    return load


def datasets_parquet() -> Callable[[Job], Opened]:
    """Hugging Face `datasets` on Parquet, the format that its documentation recommends."""
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

    def load(job: Job) -> Opened:
        files = [f"{job.root}/{name}" for name in _tar_names(".parquet")]
        stored = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return _hugging_face(stored, job, StatefulDataLoader)

    return load


LOADERS: dict[str, Callable[[], Callable[[Job], Opened]]] = {
    "maskstream": maskstream,
    "webdataset": webdataset,
    "mosaicml-streaming": mosaicml,
    "litdata": litdata,
    "datasets, tars": datasets_tars,
    "datasets, parquet": datasets_parquet,
}


def _hugging_face(stored: Any, job: Job, loader_type: Any) -> Opened:
    # Each worker needs its own files; by default ten share one buffer.
    files = max(1, len(_tar_names()) // max(job.workers, 1))
    shuffled = stored.shuffle(seed=SEED, buffer_size=WINDOW, max_buffer_input_shards=files)
    loader = loader_type(
        shuffled, batch_size=job.batch_size, num_workers=job.workers, collate_fn=_collate_dicts(job), drop_last=True
    )
    if job.resume:
        loader.load_state_dict(_state(job))
    return Opened(loader, _keys, lambda taken: loader.state_dict())


def _tar_names(suffix: str = ".tar") -> list[str]:
    return [f"{number:06d}{suffix}" for number in range(int(os.environ["SHARDS"]))]


def _tars(job: Job) -> list[str]:
    root = job.root.replace("s3://", os.environ.get("AWS_ENDPOINT_URL", "") + "/")
    return [f"{root}/{name}" for name in _tar_names()]


def _skip(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if number >= count:
            yield batch


# --- what the peers' workers make of samples


def _collate(job: Job) -> Callable[[Sequence[Raw]], list[Any]]:
    if not job.decode:
        return list
    from benchmarks.streaming_pipelines import ReferencePipeline

    return ReferencePipeline(job.min_size, job.max_size)


def _collate_dicts(job: Job) -> Callable[[Sequence[dict[str, Any]]], list[Any]]:
    return FromDicts(_collate(job))


@dataclass
class FromDicts:
    """A collate of dicts, which the peers' formats contain."""

    collate: Callable[[Sequence[Raw]], list[Any]]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> list[Any]:
        return self.collate([(_key(sample), _bytes(sample["jpg"]), _bytes(sample["json"])) for sample in samples])


def _key(sample: dict[str, Any]) -> str:
    return str(sample["key"] if "key" in sample else sample["__key__"])


def _bytes(value: Any) -> bytes:
    """Return bytes: `datasets` without decoding has them in a dict, and always parses JSON."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        value = value["bytes"]
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _keys(batch: list[Any]) -> list[str]:
    return [str(sample[0]) for sample in batch]


if __name__ == "__main__":
    sys.exit(main())
