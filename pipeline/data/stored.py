"""A file of a store as Python and Arrow read files: from any byte on, and no more than is asked for.

Input: a store and an entry of its listing. Output: a file object. Invariant: nothing is read before it is asked for.
"""

from __future__ import annotations

import io
from typing import Any

from pipeline.data.storage import Entry, Store


class StoredFile(io.RawIOBase):
    """A file of a store, of which only what is asked for is read."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry = store, entry
        self._at = 0

    def readinto(self, buffer: Any) -> int:
        """Read what comes next, up to the size of the buffer."""
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._entry.size)
        content = self._store.read_range(self._entry.path, self._at, stop) if stop > self._at else b""
        view[: len(content)] = content
        self._at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self._at = offset + {0: 0, 1: self._at, 2: self._entry.size}[whence]
        return self._at

    def tell(self) -> int:
        """Say which byte comes next."""
        return self._at

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True
