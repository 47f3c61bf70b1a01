"""Decoded shards, kept from one run to the next.

Input: a shard's outcome and, from `cache_key`, a digest of all that it depends on. Output: the same outcome, mapped
from its file. Invariant: what comes out is bit for bit what went in, or None; nothing that happens to a cache ends a
job; and no file is touched that the cache did not write.

An entry, `<key>.arrow`, is an Arrow IPC stream, which any reader of Arrow opens, and behind it a checksum. A shard in
which a file could not be read is not kept: that file is to be tried again, and may be good the next time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from pipeline.data.columns import one_chunk
from pipeline.data.storage import Entry, Store, open_root, reason
from pipeline.data.uris import absolute_root, is_inside
from pipeline.decoding.images import Decoded, Fault
from pipeline.errors import CacheError, without_secrets

logger = logging.getLogger(__name__)

# The tag by which backup programs know a cache (https://bford.info/cachedir/), and the line that says whose it is.
MARKER_FILE = "CACHEDIR.TAG"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"
_OWNER = b"# Decoded images, kept by image-baseline; `python jobs/cache.py clear` removes them.\n"
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.arrow|\.[0-9a-f]{64}\.arrow\.[0-9a-f]+\.tmp")
_MARKER_TEMPORARY = re.compile(r"\.CACHEDIR\.TAG\.[0-9a-f]+\.tmp")
# Behind the stream: the layout's name, and zlib.crc32 of all before. Of the standard library's checksums it is the
# fastest, 4 GB/s where sha256 makes 1.8 and blake2b 0.9, and chance, not malice, is what damages a file here.
_TRAILER = struct.Struct("<8sI")
_LAYOUT = b"ibcache1"
# A full cache is emptied by this much more than must be, and looked through again after so much has been added, so that
# neither is done for every shard. Several processes together may pass the limit by the latter, each.
_KEPT_SHARE = 15 / 16
_UNSEEN_SHARE = 1 / 256
_warned: set[Cache] = set()


@dataclass(frozen=True)
class Cache:
    """Where decoded shards are kept.

    Attributes:
        root: A local folder, as an absolute path, or a URI of object storage.
        limit_bytes: What the entries may take together; None for no limit. The least recently used go first; on an
            object store, where reading leaves no trace, those written first.
    """

    root: str
    limit_bytes: int | None = None

    @classmethod
    def at(cls, given: str, limit_bytes: int | None = None) -> Cache:
        """Take `--cache` as the user gave it."""
        return cls(absolute_root("--cache", given, CacheError), limit_bytes)


@dataclass(frozen=True)
class Usage:
    """How many entries there are, and their bytes together."""

    num_entries: int
    num_bytes: int


@dataclass
class _Process:
    """What one process knows of a cache: where it is, and how full; `num_bytes` is infinite before the first look."""

    store: Store
    path: str
    is_prepared: bool = False
    num_bytes: float = math.inf
    num_unseen_bytes: int = 0

    def entries(self) -> list[Entry]:
        """All files that a cache writes, half-written ones among them."""
        found = self.store.entries(self.path, recursive=False)
        return [entry for entry in found if not entry.is_folder and _ENTRY_NAME.fullmatch(entry.name)]


class _DamagedError(ValueError):
    """An entry that is not what was written."""


def prepare(cache: Cache, others: Iterable[str] = ()) -> None:
    """Make the folder a cache, or see that it is one.

    Args:
        cache: The cache.
        others: Folders and URIs, as of the dataset and the results, that it may be neither in nor around.

    Raises:
        CacheError: If it lies so, holds anything else, or cannot be had.
    """
    for other in others:
        if is_inside(cache.root, other) or is_inside(other, cache.root):
            raise CacheError(
                f"--cache {cache.root}: expected a folder apart from {other}, got one in or around it; choose another"
            )
    process = _open(cache)
    try:
        if not _is_cache(process):
            entries = process.store.entries(process.path, recursive=False)
            foreign = [entry.name for entry in entries if not _MARKER_TEMPORARY.fullmatch(entry.name)]
            # Looked at once more, since another process may have made it a cache meanwhile.
            if foreign and not _is_cache(process):
                raise CacheError(
                    f"--cache {cache.root}: expected a cache of this program, or a new or empty folder, got one with "
                    f"{foreign[0]} in it; choose another"
                )
            process.store.make_folder(process.path)
            process.store.write(f"{process.path}/{MARKER_FILE}", lambda stream: stream.write(_TAG + _OWNER))
        process.is_prepared = True
    except OSError as exc:
        raise CacheError(
            f"--cache {cache.root}: expected a folder to write to, got {reason(exc)}; choose another"
        ) from exc


def load(cache: Cache, key: str) -> Decoded | None:
    """Return the outcome that was stored under `key`; None if there is none that can be trusted.

    From a local folder it is mapped, not read: the checksum is the one pass over the pixels, and the table lives on
    when its file is removed. A damaged entry is removed, with a warning.
    """
    try:
        process = _open(cache)
        path = _entry_path(process, key)
        if process.store.is_local:
            with pa.memory_map(path) as file:
                content = file.read_buffer()
        else:
            content = pa.py_buffer(process.store.read(path.encode(), lambda _: None))
    except FileNotFoundError:
        return None
    except (OSError, CacheError) as exc:
        _warn_once(cache, exc)
        return None
    try:
        decoded = _from_content(content, key)
    except _DamagedError as exc:
        logger.warning("%s: expected an entry of the cache as it was written, got %s; decoding again", path, exc)
        with contextlib.suppress(OSError):  # decoding again writes over it, if anything can
            if _is_cache(process):
                process.store.delete(path)
        return None
    if process.store.is_local:
        with contextlib.suppress(OSError):  # a cache that is only read has no order of use
            os.utime(path)
    return decoded


def store(cache: Cache, key: str, decoded: Decoded) -> None:
    """Keep a shard's outcome under `key`, unless something in it may go away, as a file that could not be read.

    The entry appears whole or not at all, and the limit is kept by removing others first. What goes wrong, a full disk
    or a lost right, is a warning, once in a process.
    """
    if not all(_is_lasting(fault) for _, fault in decoded.faults):
        return
    try:
        process = _open(cache)
        if not process.is_prepared:  # on this node, where a folder may be another one than the driver's
            prepare(cache)
        parts = _to_content(key, decoded)
        num_bytes = sum(map(len, parts))
        if cache.limit_bytes is not None:
            if num_bytes > cache.limit_bytes:
                return
            _make_room(process, cache.limit_bytes, num_bytes)
        path = _entry_path(process, key)
        process.store.write(path, lambda stream: [stream.write(part) for part in parts])
    except (OSError, CacheError) as exc:
        _warn_once(cache, exc)


def usage(cache: Cache) -> Usage:
    """Count entries and bytes.

    Raises:
        CacheError: If there is no cache, or it cannot be read.
    """
    return _usage(_existing_entries(cache)[1])


def clear(cache: Cache) -> Usage:
    """Remove all entries and return what they were; the folder stays a cache.

    Raises:
        CacheError: If there is no cache, or an entry cannot be removed.
    """
    process, entries = _existing_entries(cache)
    try:
        for entry in entries:
            process.store.delete(entry.path)
    except OSError as exc:
        raise CacheError(
            f"--cache {cache.root}: expected to remove its entries, got {reason(exc)}; check its rights"
        ) from exc
    return _usage(entries)


@functools.cache
def _open(cache: Cache) -> _Process:
    """Connect once in each process."""
    return _Process(*open_root("--cache", cache.root, CacheError))


def _warn_once(cache: Cache, exc: OSError | CacheError) -> None:
    """Warn of a cache that does not work, unless this process has: every shard would say the same."""
    if cache not in _warned:
        _warned.add(cache)
        words = reason(exc) if isinstance(exc, OSError) else exc
        root = without_secrets(cache.root)
        logger.warning("--cache %s: expected to use it, got %s; decoding goes on without", root, words)


def _is_cache(process: _Process) -> bool:
    try:
        return _OWNER in process.store.read_range(f"{process.path}/{MARKER_FILE}", 0, len(_TAG + _OWNER))
    except FileNotFoundError:
        return False


def _existing_entries(cache: Cache) -> tuple[_Process, list[Entry]]:
    process = _open(cache)
    try:
        if not _is_cache(process):
            raise CacheError(f"{cache.root}: expected a cache of this program, got none; check the name")
        return process, process.entries()
    except OSError as exc:
        raise CacheError(
            f"--cache {cache.root}: expected to look into it, got {reason(exc)}; check the folder's rights"
        ) from exc


def _usage(entries: Iterable[Entry]) -> Usage:
    sizes = [entry.size for entry in entries]
    return Usage(len(sizes), sum(sizes))


def _make_room(process: _Process, limit_bytes: int, num_new_bytes: int) -> None:
    process.num_bytes += num_new_bytes
    process.num_unseen_bytes += num_new_bytes
    if process.num_bytes <= limit_bytes and process.num_unseen_bytes <= _UNSEEN_SHARE * limit_bytes:
        return
    entries = process.entries()
    num_bytes = num_new_bytes + _usage(entries).num_bytes
    if num_bytes > limit_bytes:
        for entry in sorted(entries, key=lambda entry: (entry.mtime_ns or 0, entry.path)):
            if num_bytes <= _KEPT_SHARE * limit_bytes:
                break
            process.store.delete(entry.path)
            num_bytes -= entry.size
    process.num_bytes, process.num_unseen_bytes = num_bytes, 0


def _entry_path(process: _Process, key: str) -> str:
    return f"{process.path}/{key}.arrow"


def _is_lasting(fault: Fault) -> bool:
    # What Pillow could not do for want of memory it may do the next time; all else that it says is of the bytes.
    return fault.reason not in ("unreadable", "not_a_file") and "memory" not in fault.error.lower()


def _to_content(key: str, decoded: Decoded) -> tuple[memoryview, bytes]:
    """Lay an entry out: the stream and, behind it, the trailer."""
    faults = [(row, fault.reason, fault.error) for row, fault in decoded.faults]
    metadata = {"key": key, "faults": json.dumps(faults), "num_resized": str(decoded.num_resized)}
    schema = decoded.table.schema.with_metadata(metadata)
    batch = pa.RecordBatch.from_arrays([one_chunk(column) for column in decoded.table.columns], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    stream = memoryview(sink.getvalue())
    return stream, _TRAILER.pack(_LAYOUT, zlib.crc32(stream))


def _from_content(content: pa.Buffer, key: str) -> Decoded:
    num_bytes = content.size - _TRAILER.size
    if num_bytes < 0:
        raise _DamagedError(f"{content.size} bytes")
    layout, checksum = _TRAILER.unpack(content.slice(num_bytes))
    stream = content.slice(0, num_bytes)
    if layout != _LAYOUT:
        raise _DamagedError("no checksum at its end")
    if zlib.crc32(stream) != checksum:
        raise _DamagedError("another checksum")
    try:
        with pa.ipc.open_stream(stream) as reader:
            table = pa.Table.from_batches([reader.read_next_batch()])
        metadata = table.schema.metadata
        faults = [(row, Fault(reason, error)) for row, reason, error in json.loads(metadata[b"faults"])]
        num_resized = int(metadata[b"num_resized"])
        stored_key = metadata[b"key"].decode()
    except (pa.ArrowException, OSError, StopIteration, TypeError, KeyError, ValueError) as exc:
        raise _DamagedError(f"{type(exc).__name__} {exc}") from exc
    if stored_key != key:
        raise _DamagedError("the entry of another key")
    return Decoded(table.replace_schema_metadata(None), faults, num_resized, is_from_cache=True)
