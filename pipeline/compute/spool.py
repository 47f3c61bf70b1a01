"""Values that wait until they are needed again: in memory, or on the disk where images are.

Input: any values. Output: the same. Invariant: what is on disk takes some bytes of memory each, however large it is.
"""

from __future__ import annotations

import pickle
import tempfile
import weakref
from typing import Any

from pipeline.errors import ClusterError


class Spool:
    """Values by their numbers.

    Args:
        scratch: The folder whose disk keeps them, in a file without a name, which goes with the process; None for
            memory.

    Raises:
        ClusterError: If there is no room on that disk, there or in `put`.
    """

    def __init__(self, scratch: str | None) -> None:
        self._scratch = scratch
        self._values: list[Any] = []
        try:
            self._file = None if scratch is None else tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        except OSError as exc:
            raise self._no_room(exc) from exc
        if self._file is not None:
            weakref.finalize(self, self._file.close)

    def put(self, value: object) -> int:
        """Keep a value and return its number."""
        if self._file is not None:
            try:
                start = self._file.seek(0, 2)
                pickle.dump(value, self._file, protocol=5)  # of an array without a copy
                self._file.flush()
            except OSError as exc:
                raise self._no_room(exc) from exc
            value = start
        self._values.append(value)
        return len(self._values) - 1

    def get(self, number: int) -> Any:
        """Return a value by its number."""
        if self._file is None:
            return self._values[number]
        self._file.seek(self._values[number])
        return pickle.load(self._file)

    def _no_room(self, exc: OSError) -> ClusterError:
        return ClusterError(
            f"--scratch {self._scratch}: expected room for what actors do not keep in memory, got "
            f"{exc.strerror}; give another folder, or more nodes"
        )
