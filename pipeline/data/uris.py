"""What users type for a place, a local path or a URI, and what of it is the place, and what how to get there.

Input: the values of `--data`, `--out` and `--cache`. Output: full paths, and the parts of URIs. Invariant: what is read
and written is what was typed; a part that has no meaning is an error, and never left out.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from pipeline.errors import EvaluationError, OptionError

# Of buckets and containers; where the account is a part of the place, as in Azure's, it stands behind an @.
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?(:\d+)?")
_AZURE = ("abfs", "abfss", "az", "azure")


@dataclass(frozen=True)
class Uri:
    """A URI of object storage in its parts, with nothing of it left out.

    Attributes:
        scheme: As `s3`, in lower case.
        user: The name and the secret in front of the bucket, where they are given.
        place: The bucket; of Azure, the container, with the account behind an @ where it is given.
        path: The key, or the beginning of keys, without a slash at its end.
        query: The options behind the question mark.
    """

    scheme: str
    user: tuple[str, str] | None
    place: str
    path: str
    query: tuple[tuple[str, str], ...]


def is_uri(text: str) -> bool:
    """Say whether a location is a URI, and no local path."""
    return "://" in text


def parse(option: str, text: str, error_class: type[EvaluationError] = OptionError) -> Uri:
    """Take a URI apart.

    A path is taken as it stands, with `#`, blanks and letters of any alphabet; `%` and two hexadecimal digits are the
    byte that they name. A question mark begins the options, all of the form `name=value`; one in a path is `%3F`.

    Args:
        option: That it came with, for the error.
        text: The URI.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if its parts cannot be told.
    """
    scheme, _, rest = text.partition("://")
    rest, mark, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    user, at, place = authority.rpartition("@")
    if scheme.lower() in _AZURE and at:  # container:key@account
        container, at, key = user.partition(":")
        user, place = f":{key}", f"{container}@{place}"
    key_path = os.fsdecode(unquote_to_bytes(path)).rstrip("/")
    fields = [word.partition("=") for word in query.split("&")] if mark else []
    if wrong := ["".join(field) for field in fields if not field[0] or not field[1]]:
        raise error_class(
            f"{option}: expected options as name=value behind the question mark, got {wrong[0] or 'nothing'} in "
            f"{text}; a question mark that belongs to a name is written %3F"
        )
    if not _PLACE.fullmatch(place) or not scheme.isalnum():
        raise error_class(
            f"{option}: expected a URI that can be opened, as s3://bucket/folder, got {text}; name a bucket, and in a "
            "secret key write / as %2F and @ as %40"
        )
    if key_path and not all(part.strip(".") or len(part) > 2 for part in key_path.split("/")):
        raise error_class(
            f"{option}: expected folders that have names, got {text}, with an empty one, . or .. in it; object storage "
            "has these as names of their own, and they cannot be reached"
        )
    name, _, secret = user.partition(":")
    return Uri(
        scheme.lower(),
        (unquote(name), unquote(secret)) if at else None,
        place,
        key_path,
        tuple((unquote(name), unquote(value)) for name, _, value in fields),
    )


def plain_path(text: str) -> str:
    """Turn a `file://` URI into the path that it stands for; anything else is returned as it is."""
    if not text.startswith("file://"):
        return text
    _, slash, path = text.removeprefix("file://").partition("/")
    return os.fsdecode(unquote_to_bytes(slash + path))


def trimmed(option: str, uri: str, error_class: type[EvaluationError]) -> str:
    """Take the last slashes off a URI's path, after seeing that its parts can be told."""
    parse(option, uri, error_class)
    base, mark, query = uri.partition("?")
    scheme, _, path = base.partition("://")
    return f"{scheme}://{path.rstrip('/')}{mark}{query}"


def absolute_root(option: str, given: str, error_class: type[EvaluationError]) -> str:
    """Take an option's folder or URI as the user gave it: a full path, links kept, or a URI without its last slash.

    Args:
        option: As `--out`, for the error.
        given: Its value.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if it names the home folder of nobody, or a URI's parts cannot be told.
    """
    given = plain_path(given)
    if is_uri(given):
        return trimmed(option, given, error_class)
    try:
        return os.path.abspath(Path(given).expanduser())  # noqa: PTH100 - keeps links
    except RuntimeError as exc:
        raise error_class(f"{option} {given}: expected a folder, got no such user; give a full path") from exc
    except FileNotFoundError as exc:  # of the folder that a path begins in
        raise error_class(
            f"{option} {given}: expected a working folder, got one that was removed; go to another"
        ) from exc


def is_inside(given: str, root: str) -> bool:
    """Say whether a folder or URI is `root`, or below it, whatever links lead there and their users and options say."""
    if not is_uri(given) and not is_uri(root):
        return Path(given).resolve().is_relative_to(Path(root).resolve())
    if not is_uri(given) or not is_uri(root):
        return False
    inner, outer = parse("", given), parse("", root)
    is_same = (inner.scheme, inner.place) == (outer.scheme, outer.place)
    return is_same and (not outer.path or f"{inner.path}/".startswith(f"{outer.path}/"))
