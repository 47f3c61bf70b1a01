"""The headers of a tar file: which members there are, and where their bytes lie.

Input: a file that can be read at any offset. Output: name, offset and size of each regular member. Invariant:
every step goes forward and every member lies within the file, whatever the headers say.

The formats are POSIX ustar and pax (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html) and GNU's
(https://www.gnu.org/software/tar/manual/html_node/Standard.html). Python's `tarfile` reads them too, at several times
the time a member and with a read for each header.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.data.files import display
from pipeline.data.formats.index import Archive
from pipeline.data.storage import Store
from pipeline.errors import DataError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FILE_TYPES = b"0\x007"
# Link, symbolic link, two kinds of devices, folder and FIFO: nothing follows their header, whatever size it gives.
_BARE_TYPES, _LINK_TYPES = b"123456", b"12"
_ABOUT_NEXT = b"LKxg"
_LONG_NAME, _PAX, _SPARSE, _FOLDER = b"LxS5"
_PAX_SPARSE = b"GNU.sparse."
# Long names and classes are short; a header that says otherwise is not to fill the memory.
_MAX_TEXT_BYTES = 2**20
_ADLER_BASE = 65521


class TarFile:
    """A tar, read in windows, at whose bounds no header is cut; those that follow each other are read ahead."""

    def __init__(self, store: Store, archive: Archive, window_bytes: int, num_ahead: int) -> None:
        """Open nothing yet; `window_bytes` is a multiple of a header's 512."""
        self.path, self.num_bytes = archive.path, archive.size_bytes
        self._store, self._window_bytes, self._num_ahead = store, window_bytes, num_ahead
        self._index, self._window = -1, b""
        self._begun: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(max(1, num_ahead))

    def __enter__(self) -> TarFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def window(self, at: int) -> tuple[bytes, int]:
        """Return the window in which a byte is, and where it is in it."""
        index = at // self._window_bytes
        if index != self._index:
            if index == self._index + 1:
                self._read_ahead(index)
            begun = self._begun.pop(index, None)
            self._window = begun.result() if begun else self._read(index)
            self._begun = {each: future for each, future in self._begun.items() if each > index}
            self._index = index
        return self._window, at - index * self._window_bytes

    def read(self, start: int, stop: int) -> bytes:
        """Read some bytes, from the window if they are in it."""
        window, inside = self.window(start)
        if inside + stop - start <= len(window):
            return window[inside : inside + stop - start]
        return self._store.read_range(self.path, start, stop)

    def _read_ahead(self, index: int) -> None:
        for later in range(index, min(index + 1 + self._num_ahead, -(-self.num_bytes // self._window_bytes))):
            if self._num_ahead and later not in self._begun:
                self._begun[later] = self._pool.submit(self._read, later)

    def _read(self, index: int) -> bytes:
        return self._store.read_range(self.path, index * self._window_bytes, (index + 1) * self._window_bytes)


def walk(
    file: TarFile, text_endings: tuple[bytes, ...], ignored: Counter[str]
) -> Iterator[tuple[bytes, int, int, bytes]]:
    """Yield the regular members of a tar in its order.

    Small members are read through, large ones skipped. Members in hidden folders are passed over, links and devices
    counted.

    Args:
        file: The tar.
        text_endings: Endings of the members whose content is wanted, in lower case.
        ignored: Counts what is no regular file.

    Yields:
        A member's name, cleaned; where its bytes begin; how many there are; its content, if wanted.

    Raises:
        DataError: If this is no tar, is damaged, cut off, or has sparse members.
    """
    for header, long_name, start, size in _headers(file):
        kind = header[156]
        name = _clean(long_name or _short_name(header))
        if kind == _SPARSE:
            raise _sparse(file.path, name)
        if kind in _FILE_TYPES:
            if name:
                is_text = name[name.rfind(b".") :].lower() in text_endings
                yield name, start, size, _read_text(file, start, size) if is_text else b""
        elif kind != _FOLDER:
            ignored["link" if kind in _LINK_TYPES else "no file"] += 1


def _headers(file: TarFile) -> Iterator[tuple[bytes, bytes | None, int, int]]:
    """Yield every header with its long name, where in the file the data begin, and their size."""
    at = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        if at + _BLOCK > file.num_bytes:  # at least the mark of the end is to come
            raise _cut_off(file.path, file.num_bytes)
        window, inside = file.window(at)
        header = window[inside : inside + _BLOCK]
        if len(header) < _BLOCK:
            raise _cut_off(file.path, file.num_bytes)
        if header == _ZEROS:
            return
        size = _read_size(header, file.path, at, long_size)
        start = at + _BLOCK
        at = start + -(-size // _BLOCK) * _BLOCK
        if header[156] not in _ABOUT_NEXT:
            yield header, long_name, start, size
            long_name = long_size = None
        elif header[156] == _LONG_NAME:
            long_name = _read_text(file, start, size).partition(b"\0")[0]
        elif header[156] == _PAX:
            pax_name, long_size = _parse_pax(_read_text(file, start, size), file.path, start)
            long_name = pax_name or long_name


def _read_size(header: bytes, path: str, at: int, long_size: int | None) -> int:
    """Say how many bytes follow, and verify the checksum: the sum of all bytes, with blanks in its own place."""
    field = header[124:136]
    try:
        stored = int(header[148:156].partition(b"\0")[0], 8)
        # A size of 8 GiB or more does not fit in octal digits; a first byte of 128 marks a binary number.
        size = int.from_bytes(field[1:]) if field[0] == 128 else int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _damaged(path, at) from None
    # Adler-32 begins with the sum of the bytes, counted in C: a tenth of the time of sum().
    expected = stored + sum(header[148:156]) - 8 * ord(" ")
    if size < 0 or zlib.adler32(header) & 0xFFFF != (expected + 1) % _ADLER_BASE:
        raise _damaged(path, at)
    if header[156] in _BARE_TYPES:
        return 0
    return size if long_size is None or header[156] in _ABOUT_NEXT else long_size


def _read_text(file: TarFile, start: int, size: int) -> bytes:
    if size > _MAX_TEXT_BYTES:
        raise _damaged(file.path, start)
    return file.read(start, start + size)


def _parse_pax(text: bytes, path: str, at: int) -> tuple[bytes | None, int | None]:
    """Read name and size in the records of a pax header: a length, a blank, key, equals sign, value and newline."""
    name = size = None
    if not any(key in text for key in (b"path=", b"size=", _PAX_SPARSE)):
        return None, None  # most have nothing but times
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = text[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(text):
            raise _damaged(path, at)
        if key.startswith(_PAX_SPARSE):
            raise _sparse(path, name)
        if key == b"path":
            name = value[:-1]
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > 20:
                raise _damaged(path, at)
            size = int(value)
        text = text[length:]
    return name, size


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _clean(name: bytes) -> bytes:
    """Leave out slashes in front and parts of one dot; nothing is left of folders and of what is in a hidden one."""
    if name.endswith(b"/"):
        return b""
    if not name.startswith((b"/", b".")) and b"//" not in name and b"/." not in name:
        return name
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return b"" if any(part.startswith(b".") for part in parts[:-1]) else b"/".join(parts)


def _damaged(path: str, at: int) -> DataError:
    if at == 0:
        return DataError(f"{path}: expected an uncompressed tar file, got something else; unpack or replace it")
    return DataError(f"{path}: expected a header of tar at byte {at}, got something else; replace the damaged file")


def _cut_off(path: str, num_bytes: int) -> DataError:
    return DataError(f"{path}: expected a whole tar file, got its first {num_bytes} bytes; copy it again")


def _sparse(path: str, name: bytes | None) -> DataError:
    return DataError(
        f"{path}: expected members that are stored whole, got {display(name or b'one')} as a sparse file; "
        "write the tar without --sparse"
    )
