"""Addresses of S3 buckets and signatures of requests; found once per process."""

from __future__ import annotations

import asyncio
import os


class Address:
    """The address of a bucket, and the signature of requests to it."""

    def __init__(self, bucket: str, anonymous: bool) -> None:
        self.bucket, self.anonymous = bucket, anonymous
        self.etag_is_md5 = False  # if the ETag of one object was its MD5, that of every object is
        self.move(None)

    def move(self, region: str | None) -> None:
        """Find the bucket's address in a region (None: the configured one)."""
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = botocore.session.get_session()
        self._credentials = None if self.anonymous else session.get_credentials()
        if self._credentials is None and not self.anonymous:
            from botocore.exceptions import NoCredentialsError

            raise NoCredentialsError
        region = region or session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", region_name=region, config=Config(signature_version=UNSIGNED))
        # botocore knows all forms of addresses (endpoints, path and host style): an unsigned URL has the right one.
        url = client.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "k"})
        self.region = region
        self.base = url.split("?", 1)[0].removesuffix("/k")

    def signed(self, url: str, headers: dict[str, str]) -> dict[str, str]:
        """Return the headers with a signature.

        Format: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
        """
        if self._credentials is None:
            return headers
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("GET", url, headers=headers)
        # Frozen for each request: credentials that expire are renewed here.
        S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self.region).add_auth(request)
        return dict(request.headers.items())

    @property
    def may_cross_a_fork(self) -> bool:
        """Whether a forked child can use it: renewable credentials have a lock, which a thread may have held."""
        return self._credentials is None or type(self._credentials).__name__ == "Credentials"


_Key = tuple[str, bool, str | None]  # bucket, anonymous, endpoint
_addresses: dict[_Key, asyncio.Future[Address]] = {}
_known: dict[_Key, Address] = {}  # found by the parent of this process


def _keep_for_child() -> None:
    """In a forked child: keep the addresses, which are plain values and take a tenth of a second to find."""
    for key, found in _addresses.items():
        if found.done() and not found.cancelled() and not found.exception() and found.result().may_cross_a_fork:
            _known[key] = found.result()
    _addresses.clear()


os.register_at_fork(after_in_child=_keep_for_child)


async def address_of(bucket: str, anonymous: bool) -> Address:
    """Return a bucket's address, for the endpoint of the environment.

    Raises:
        Exception: botocore's, if settings or credentials are missing or wrong.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    key = (bucket, anonymous, endpoint)
    if key in _known:
        return _known[key]
    if key not in _addresses:
        # In a thread, because botocore reads files and may ask the machine's metadata service for credentials. Once,
        # because it takes a tenth of a second, and the first reads of a process all start at the same moment.
        _addresses[key] = asyncio.ensure_future(asyncio.to_thread(Address, bucket, anonymous))
    try:
        return await asyncio.shield(_addresses[key])
    except Exception:
        _addresses.pop(key, None)
        raise
