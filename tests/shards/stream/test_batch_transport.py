import errno
import gc
import itertools
import multiprocessing
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.common.errors import LoaderError
from shards.format.dataset import Dataset
from shards.format.sample import Sample
from shards.stream import batch_transport
from shards.stream.loader import Loader, loader
from shards.stream.streams import ShardStream

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memfd")


def everything(samples: Sequence[Sample], epoch: int) -> dict[str, Any]:
    """A batch of everything that can be in one; sizes differ from batch to batch."""
    number = int(samples[0].image_id, 16)
    rng = np.random.default_rng([number, epoch])
    images = batch_transport.empty((2, 5 + number, 7, 3)).permute(0, 3, 1, 2)
    images.copy_(torch.from_numpy(rng.integers(0, 256, images.shape, dtype=np.uint8)))
    more = batch_transport.empty((3, 4), torch.float32).copy_(torch.from_numpy(rng.random((3, 4))))
    floats = torch.from_numpy(rng.random((6, 8)))
    return {
        "images": images,
        "one of them": images[1, :, 1:3],
        "more": [more, batch_transport.empty((0, 4))],
        "strided": floats[::2, 1:],
        "expanded": floats[:, :1].expand(6, 5),
        "transposed": floats.t(),
        "bfloat16": floats.bfloat16(),
        "conjugate": torch.complex(floats, floats).conj(),
        "bool": floats > 0.5,
        "scalar": floats[0, 0].clone(),
        "empty": torch.zeros((0, 4), dtype=torch.int64),
        "parameter": torch.nn.Parameter(floats.clone()),
        "numpy": (rng.random(5), rng.integers(0, 9, (0, 2))),
        "values": (samples[0].image_id, epoch, None),
        "samples": list(samples),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def batches(dataset: Dataset, workers: int, start_method: str | None = None) -> Loader[dict[str, Any]]:
    stream = ShardStream(dataset, "train", batch_size=2, collate=everything)
    return loader(stream, workers=workers, start_method=start_method)


@pytest.fixture(scope="module")
def expected(local: Dataset) -> list[dict[str, Any]]:
    return list(itertools.islice(batches(local, 0), 61))


@pytest.fixture(autouse=True)
def _no_segments_of_other_tests() -> None:
    """An error that was caught keeps its loader, and what that holds, until it is collected."""
    gc.collect()
    assert not segments()
    for process in senders():
        process.join(10)
    assert senders() == []


def senders() -> list[Any]:
    """The loader processes of this process that have segments."""
    return [process for process in multiprocessing.active_children() if segments(process.pid)]


def segments(pid: int | None = None) -> set[str]:
    """The segments that a process, by default this one, has mapped."""
    lines = Path(f"/proc/{pid or 'self'}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:maskstream-batch" in line}


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_batch_arrives_as_it_was_made_and_outlives_its_process(
    local: Dataset, expected: list[dict[str, Any]], method: str
) -> None:
    reader = iter(batches(local, 1, method))
    for wanted, found in zip(expected[:15], reader):
        assert same(found, wanted)
        assert found["images"].stride() == wanted["images"].stride()
        found["images"].zero_()  # the reader may change it
    held = next(reader)
    [worker] = senders()
    worker.kill()
    with pytest.raises(LoaderError):
        list(itertools.islice(reader, 10_000))
    reader.close()
    assert same(held, expected[15])


def test_held_batches_and_parts_never_change(local: Dataset, expected: list[dict[str, Any]]) -> None:
    """The reader keeps whole batches, or a single view of one, as long as it likes."""
    choose = random.Random(5)
    held: list[tuple[Any, Any]] = []
    reader = iter(batches(local, 2))
    for wanted in expected[:60]:
        whole = next(reader)
        key = choose.choice([None, "images", "one of them", "strided", "numpy"])
        held.append((whole, wanted) if key is None else (whole[key], wanted[key]))
        del whole
        assert all(same(found, wanted) for found, wanted in held)
        while len(held) > choose.choice([0, 1, 3, 20]):
            held.pop(choose.randrange(len(held)))
    reader.close()


def test_memory_is_bounded_and_reused(local: Dataset) -> None:
    def alike(samples: Sequence[Sample], epoch: int) -> Tensor:
        return batch_transport.empty((2, 3, 7, 7)).fill_(epoch)

    reader = iter(loader(ShardStream(local, "train", batch_size=2, collate=alike), workers=1))
    held = list(itertools.islice(reader, 12))
    [worker] = senders()
    assert len(segments()) == 12
    assert len(segments(worker.pid)) <= batch_transport.SEGMENTS + 3  # others are freed once sent
    held.clear()
    used = set[str]().union(*(segments() for _ in itertools.islice(reader, 100)))
    assert len(used) <= batch_transport.SEGMENTS + 2  # two were being sent while the reader held all others
    assert len(segments(worker.pid)) <= batch_transport.SEGMENTS + 3
    reader.close()
    assert not segments()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_long_temporary_folder_works(
    local: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / ("long-scratch-folder-of-a-job" * 4)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    reader = iter(batches(local, 1, method))
    assert len(next(reader)["samples"]) == 2
    reader.close()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "more memory"), (errno.EACCES, "denied: .* without loader processes")],
)
def test_a_batch_that_cannot_be_sent_or_received_is_an_error(
    local: Dataset, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """The reader of a batch that is lost on its way would wait forever."""

    def fails(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", fails)
        with pytest.raises(LoaderError, match=rf"loader process \(pid \d+\) cannot send a batch: .*{remedy}"):
            next(iter(batches(local, 1, "fork")))
    reader = iter(batches(local, 1, "fork"))
    next(reader)
    monkeypatch.setattr("mmap.mmap", fails)
    with pytest.raises(LoaderError, match=rf"a batch of loader process \(pid \d+\) cannot be received: .*{remedy}"):
        next(reader)


def test_without_shared_segments_a_batch_is_pickled_before_it_is_queued() -> None:
    """As on systems without memfd: what cannot be pickled is an error, not a wait."""
    whole = {"images": torch.arange(6).view(2, 3), "samples": ["a"]}
    assert same(pickle.loads(pickle.dumps(batch_transport.pack(whole))), whole)  # noqa: S301
    with pytest.raises(AttributeError, match="local object"):
        batch_transport.pack(lambda: None)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), EOFError()])
def test_a_process_that_ends_while_torch_fetches_a_tensor_from_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A parameter is sent by torch; an exception would end the thread that pins memory."""
    packed = pickle.dumps(batch_transport.pack(torch.nn.Parameter(torch.ones(2))))
    monkeypatch.setattr(batch_transport, "pickle", Mock(loads=Mock(side_effect=error)))
    found = pickle.loads(packed)  # noqa: S301
    assert isinstance(found, LoaderError)
    assert f"loader process (pid {os.getpid()}) ended" in str(found)


def test_where_proc_is_of_other_processes_torch_sends_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with process ids of its own that sees /proc of the host: names there are of other files."""
    monkeypatch.setattr("os.getpid", lambda: 1)
    batch_transport.begin()
    assert batch_transport._segments is None


def test_a_forked_process_does_not_free_batches(local: Dataset, expected: list[dict[str, Any]]) -> None:
    reader = iter(batches(local, 1))
    assert sum(1 for _ in itertools.islice(reader, 60)) == 60  # until each segment is large enough for any batch
    held = [next(reader)]
    next(reader)  # the loop itself holds its newest batch
    child = os.fork()
    if child == 0:
        held.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sum(1 for _ in itertools.islice(reader, 10)) == 10
    assert same(held[0], expected[60])
    reader.close()
