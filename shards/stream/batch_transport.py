"""From a loader process to the process that reads it: a batch in shared memory that is used again and again.

The kernel clears each page of new memory when it is first touched, which takes longer than to resize an image into it.
So a loader process keeps a few segments of shared memory. A batch is written into one, tensors and all, and crosses as
a file descriptor and the places of its parts. The reader's tensors are views of it. When the last of them is gone, a
byte in the segment says so to the loader process, which may then write the next batch there.

Segments are anonymous files (Linux' memfd): no limit of /dev/shm concerns them, and they are gone with the processes.
Elsewhere batches cross as torch hands them over.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.common.errors import LoaderError

WHY_KILLED = (
    "mostly that is the kernel, for want of memory (dmesg tells): take fewer workers (workers=, or --data.workers of a "
    "command) or less read-ahead (read_ahead=, or --data.read_ahead_mb); in a container, raise its limits of memory "
    "and shared memory"
)

# Segments that a process keeps for the next batches. Two are under way (torch asks a loader process for two batches
# ahead) and two with the reader, who holds one while it takes the next. What is held beyond is given fresh memory.
SEGMENTS = 4
ALIGN = 64  # bytes; tensors start at multiples of it, the first behind the byte that says whether the segment is in use


class _Segment:
    """Shared memory in the process that writes it."""

    def __init__(self, nbytes: int) -> None:
        self.file = os.memfd_create("maskstream-batch")
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, nbytes)
        self.memory = mmap.mmap(self.file, nbytes)
        self.address = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

    @property
    def in_use(self) -> bool:
        return self.memory[0] != 0

    @in_use.setter
    def in_use(self, value: bool) -> None:
        self.memory[0] = value


class _Segments:
    """Those of this process."""

    def __init__(self) -> None:
        self.kept: list[_Segment] = []
        self.taken: list[_Segment] = []  # for the batch that is being made
        self.largest = 0

    def take(self, nbytes: int) -> _Segment:
        """One with room for `nbytes`, now in use."""
        nbytes = ALIGN + max(nbytes, 1)
        self.largest = max(self.largest, nbytes)
        free = [segment for segment in self.kept if not segment.in_use]
        segment = next((one for one in free if len(one.memory) >= nbytes), None)
        if segment is None:
            segment = _Segment(self.largest)  # untouched pages cost nothing
            if free:
                self.kept[self.kept.index(free[0])] = segment
            elif len(self.kept) < SEGMENTS:
                self.kept.append(segment)
        segment.in_use = True
        self.taken.append(segment)
        return segment

    def settle(self) -> _Segment:
        """The one for the batch that was made."""
        segment = self.taken[0] if self.taken else self.take(0)
        for other in self.taken[1:]:
            other.in_use = False
        self.taken = []
        return segment


_segments: _Segments | None = None


def begin() -> None:
    """What this process makes from now on is packed by `pack`."""
    global _segments
    _segments = _Segments() if hasattr(os, "memfd_create") else None


def empty(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor, not initialised, for a part of a batch (its largest): in a loader process it is where the batch is
    handed over, and not copied once more. It belongs to that batch alone."""
    tensor = torch.empty(0, dtype=dtype)
    count = int(np.prod(shape, dtype=np.int64))
    if _segments is None or count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    segment = _segments.take(count * tensor.itemsize)
    return torch.frombuffer(segment.memory, dtype=dtype, count=count, offset=ALIGN).view(tuple(shape))


def pack(batch: Any) -> Any:
    """A batch as it is sent: pickled, it becomes the batch again where it is read, or a LoaderError if this process is
    gone by then. The batch itself is used up."""
    return batch if _segments is None else _Parcel(batch, _segments)


class _Parcel:
    def __init__(self, batch: Any, segments: _Segments) -> None:
        arrays: list[Any] = []
        text = io.BytesIO()
        _Packer(text, pickle.HIGHEST_PROTOCOL, True, arrays.append).dump(batch)
        arrays.append(text.getbuffer())
        segment = segments.settle()
        self.segment = segment
        self.places: list[tuple[int, int]] = []
        mapped = len(segment.memory)
        end = mapped
        for array in (np.frombuffer(one, np.uint8) for one in arrays):
            offset = array.__array_interface__["data"][0] - segment.address
            if not 0 < offset < mapped:
                offset = -(-end // ALIGN) * ALIGN
                _write(segment.file, array, offset)
                end = offset + len(array)
            self.places.append((offset, len(array)))

    def __reduce__(self) -> Any:
        return _open, (DupFd(self.segment.file), self.places, os.getpid())


class _Packer(ForkingPickler):
    """Leaves the bytes of tensors out, as pickle's protocol 5 does for those of arrays."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduced}


def _reduced(tensor: Tensor) -> Any:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or tensor.requires_grad:
        return ForkingPickler._extra_reducers[Tensor](tensor)  # type: ignore[attr-defined]
    tensor = tensor.resolve_conj().resolve_neg()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    if span != tensor.numel():  # there are gaps, or values that occur twice
        tensor = tensor.contiguous()
    values = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(values.data), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _tensor(values: memoryview, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if len(values) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(values, dtype=dtype).as_strided(shape, stride)


def _write(file: int, values: Any, offset: int) -> None:
    left = memoryview(values)
    while left:
        done = os.pwrite(file, left, offset)
        left, offset = left[done:], offset + done


def _open(duplicate: Any, places: Sequence[tuple[int, int]], sender: int) -> Any:
    """In the process that reads it: the batch; or a LoaderError, where the loader process, which holds the file until
    now, is gone. It is not raised: torch receives in a thread of its own where memory is pinned, which that would end.
    """
    try:
        file = duplicate.detach()
    except (OSError, EOFError):
        return LoaderError(f"loader process (pid {sender}) ended while it handed over a batch: {WHY_KILLED}")
    try:
        memory = mmap.mmap(file, 0)
    finally:
        os.close(file)
    # Every part holds on to this array, and with it the segment.
    whole = np.frombuffer(memory, np.uint8)
    weakref.finalize(whole, _give_back, memory, os.getpid()).atexit = False
    view = memoryview(whole)  # type: ignore[arg-type]
    *arrays, text = (view[offset : offset + nbytes] for offset, nbytes in places)
    return pickle.loads(text, buffers=arrays)  # noqa: S301 - our own loader process wrote it


def _give_back(memory: mmap.mmap, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked from this one meanwhile
        memory[0] = 0
