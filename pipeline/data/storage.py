"""Folders and object stores by URI: opened, and asked again while they are throttled or out of reach.

Input: URIs as users give them. Output: file systems of `pyarrow.fs` and paths on them. Invariant: an operation that
cannot get better, as one with wrong credentials, is tried once; one that may is tried for a minute.

S3 is reached by the usual settings: the query of the URI (`region`, `endpoint_override`, `scheme`,
`anonymous=true`), or AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE and a node's instance profile.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote_to_bytes, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import EvaluationError, without_secrets

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
# Waits double from half a second: 0.5, 1, 2, ... 16 s, about 30 s with the spread, on top of the client's own retries.
_NUM_TRIES = 7
_FIRST_WAIT_SECONDS = 0.5
# What AWS's and Google's clients say of requests that will be refused again.
_FINAL = re.compile(
    r"NO_SUCH_BUCKET|NO_SUCH_KEY|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|"
    r"UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|INVALID_SIGNATURE|MISSING_AUTHENTICATION|InvalidBucketName|HTTP status 40[134]|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|not.found|credentials",
    re.IGNORECASE,
)


def is_uri(text: str) -> bool:
    """Say whether a location is a URI of `pyarrow.fs`, and no local path."""
    return "://" in text


def plain_path(text: str) -> str:
    """Turn a `file://` URI into the path that it stands for; anything else is returned as it is."""
    if not text.startswith("file://"):
        return text
    with suppress(ValueError):  # its parts cannot be told, as `trimmed` will say
        return os.fsdecode(unquote_to_bytes(urlsplit(text).path))
    return text


def trimmed(option: str, uri: str, error_class: type[EvaluationError]) -> str:
    """Take the last slashes off a URI, but not those of its scheme.

    Args:
        option: That it came with, for the error.
        uri: As the user gave it.
        error_class: What to raise if its parts cannot be told.
    """
    try:
        urlsplit(uri)
    except ValueError as exc:  # whose words hold parts of it, perhaps of a key
        raise error_class(f"{option}: expected a URI that can be opened, got {uri}; check its spelling") from exc
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{path.rstrip('/')}"


def absolute_root(option: str, given: str, error_class: type[EvaluationError]) -> str:
    """Take an option's folder or URI as the user gave it: a full path, links kept, or a URI without its last slash.

    Args:
        option: As `--out`, for the error.
        given: Its value.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if it names the home folder of nobody.
    """
    given = plain_path(given)
    if is_uri(given):
        return trimmed(option, given, error_class)
    try:
        return os.path.abspath(Path(given).expanduser())  # noqa: PTH100 - keeps links
    except RuntimeError as exc:
        raise error_class(f"{option} {given}: expected a folder, got no such user; give a full path") from exc


def open_root(option: str, root: str, error_class: type[EvaluationError]) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a root and the root's path on it.

    Args:
        option: As `--out`, for the error.
        root: As `absolute_root` returns it.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if a URI cannot be opened or names nothing, or a folder's is not UTF-8.
    """
    if is_uri(root):
        return open_uri(option, root, error_class)
    shown = os.fsencode(root).decode("utf-8", "backslashreplace")
    if shown != root:  # pyarrow's file systems take text alone
        raise error_class(f"{option}: expected a folder whose name is UTF-8, got {shown}; choose another")
    return pafs.LocalFileSystem(), root


def is_inside(given: str, root: str) -> bool:
    """Say whether a folder or URI is `root`, or below it, whatever links lead there and their users and queries say."""
    if not is_uri(given) and not is_uri(root):
        return Path(given).resolve().is_relative_to(Path(root).resolve())
    inner, outer = urlsplit(given), urlsplit(root)
    path = f"{inner.path.rstrip('/')}/"
    is_same = inner.scheme == outer.scheme and _bucket(inner) == _bucket(outer)
    return is_same and path.startswith(f"{outer.path.rstrip('/')}/")


def open_uri(option: str, uri: str, error_class: type[EvaluationError]) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a URI; nothing is asked of it yet, except an S3 bucket's region where none is given.

    Args:
        option: That it came with, for the error.
        uri: As `s3://bucket/folder?region=eu-west-1`.
        error_class: What to raise.

    Returns:
        The file system, and the path on it.
    """
    try:
        filesystem, path = _connect(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, TypeError) as exc:
        raise error_class(f"{option}: expected a URI that can be opened, got {uri}; {exc}") from exc
    if not path:
        raise error_class(f"{option}: expected a URI that can be opened, got {uri}; name a bucket or folder")
    return filesystem, path


# Once a process: a client that finds no credentials at hand looks for those of the machine, which can take seconds.
@functools.cache
def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query))
    is_anonymous = query.pop("anonymous", "false").lower() == "true"
    if parts.scheme == "s3" and is_anonymous:  # which `from_uri` does not take
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            query.setdefault("endpoint_override", endpoint)
        filesystem, path = pafs.S3FileSystem(anonymous=True, **query), f"{_bucket(parts)}{parts.path}"
    else:
        plain = parts._replace(query=urlencode(query)).geturl()
        filesystem, path = with_retries(lambda: pafs.FileSystem.from_uri(plain), without_secrets(uri))
    return filesystem, path.rstrip("/")


def with_retries(operation: Callable[[], Answer], what: str) -> Answer:
    """Do an operation on storage, again with growing waits while its failure may pass.

    Throttling and lost connections pass; wrong credentials, a missing bucket and missing files do not. An operation
    must be harmless to repeat.

    Raises:
        OSError: The last one, as it came.
    """
    for attempt in range(_NUM_TRIES):
        try:
            return operation()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as exc:
            # An errno is the local system's, whose answers stand.
            if exc.errno is not None or _FINAL.search(str(exc)) or attempt == _NUM_TRIES - 1:
                raise
            # Spread, so that many workers that are throttled together do not come back together.
            wait_s = _FIRST_WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1.0)
            logger.info("%s: %s; trying again in %.1f s", what, exc, wait_s)
            time.sleep(wait_s)
    raise AssertionError("unreachable: the last try returns or raises")


def temporary_beside(path: str) -> Path:
    """Name the file that this process writes before it takes the name of `path`."""
    # Processes of two hosts that share the folder may have the same id.
    host = zlib.crc32(socket.gethostname().encode())
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}{host:08x}.tmp")


def write_atomic(filesystem: pafs.FileSystem, path: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Have `write` fill a file that appears under its name when it is complete, and else not at all.

    Raises:
        OSError: If it cannot be written.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        # An object is shown when its stream is closed, which an exception does as well: so first all, then write.
        content = pa.BufferOutputStream()
        write(content)
        with_retries(lambda: _put(filesystem, path, content.getvalue()), path)
        return
    temporary = temporary_beside(path)
    try:
        with filesystem.open_output_stream(str(temporary)) as stream:
            write(stream)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def delete(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a file, or see that it is not there, as after a try whose answer was lost."""

    def try_it() -> None:
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)

    with_retries(try_it, path)


def reason(exc: OSError) -> str:
    """Say what went wrong in the system's words."""
    return exc.strerror or str(exc)


def _bucket(uri: SplitResult) -> str:
    # What stands before the @ is the container in Azure's URIs, and who asks in others.
    return uri.netloc if uri.scheme.startswith("abfs") else uri.netloc.rpartition("@")[2]


def _put(filesystem: pafs.FileSystem, path: str, content: pa.Buffer) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)
