"""Azure Blob Storage: adlfs, whose azure-identity finds and renews credentials."""

from collections.abc import Callable
from functools import cache
from typing import Any

from fsspec.asyn import sync

from shards.common.text import one_line
from shards.storage.clouds.settings import Limits, Settings, expiry, silence
from shards.storage.store_errors import RETRIED, NoCredentialsError, TransientError, UnreachableError

SCOPE = "https://storage.azure.com/.default"
ATTEMPT_AGAIN_S = 1


def account_host(url: str) -> str:
    """Return the host that a URL such as `abfss://container@account.dfs.core.windows.net/path` names, or ""."""
    return url.partition("://")[2].partition("/")[0].partition("@")[2]


def url_of(path: str, url: str) -> str:
    """Return the URL of `container/name` in the account, and with the scheme, of another URL."""
    container, _, name = path.partition("/")
    host = account_host(url)
    return f"{url.partition('://')[0]}://{container}{f'@{host}' if host else ''}/{name}"


def new_filesystem(url: str, anonymous: bool, limits: Limits, **options: Any) -> Any:
    """Return a new file system with a token, if it needs one.

    Raises:
        ValueError: no account is given.
        NoCredentialsError: no credentials were found.
    """
    silence("azure")
    if host := account_host(url):
        options["account_name"] = host.partition(".")[0]
    if anonymous:
        options["anon"] = True
    try:
        fs = _filesystem(anonymous, limits)(**options)
    except ValueError as error:
        if "Must provide either" not in str(error):
            raise
        variables = "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME"
        raise ValueError(f"no storage account is given: set {variables}") from error
    if renewable(fs):
        _token(fs)  # now rather than with every attempt of a request
    return fs


@cache
def _filesystem(anonymous: bool, limits: Limits) -> Callable[..., Any]:
    """Return adlfs's class with a client that has these limits, which adlfs has no options for."""
    from adlfs import AzureBlobFileSystem
    from azure.storage.blob.aio import BlobServiceClient, LinearRetry

    class FileSystem(AzureBlobFileSystem):
        service_client: Any

        def do_connect(self) -> None:
            super().do_connect()
            found: Any = self.service_client
            self.service_client = BlobServiceClient(
                found.url.partition("?")[0] if anonymous else found.url,  # the query is a shared access signature
                credential=None if anonymous else found.credential,
                retry_policy=LinearRetry(
                    backoff=ATTEMPT_AGAIN_S, random_jitter_range=ATTEMPT_AGAIN_S, retry_total=limits.attempts - 1
                ),
                connection_timeout=limits.connect_s,
                read_timeout=limits.read_s,
            )

    return FileSystem


def renewable(fs: Any) -> bool:
    """Return whether the file system uses tokens that expire."""
    return hasattr(fs.service_client.credential, "get_token")


def settings(fs: Any, container: str, anonymous: bool) -> Settings | None:
    """Return what adlfs has found: the account, and a key, a shared access signature or the way to a token."""
    client = fs.service_client
    address, _, signature = client.url.partition("?")
    address = address.rstrip("/")
    if client.account_name is None or fs.version_aware:  # a domain of one's own
        return None
    config: dict[str, Any] = {"account_name": client.account_name, "endpoint": address}
    config |= {"use_emulator": False, "skip_signature": False}  # whatever variables that adlfs does not know
    container = container.partition("@")[0]
    if renewable(fs):
        return Settings("az", container, address, config, renewable=True)
    if signature:
        config |= {"sas_key": signature, "credential_type": "sas_token"}
    elif client.credential is None:
        config["skip_signature"] = True
    elif key := getattr(client.credential, "account_key", ""):
        config |= {"account_key": key, "credential_type": "access_key"}
    else:
        return None
    return Settings("az", container, address, config)


def credentials(fs: Any) -> Callable[[], dict[str, Any]]:
    """Return a function that obstore calls for a token, which azure-identity renews."""
    return lambda: {"token": _token(fs), "expires_at": expiry()}


def _token(fs: Any) -> str:
    try:
        return str(sync(fs.loop, fs.service_client.credential.get_token, SCOPE).token)
    except Exception as error:
        if "DefaultAzureCredential failed" in str(error):
            raise NoCredentialsError("no way to log in succeeded") from error
        raise plain_error(error) from error


def plain_error(error: Exception) -> Exception:
    """Return the standard exception for one of the Azure libraries, which adlfs passes on; any other as it is."""
    found: Any = error
    if isinstance(error, FileNotFoundError | RuntimeError) and error.__cause__ is not None:
        found = error.__cause__  # adlfs's own has no reason
    if not type(found).__module__.startswith("azure."):
        return error
    names = [kind.__name__ for kind in type(found).__mro__]
    code, status = getattr(found, "error_code", None) or "", getattr(found, "status_code", None)
    code = str(getattr(code, "value", code))
    text = one_line(str(found).partition("RequestId:")[0])
    if status == 404:
        return FileNotFoundError(text if code == "ContainerNotFound" else "there is no such blob")
    if "ClientAuthenticationError" in names or (status is not None and 400 <= status < 500 and status not in RETRIED):
        return PermissionError(f"{code}: {text}" if code else text)
    return UnreachableError(text) if "ServiceRequestError" in names else TransientError(text)
