"""Whole objects of S3, one request each, checked against their ETag.

fsspec's own way asks for an object's size before it reads it, which doubles the requests, and does not check the bytes.
The ETag of an object that was put whole is its MD5, unless it is encrypted with a key of KMS or of the client's
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html).
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from typing import Any

# Buckets of which an object had the MD5 that it was said to have: there a checksum is believed more than what came.
_honest: set[str] = set()

OBJECT_BYTES = 256 << 20  # the largest object that is read whole: five hundred times an image of Open Images


class WrongBytesError(OSError):
    """What came is not what the store's checksum says; `certain` where the store is known to tell true ones."""

    def __init__(self, data: bytes, digest: str, *, certain: bool) -> None:
        super().__init__("the bytes do not have the checksum that the store tells")
        self.data, self.digest, self.certain = data, digest, certain


class TooLargeError(OSError):
    """The object is longer than `OBJECT_BYTES`; it was not read."""


def read_wholes(fs: Any, paths: Sequence[str], in_flight: int) -> list[bytes | Exception]:
    """Read whole objects of an s3fs file system concurrently; what goes wrong with one is its answer."""
    from fsspec.asyn import sync

    return list(sync(fs.loop, _read_all, fs, paths, in_flight))


async def _read_all(fs: Any, paths: Sequence[str], in_flight: int) -> list[bytes | Exception]:
    turns = asyncio.Semaphore(in_flight)

    async def read(path: str) -> bytes | Exception:
        async with turns:
            try:
                return await _read(fs, path)
            except Exception as error:
                return error

    return await asyncio.gather(*map(read, paths))


async def _read(fs: Any, path: str) -> bytes:
    from botocore.exceptions import FlexibleChecksumError
    from s3fs.core import _error_wrapper

    bucket, key, _ = fs.split_path(path)

    async def get() -> tuple[dict[str, Any], bytes]:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        body = answer["Body"]
        try:
            if answer["ContentLength"] > OBJECT_BYTES:
                raise TooLargeError(f"{answer['ContentLength']} bytes, the limit is {OBJECT_BYTES}")
            return answer, await body.read()
        finally:
            body.close()

    data: bytes
    try:
        answer, data = await _error_wrapper(get, retries=fs.retries)  # s3fs's own retries and translation of errors
    except FlexibleChecksumError as error:  # botocore's own check, of objects that were put with a CRC or a SHA
        raise WrongBytesError(b"", "", certain=True) from error
    digest, expected = hashlib.md5(data, usedforsecurity=False).hexdigest(), _md5_of(answer)
    if expected == digest:
        _honest.add(bucket)
    elif expected:
        raise WrongBytesError(data, digest, certain=bucket in _honest)
    return data


def _md5_of(answer: dict[str, Any]) -> str:
    """The MD5 that an answer tells; "" where its ETag is something else."""
    if answer.get("SSECustomerAlgorithm") or str(answer.get("ServerSideEncryption", "")).startswith("aws:kms"):
        return ""
    tag = str(answer.get("ETag", "")).strip('"').lower()
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""
