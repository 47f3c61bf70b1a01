"""Where files of the job's own are kept: a local folder or a URI of `pyarrow.fs`, written whole or not at all.

What enters: an option's value, or a path and a function that writes. What leaves: an absolute root, its file system,
files. Always: a file under its final name is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import EvaluationError
from pipeline.files import display


def absolute_root(option: str, given: str, error_class: type[EvaluationError]) -> str:
    """Take an option's folder or URI as the user gave it: a full path, links kept, or a URI without its last slash.

    Args:
        option: As `--out`, for the error.
        given: Its value.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if it names the home folder of nobody.
    """
    if given.startswith("file://"):
        given = os.fsdecode(unquote_to_bytes(urlsplit(given).path))
    if "://" not in given:
        try:
            return os.path.abspath(Path(given).expanduser())  # noqa: PTH100 - keeps links
        except RuntimeError as exc:
            raise error_class(f"{option} {given}: expected a folder, got no such user; give a full path") from exc
    scheme, _, path = given.partition("://")
    return f"{scheme}://{path.rstrip('/')}"


def open_root(option: str, root: str, error_class: type[EvaluationError]) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a root, connecting to it, and the root's path on it.

    Args:
        option: As `--out`, for the error.
        root: As `absolute_root` returns it.
        error_class: What to raise.

    Raises:
        EvaluationError: Of `error_class`, if a URI cannot be opened or names nothing, or a folder's is not UTF-8.
    """
    if "://" not in root:
        shown = display(os.fsencode(root))
        if shown != root:  # pyarrow's file systems take text alone
            raise error_class(f"{option}: expected a folder whose name is UTF-8, got {shown}; choose another")
        return pafs.LocalFileSystem(), root
    try:
        filesystem, path = pafs.FileSystem.from_uri(root)
    except (pa.ArrowInvalid, OSError) as exc:
        raise error_class(f"{option}: expected a URI that can be opened, got {root}; {exc}") from exc
    if not path:
        raise error_class(f"{option}: expected a URI that can be opened, got {root}; name a bucket or folder")
    return filesystem, path


def write_whole(filesystem: pafs.FileSystem, path: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Have `write` fill a file that appears under its name when it is complete, and else not at all.

    Raises:
        OSError: If it cannot be written.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        # An object is shown when its stream is closed, which an exception does as well: so first all, then write.
        content = pa.BufferOutputStream()
        write(content)
        with filesystem.open_output_stream(path) as stream:
            stream.write(content.getvalue())
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with filesystem.open_output_stream(str(temporary)) as stream:
            write(stream)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def reason(exc: OSError) -> str:
    """Say what went wrong in the system's words."""
    return exc.strerror or str(exc)
