"""Clients of buckets: how they are found, with which credentials, and what they raise.

Input: the parts of a URI, the environment, AWS's and Google's own files. Output: a client of obstore, the Rust crate
object_store (https://docs.rs/object_store), which makes one request an object, tries again with growing waits, and goes
on with a body where it was cut off. Invariant: a store that is throttled or out of reach is asked again for a minute,
one that refuses is not; and where there are no credentials, that is said before anything is asked.

S3 takes the usual settings: the options of the URI (`region`, `endpoint_override`, `scheme`, `anonymous=true`),
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, a node's or pod's role; and, through boto3, AWS_PROFILE and the files
of `aws configure`.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.uris import Uri

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# A minute of retries, and the last one's own time: an error comes within 90 s.
_RETRIES: Any = {
    "max_retries": 10_000,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}
_TIMEOUTS: Any = {"connect_timeout": "5s", "read_timeout": "15s", "timeout": "1h"}
_OPTIONS = ("region", "endpoint_override", "scheme", "anonymous")
_AWS_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip
_GOOGLE_CREDENTIALS = (
    "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN",
)  # fmt: skip
_GOOGLE_LOGIN = Path("~/.config/gcloud/application_default_credentials.json")
# Where an instance learns its role: the address, and what a question needs.
_AWS_METADATA: tuple[str, dict[str, str]] = ("http://169.254.169.254/latest/meta-data/", {})
_GOOGLE_METADATA = ("http://169.254.169.254/computeMetadata/v1/", {"Metadata-Flavor": "Google"})
# An error's name and words in a response: in XML as S3 and Azure write them, in Google's JSON, or the client's own.
_XML_ERROR = re.compile(r"<Code>(.*?)</Code>\s*(?:<Message>(.*?)</Message>)?", re.DOTALL)
_JSON_ERROR = re.compile(r'"message": *"([^"]*)"')
_CAUSE = re.compile(r'\b(?:message|error): "([^"]*)"')
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
# Refusals of whoever asks, whatever object is asked for: of S3, of Azure, of Google.
_BAD_CREDENTIALS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "TokenRefreshRequired", "InvalidToken",
    "AuthenticationFailed", "InvalidAuthenticationInfo", "Invalid Credentials",
)  # fmt: skip


# Once a process: a client keeps its connections, and looks for credentials, which can take a second.
@functools.cache
def connect(uri: Uri) -> ObjectStore:
    """Make the client of a bucket; nothing is asked of it yet, but where it is.

    Raises:
        OSError: If there is no such kind of storage or option, or there are no credentials.
    """
    # Of the client's runtime, which would have one for each core in every process that decodes on one; a request costs
    # 8 % less with one.
    os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
    start = _CLIENTS.get(uri.scheme)
    if start is None:
        raise OSError(f"object storage is s3://, gs:// or az://, and {uri.scheme}:// is none of them")
    if wrong := [name for name, _ in uri.query if name not in _OPTIONS]:
        raise OSError(f"its options are {', '.join(_OPTIONS)}, and {wrong[0]} is none of them")
    with as_os_errors(uri.place):
        return start(uri, dict(uri.query))


def _s3(uri: Uri, options: dict[str, str]) -> ObjectStore:
    from obstore.store import S3Store

    endpoint = _endpoint(options) or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: Any = {"endpoint": endpoint} if endpoint else {}
    is_anonymous = _is_anonymous(uri, options)
    if is_anonymous:
        config["skip_signature"] = True
    provider = None if is_anonymous else _s3_credentials(uri)
    config["region"] = options.get("region") or (None if endpoint else _region_of(uri.place)) or _usual_region(provider)
    return S3Store(uri.place, config=config, credential_provider=provider, **_client_settings(endpoint))


def _s3_credentials(uri: Uri) -> Any:
    """Find credentials that the client does not find by itself: those of the URI, and of AWS's own files."""
    if uri.user:
        key, secret = uri.user
        return lambda: {"access_key_id": key, "secret_access_key": secret, "token": None, "expires_at": None}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    if provider := _of_profile(os.environ.get("AWS_PROFILE")):
        return provider
    is_switched_off = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    if not any(map(os.environ.get, _AWS_ROLES)) and (is_switched_off or not _is_instance(*_AWS_METADATA)):
        raise OSError(
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or add anonymous=true"
        )
    return None


def _of_profile(profile: str | None) -> Any:
    """Let boto3 read the files of `aws configure`, where there are any; None if they hold no credentials."""
    credentials, config = (
        Path(os.environ.get(name, f"~/.aws/{file}")).expanduser()
        for name, file in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
    )
    if not profile and not credentials.exists() and not config.exists():
        return None
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as exc:
        if not profile and not credentials.exists():
            return None
        raise OSError(
            f"to read {f'the profile {profile}' if profile else credentials} boto3 is needed, which the extra `aws` "
            "brings; or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from exc
    try:
        return Boto3CredentialProvider()
    except BotoCoreError as exc:
        raise OSError(f"{exc}; look at AWS_PROFILE and {credentials}") from exc
    except ValueError:  # there are none
        return None


def _is_instance(address: str, headers: dict[str, str]) -> bool:
    """Say whether this machine is an instance that may have a role; the client itself would try for a minute."""
    from urllib import request
    from urllib.error import HTTPError

    opener = request.build_opener(request.ProxyHandler({}))
    try:
        opener.open(request.Request(address, headers=headers), timeout=1).close()
    except HTTPError as exc:
        exc.close()
        return exc.code == 401  # a newer kind, which wants a token that the client asks for
    except OSError:
        return False
    return True


def _region_of(bucket: str) -> str | None:
    """Ask AWS for a bucket's region, which any request must name; None where only the usual one can be tried."""
    from pyarrow.fs import resolve_s3_region

    try:
        region: str = resolve_s3_region(bucket)
        return region
    except OSError as exc:
        if "not found" in str(exc):
            raise
        return None


def _usual_region(provider: Any) -> str:
    names = ("AWS_REGION", "AWS_DEFAULT_REGION")
    of_profile = getattr(provider, "config", {}).get("region")
    return next((value for name in names if (value := os.environ.get(name))), of_profile) or "us-east-1"


def _google(uri: Uri, options: dict[str, str]) -> ObjectStore:
    from obstore.store import GCSStore

    config: Any = {}
    endpoint = _endpoint(options) or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        config["base_url"] = endpoint
    if _is_anonymous(uri, options):
        config["skip_signature"] = True
    elif not any(map(os.environ.get, _GOOGLE_CREDENTIALS)) and not (
        _GOOGLE_LOGIN.expanduser().exists() or _is_instance(*_GOOGLE_METADATA)
    ):
        raise OSError(
            "no credentials; set GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default "
            "login`, or add anonymous=true"
        )
    return GCSStore(uri.place, config=config, **_client_settings(endpoint))


def _azure(uri: Uri, options: dict[str, str]) -> ObjectStore:
    from obstore.store import AzureStore

    container, at, account = uri.place.partition("@")
    config: Any = {"account_name": account.partition(".")[0]} if at else {}
    if uri.user:
        config["account_key"] = uri.user[1]
    endpoint = _endpoint(options)
    if endpoint:
        config["endpoint"] = endpoint
    if _is_anonymous(uri, options):
        config["skip_signature"] = True
    return AzureStore(container, config=config, **_client_settings(endpoint))


_CLIENTS: dict[str, Callable[[Uri, dict[str, str]], ObjectStore]] = {
    "s3": _s3, "gs": _google, "gcs": _google, "az": _azure, "azure": _azure, "abfs": _azure, "abfss": _azure,
}  # fmt: skip


def _client_settings(endpoint: str | None) -> Any:
    is_plain = endpoint is not None and endpoint.startswith("http://")
    return {"client_options": {**_TIMEOUTS, "allow_http": is_plain}, "retry_config": _RETRIES}


def _endpoint(options: dict[str, str]) -> str | None:
    endpoint = options.get("endpoint_override")
    if endpoint is None or "://" in endpoint:
        return endpoint
    return f"{options.get('scheme', 'https')}://{endpoint}"


def _is_anonymous(uri: Uri, options: dict[str, str]) -> bool:
    return options.get("anonymous", "false").lower() == "true" or uri.user == ("anonymous", "")


@contextmanager
def as_os_errors(path: str | bytes) -> Iterator[None]:
    """Turn what the client raises into OSErrors of one line."""
    try:
        yield
    except OSError as exc:
        if type(exc) not in (OSError, FileNotFoundError):  # one of our own
            raise
        words = _words(exc)
        if any(code in words for code in _NO_BUCKET):
            raise OSError(words) from exc
        if isinstance(exc, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from exc
        raise OSError(words) from exc
    except Exception as exc:
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        if isinstance(exc, (PermissionDeniedError, UnauthenticatedError)):
            words = _words(exc)
            if any(code in words for code in _BAD_CREDENTIALS):
                raise OSError(words) from exc
            raise PermissionError(errno.EACCES, words) from exc
        if isinstance(exc, (BaseError, ValueError)):
            raise OSError(_words(exc)) from exc
        raise


def _words(exc: Exception) -> str:
    """Say in a line what went wrong, by the words of the store or else of the client."""
    said, _, source = str(exc).partition("\n\nDebug source")
    if found := _XML_ERROR.search(said):
        return ", ".join(part.strip().partition("\n")[0] for part in found.groups() if part)
    if found := _JSON_ERROR.search(said):
        return found[1]
    causes = _CAUSE.findall(source)
    line = " ".join(said.split())
    return f"{line}: {causes[-1]}" if causes and causes[-1] not in line else line
