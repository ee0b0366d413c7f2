"""S3: s3fs, whose botocore reads endpoints, regions and credentials from the usual variables and files."""

from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.asyn import sync

from shards.storage.clouds.settings import Limits, Settings, expiry


def new_filesystem(anonymous: bool, limits: Limits, **options: Any) -> Any:
    """Return a new file system."""
    config = {
        "connect_timeout": limits.connect_s,
        "read_timeout": limits.read_s,
        "retries": {"total_max_attempts": limits.attempts, "mode": "standard"},
        "max_pool_connections": 64,
    }
    # With more than one part, s3fs asks for the length of each object before reading it.
    fs = fsspec.filesystem("s3", anon=anonymous, max_concurrency=1, config_kwargs=config, **options)
    fs.retries = 1  # botocore retries: a second layer would multiply its attempts
    return fs


def settings(fs: Any, bucket: str, anonymous: bool) -> Settings:
    """Return what botocore has found out about a bucket: endpoint, region and credentials."""
    client = fs.s3
    endpoint, style = client.meta.endpoint_url, (client.meta.config.s3 or {}).get("addressing_style")
    config: dict[str, Any] = {"region": client.meta.region_name or "us-east-1"}
    address = ""
    if ".amazonaws.com" in endpoint:  # obstore knows the addresses of Amazon's regions
        config["virtual_hosted_style_request"] = "." not in bucket  # no certificate covers a bucket with dots
    elif style == "virtual":
        scheme, _, host = endpoint.partition("://")
        address = f"{scheme}://{bucket}.{host}"
        config |= {"endpoint": address, "virtual_hosted_style_request": True}
    else:
        config["endpoint"] = address = endpoint
    if fs.req_kw.get("RequestPayer"):
        config["request_payer"] = True
    if anonymous:
        return Settings("s3", bucket, address, {**config, "skip_signature": True})
    found = client._request_signer._credentials
    if found is None:
        from botocore.exceptions import NoCredentialsError

        raise NoCredentialsError
    if type(found).__name__ != "AioCredentials":
        return Settings("s3", bucket, address, config, renewable=True)
    config |= {"access_key_id": found.access_key, "secret_access_key": found.secret_key}
    if found.token:
        config["session_token"] = found.token
    return Settings("s3", bucket, address, config)


def credentials(fs: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that obstore calls for credentials, which botocore renews."""

    def ask() -> dict[str, Any]:
        frozen = sync(fs.loop, fs.s3._request_signer._credentials.get_frozen_credentials)
        names = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        return {**names, "token": frozen.token, "expires_at": expiry()}

    return ask


def region_of(fs: Any, bucket: str) -> str:
    """Ask S3 for a bucket's region; even the answer of a refusal has it."""
    try:
        answer = sync(fs.loop, fs.s3.head_bucket, Bucket=bucket)
    except Exception as error:
        answer = getattr(error, "response", None) or {}
    return str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))
