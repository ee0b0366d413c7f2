"""Sends batches from a loader process to the process that reads them, in shared memory that is reused.

The kernel clears each page of new memory when it is first touched, which takes longer than resizing an image into it. A
loader process therefore keeps a few segments of shared memory: anonymous files (memfd of Linux), which do not count
towards the limit of /dev/shm, and disappear with the processes. A batch is written into one of them, and crosses as
the file's name under /proc and the offsets of its parts; the tensors of the reader are views of the segment. When the
last of them is freed, a byte in the segment lets the loader process write another batch there. No socket and no thread
is involved, which could fail while the reader waits for them. On other systems torch sends batches.
"""

import errno
import io
import math
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.common.errors import LoaderError
from shards.stream.torch_internals import WHY_KILLED, reduce_tensor

# Segments that a process keeps. Two are being sent (torch asks a loader process for two batches ahead) and two are held
# by the reader, which has one while it takes the next. If it holds more batches, these are in new memory.
SEGMENTS = 4
ALIGN = 64  # bytes; tensors start at multiples of it, the first one after the two flags
IN_USE, RECEIVED = 0, 1  # the bytes of a segment that are flags


class _Segment:
    """Shared memory in the process that writes it; its flags are not 0 while it is in use, and once it is received."""

    def __init__(self, nbytes: int) -> None:
        try:
            self.file = os.memfd_create("maskstream-batch")
        except OSError as error:
            raise _cannot_send(error) from error
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, nbytes)
        self.memory = mmap.mmap(self.file, nbytes)
        self.address = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

    @property
    def name(self) -> tuple[str, tuple[int, int]]:
        """The name under which another process can open the file while this one has it, and the file's identity."""
        status = os.fstat(self.file)
        return f"/proc/{os.getpid()}/fd/{self.file}", (status.st_dev, status.st_ino)


class _Segments:
    def __init__(self) -> None:
        self.kept: list[_Segment] = []
        self.taken: list[_Segment] = []  # for the batch that is being made
        self.sent: list[_Segment] = []  # whose files must stay open until they are received
        self.largest = 0

    def take(self, nbytes: int) -> _Segment:
        """Return a segment with room for `nbytes`, now in use."""
        nbytes = ALIGN + max(nbytes, 1)
        self.largest = max(self.largest, nbytes)
        self.sent = [segment for segment in self.sent if not segment.memory[RECEIVED]]
        free = [segment for segment in self.kept if not segment.memory[IN_USE]]
        segment = next((one for one in free if len(one.memory) >= nbytes), None)
        if segment is None:
            segment = _Segment(self.largest)  # untouched pages cost nothing
            if free:
                self.kept[self.kept.index(free[0])] = segment
            elif len(self.kept) < SEGMENTS:
                self.kept.append(segment)
        segment.memory[IN_USE], segment.memory[RECEIVED] = 1, 0
        self.taken.append(segment)
        return segment

    def settle(self) -> _Segment:
        """Return the segment for the batch that was made."""
        segment = self.taken[0] if self.taken else self.take(0)
        for other in self.taken[1:]:
            other.memory[IN_USE] = 0
        self.taken = []
        self.sent.append(segment)
        return segment


_segments: _Segments | None = None


def begin() -> None:
    """From now on, `pack` sends the batches of this process in shared memory."""
    global _segments
    # In a container, /proc may be missing, or be of the processes outside.
    has_names = hasattr(os, "memfd_create") and os.path.realpath("/proc/self") == f"/proc/{os.getpid()}"
    _segments = _Segments() if has_names else None


def empty(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return an uninitialised tensor for the largest part of a batch, in the memory in which it is sent if possible."""
    count = math.prod(shape)
    if _segments is None or count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    segment = _segments.take(count * dtype.itemsize)
    return torch.frombuffer(segment.memory, dtype=dtype, count=count, offset=ALIGN).view(tuple(shape))


def pack(batch: Any) -> Any:
    """Return what to send in place of a batch, which must not be used afterwards; unpickling it restores the batch.

    A LoaderError is raised if it cannot be sent. What remains for the thread of the queue that pickles the result
    cannot fail, because the reader would wait forever for what is lost there.
    """
    try:
        return _Pickled(batch) if _segments is None else _Parcel(batch, _segments)
    except OSError as error:
        raise _cannot_send(error) from error


def _cannot_send(error: OSError) -> LoaderError:
    return LoaderError(f"loader process (pid {os.getpid()}) cannot send a batch: {_reason(error)}")


def _reason(error: OSError) -> str:
    """Return why a batch is not sent or received, with what to do."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error}: too many files are open: raise the limit (ulimit -n 4096), or use fewer workers"
    if error.errno in (errno.ENOMEM, errno.ENOSPC):
        return f"{error}: give it more memory, or use fewer workers"
    return f"{error}: read without loader processes (workers=0)"


class _Pickled:
    """A batch as the bytes of `pickle`, with torch's way of sending tensors."""

    def __init__(self, batch: Any) -> None:
        self.data = bytes(ForkingPickler.dumps(batch))

    def __reduce__(self) -> Any:
        return _load, (self.data, (), os.getpid())


class _Parcel:
    """A batch in a segment: pickled, it is the file descriptor and the offsets of the parts."""

    def __init__(self, batch: Any, segments: _Segments) -> None:
        arrays: list[Any] = []
        text = io.BytesIO()
        _Packer(text, pickle.HIGHEST_PROTOCOL, True, arrays.append).dump(batch)
        arrays.append(text.getbuffer())
        self.segment = segment = segments.settle()
        self.parts: list[tuple[int, int]] = []  # offset and length of each part
        mapped = end = len(segment.memory)
        for array in (np.frombuffer(one, np.uint8) for one in arrays):
            offset = array.__array_interface__["data"][0] - segment.address
            if not 0 < offset < mapped:  # a part that was not made by `empty` is appended to the file
                offset = -(-end // ALIGN) * ALIGN
                _write(segment.file, array, offset)
                end = offset + len(array)
            self.parts.append((offset, len(array)))
        self.place = (*segment.name, os.getpid())

    def __reduce__(self) -> Any:
        return _open, (*self.place, self.parts)


class _Packer(ForkingPickler):
    """Leaves the bytes of tensors out of band, as pickle's protocol 5 does for those of arrays."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduced}


def _reduced(tensor: Tensor) -> Any:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized or tensor.requires_grad:
        return reduce_tensor(tensor)
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


def _open(path: str, identity: tuple[int, int], sender: int, parts: Sequence[tuple[int, int]]) -> Any:
    """Return the batch in the process that reads it, or a LoaderError if it cannot be received.

    The error is returned: if memory is pinned, an exception would end the thread that receives.
    """
    try:
        file = os.open(path, os.O_RDWR)
        try:
            status = os.fstat(file)
            if (status.st_dev, status.st_ino) != identity:  # of another process, which has the sender's id now
                raise FileNotFoundError(path)
            memory = mmap.mmap(file, 0)
        finally:
            os.close(file)
    except OSError as error:
        return _not_received(sender, error)
    memory[RECEIVED] = 1
    # Every part of the batch holds a reference to this array, and with it to the segment.
    whole = np.frombuffer(memory, np.uint8)
    weakref.finalize(whole, _give_back, memory, os.getpid()).atexit = False
    view = memoryview(whole)  # type: ignore[arg-type]
    *arrays, text = (view[offset : offset + nbytes] for offset, nbytes in parts)
    return _load(text, arrays, sender)


def _load(text: Any, arrays: Sequence[Any], sender: int) -> Any:
    """Unpickle a batch; tensors that torch sends itself are fetched from the loader process, which may have ended."""
    try:
        return pickle.loads(text, buffers=arrays)  # noqa: S301 - our own loader process wrote it
    except (OSError, EOFError) as error:
        return _not_received(sender, error)


def _not_received(sender: int, error: OSError | EOFError) -> LoaderError:
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return LoaderError(f"loader process (pid {sender}) ended while it sent a batch: {WHY_KILLED}")
    return LoaderError(f"a batch of loader process (pid {sender}) cannot be received: {_reason(error)}")


def _give_back(memory: mmap.mmap, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked from the reader since
        memory[IN_USE] = 0
