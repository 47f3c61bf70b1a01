"""Folders and object stores by URI: opened, and asked again while they are throttled or out of reach.

What enters: URIs as users give them. What leaves: file systems of `pyarrow.fs` and paths on them. Always: an
operation that cannot get better, as one with wrong credentials, is tried once; one that may is tried for a minute.

S3 is reached by the usual settings: the query of the URI (`region`, `endpoint_override`, `scheme`,
`anonymous=true`), or AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE and a node's instance profile.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import DataError, EvaluationError

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
    return os.fsdecode(unquote_to_bytes(urlsplit(text).path)) if text.startswith("file://") else text


def is_inside(uri: str, root: str) -> bool:
    """Say whether a URI is that of `root`, or below it, whatever their queries say."""
    inner, outer = urlsplit(uri), urlsplit(root)
    path = f"{inner.path.rstrip('/')}/"
    return inner[:2] == outer[:2] and path.startswith(f"{outer.path.rstrip('/')}/")


def open_uri(uri: str, option: str, kind: type[EvaluationError] = DataError) -> tuple[pafs.FileSystem, str]:
    """Open the file system of a URI; nothing is asked of it yet, except an S3 bucket's region where none is given.

    Args:
        uri: As `s3://bucket/folder?region=eu-west-1`.
        option: That it came with, for the error.
        kind: The error's class.

    Returns:
        The file system, and the path on it.
    """
    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query))
    is_anonymous = query.pop("anonymous", "false").lower() == "true"
    try:
        if parts.scheme == "s3" and is_anonymous:  # which `from_uri` does not take
            if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
                query.setdefault("endpoint_override", endpoint)
            filesystem, path = pafs.S3FileSystem(anonymous=True, **query), f"{parts.netloc}{parts.path}"
        else:
            plain = parts._replace(query=urlencode(query)).geturl()
            filesystem, path = persist(lambda: pafs.FileSystem.from_uri(plain), uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, TypeError) as exc:
        raise kind(f"{option}: expected a URI that can be opened, got {uri}; {exc}") from exc
    path = path.rstrip("/")
    if not path:
        raise kind(f"{option}: expected a URI that can be opened, got {uri}; name a bucket or folder")
    return filesystem, path


def persist(operation: Callable[[], Answer], what: str) -> Answer:
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
