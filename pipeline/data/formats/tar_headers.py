"""The headers of a tar file: which members there are, and where their bytes lie.

Input: a file that can be read at any offset. Output: name, offset and size of each regular member. Invariant:
every step goes forward and every member lies within the file, whatever the headers say.

The formats are POSIX ustar and pax (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html) and GNU's
(https://www.gnu.org/software/tar/manual/html_node/Standard.html). Python's `tarfile` reads them too, at several times
the time a member and with a read for each header.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.data.files import display, system_folder_in
from pipeline.data.formats.index import Archive
from pipeline.data.storage import Store
from pipeline.errors import DataError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FILE_TYPES = b"0\x007"
# Link, symbolic link, two kinds of devices, folder and FIFO: nothing follows their header, whatever size it gives.
_BARE_TYPES = b"123456"
_ABOUT_NEXT = b"LKxg"
_LONG_NAME, _LONG_TARGET, _PAX_OF_ALL, _SPARSE, _FOLDER, _HARD_LINK, _SYMBOLIC_LINK = b"LKgS512"
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
    """Yield the members of a tar that have bytes: regular ones in its order, then those that are hard links to them.

    Small members are read through, large ones skipped. Members in folders of systems, symbolic links, hard links to
    nothing and devices are counted.

    Args:
        file: The tar.
        text_endings: Endings of the members whose content is wanted, in lower case.
        ignored: Counts what is not yielded.

    Yields:
        A member's name, cleaned; where its bytes begin; how many there are; its content, if wanted.

    Raises:
        DataError: If this is no tar, is damaged, cut off, or has sparse members.
    """
    for name, start, size in _members(file, ignored):
        is_text = name[name.rfind(b".") :].lower() in text_endings
        yield name, start, size, _read_text(file, start, size) if is_text else b""


def _members(file: TarFile, ignored: Counter[str]) -> Iterator[tuple[bytes, int, int]]:
    # Where every member is, by a hash of its name: names of their own would take several times as much.
    hashes, starts, sizes = array("q"), array("q"), array("q")
    links: list[tuple[bytes, bytes]] = []
    for header, about, start, size in _headers(file):
        kind = header[156]
        name = _clean(about.name or _short_name(header))
        if kind == _SPARSE:
            raise _sparse(file.path, name)
        if kind == _FOLDER or not name:
            continue
        if folder := system_folder_in(name):
            ignored[f"{display(folder)}/"] += 1
        elif kind in _FILE_TYPES:
            for column, value in ((hashes, hash(name)), (starts, start), (sizes, size)):
                column.append(value)
            yield name, start, size
        elif kind == _HARD_LINK:
            links.append((name, _clean(about.target or header[157:257].partition(b"\0")[0])))
        else:
            ignored["link" if kind == _SYMBOLIC_LINK else "no file"] += 1
    rows = {found: row for row, found in enumerate(hashes)} if links else {}
    for name, target in links:
        if hash(target) in rows:
            row = rows[hash(target)]
            yield name, starts[row], sizes[row]
        else:
            ignored["link"] += 1


@dataclass
class _About:
    """What headers say of the member behind them: a name, a target and a size that do not fit in its own."""

    name: bytes | None = None
    target: bytes | None = None
    size: int | None = None


def _headers(file: TarFile) -> Iterator[tuple[bytes, _About, int, int]]:
    """Yield every header of a member with what others say of it, where in the file its data begin, and their size."""
    about = _About()
    found = _next_header(file, 0)
    while found is not None:
        header, at = found
        size = _read_size(header, file.path, at, about.size)
        start = at + _BLOCK
        end = start + -(-size // _BLOCK) * _BLOCK
        if end > file.num_bytes:
            raise _cut_off(file.path, file.num_bytes)
        if header[156] not in _ABOUT_NEXT:
            yield header, about, start, size
            about = _About()
        elif header[156] != _PAX_OF_ALL:
            _read_about(header[156], _read_text(file, start, size), about, file.path, start)
        found = _next_header(file, end)


def _next_header(file: TarFile, at: int) -> tuple[bytes, int] | None:
    """Find the header at a byte, or, as `cat` joins tars, behind marks of the end; None if there is no more.

    The mark of the end may be missing, and what is behind it and no header is padding.
    """
    is_behind_end = False
    while at != file.num_bytes or at == 0:
        window, inside = file.window(at)
        header = window[inside : inside + _BLOCK]
        if len(header) < _BLOCK and not is_behind_end:
            raise _cut_off(file.path, file.num_bytes)
        if header != _ZEROS:
            return (header, at) if not is_behind_end or _has_checksum(header) else None
        is_behind_end = True
        at += _BLOCK
    return None


def _read_about(kind: int, text: bytes, about: _About, path: str, at: int) -> None:
    if kind == _LONG_NAME:
        about.name = text.partition(b"\0")[0]
    elif kind == _LONG_TARGET:
        about.target = text.partition(b"\0")[0]
    else:
        name, target, about.size = _parse_pax(text, path, at)
        about.name, about.target = name or about.name, target or about.target


def _read_size(header: bytes, path: str, at: int, long_size: int | None) -> int:
    """Say how many bytes follow, and verify the checksum."""
    field = header[124:136]
    try:
        # A size of 8 GiB or more does not fit in octal digits; a first byte of 128 marks a binary number.
        size = int.from_bytes(field[1:]) if field[0] == 128 else int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _damaged(path, at) from None
    if size < 0 or not _has_checksum(header):
        raise _damaged(path, at)
    if header[156] in _BARE_TYPES:
        return 0
    return size if long_size is None or header[156] in _ABOUT_NEXT else long_size


def _read_text(file: TarFile, start: int, size: int) -> bytes:
    if size > _MAX_TEXT_BYTES:
        raise _damaged(file.path, start)
    return file.read(start, start + size)


def _parse_pax(text: bytes, path: str, at: int) -> tuple[bytes | None, bytes | None, int | None]:
    """Read name, target and size in a pax header, whose records are length, blank, key, equals sign, value, newline."""
    name = target = size = None
    if not any(key in text for key in (b"path=", b"size=", _PAX_SPARSE)):
        return None, None, None  # most have nothing but times
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
        elif key == b"linkpath":
            target = value[:-1]
        elif key == b"size":
            if not value[:-1].isdigit() or len(value) > 20:
                raise _damaged(path, at)
            size = int(value)
        text = text[length:]
    return name, target, size


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _clean(name: bytes) -> bytes:
    """Bring a name to where it leads from the root: no slashes in front, no parts of a dot or two; all of a folder."""
    if name.endswith(b"/"):
        return b""
    if not name.startswith((b"/", b".")) and b"//" not in name and b"/." not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return b"/".join(parts)


def _has_checksum(header: bytes) -> bool:
    """Say whether a block is a header: it holds the sum of all its bytes, with blanks in its own place."""
    try:
        stored = int(header[148:156].partition(b"\0")[0], 8)
    except ValueError:
        return False
    # Adler-32 begins with the sum of the bytes, counted in C: a tenth of the time of sum().
    expected = stored + sum(header[148:156]) - 8 * ord(" ")
    return zlib.adler32(header) & 0xFFFF == (expected + 1) % _ADLER_BASE


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
