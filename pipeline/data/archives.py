"""Finding the archives of a dataset: tar, Parquet and whatever else `formats` knows.

Input: a store and a file, a folder or a glob on it. Output: `Archive` records in natural sort order. Invariant:
all archives of a dataset are of one format, and each belongs to a split, or none does.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config
from pipeline.data.files import ending, is_image_name, is_system_folder, system_folder_in
from pipeline.data.formats import ENDINGS, Format, format_of
from pipeline.data.formats.index import Archive, reading
from pipeline.data.splits import Split, natural_sort_key, split_in_path, valid_names
from pipeline.data.storage import Entry, Store
from pipeline.errors import DataError

_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_TOKEN = re.compile(r"(\*\*/)|(\*\*)|(\*)|\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_MAX_DEPTH = 32
_MAX_RANGE = 100_000


def find_archives(store: Store, root: str, pattern: str, config: Config, ignored: Counter[str]) -> list[Archive]:
    """Find the archives of a dataset, in natural sort order, and choose those of the two splits.

    Args:
        store: Where they are.
        root: The path of a folder, or of one file.
        pattern: What `files.split_glob` cut off, or nothing for all files in the folder at any depth.
        config: The options.
        ignored: Counts, by ending, the files that are neither archives nor images.

    Returns:
        The archives; none if the folder holds images or nothing, and is to be listed as class folders.

    Raises:
        DataError: If there is no such file or folder, or what is there is not one dataset of one kind.
    """
    root = root.rstrip("/") or "/"
    is_folder = not pattern
    found: Iterator[tuple[str, Entry | None]] = _search(store, root, pattern)
    if store.is_local or format_of(root):  # of a bucket's folder, its listing tells whether it is there
        with reading(root):
            at_root = store.find(root)
        if at_root is None:
            raise DataError(f"--data: expected a file or folder at {root}, got nothing; check the name")
        is_folder = is_folder and at_root.is_folder
        if not at_root.is_folder:
            found = iter([(at_root.name, at_root)])
    archives: list[Archive] = []
    image = compressed = None
    num_others: Counter[str] = Counter()
    for name, entry in found:
        if its_format := format_of(name):
            with reading(f"{root}/{name}"):
                entry = entry or store.find(f"{root}/{name}")
            archives.append(_archive(its_format, name, f"{root}/{name}", entry, config))
        elif is_image_name(os.fsencode(name)):
            if is_folder and not archives:
                return []  # it is listed again, as class folders, which need not be walked to their end here
            image = image or name
        elif _COMPRESSED.search(name):
            compressed = compressed or name
        else:
            num_others[ending(os.fsencode(name))] += 1
    if not archives and not compressed and is_folder:
        return []
    _check_kinds(f"{root}/{pattern}".rstrip("/"), archives, image, compressed)
    ignored.update(num_others)
    return _choose_splits(
        root, sorted(archives, key=lambda archive: natural_sort_key(os.fsencode(archive.name))), config
    )


def _search(store: Store, root: str, pattern: str) -> Iterator[tuple[str, Entry | None]]:
    """Yield names below the root, with what is known of them; on a disk, files of a folder before the folders in it."""
    expression = re.compile(_translate(pattern) if pattern else ".*", re.DOTALL)
    if not store.is_local:
        with reading(root):
            for entry in store.entries(root, recursive=True):
                name = entry.path[len(root) + 1 :]
                is_hidden = entry.name.startswith(".") or system_folder_in(name.encode())
                if expression.fullmatch(name) and not is_hidden:
                    yield name, entry
        return
    depth = pattern.count("/") if pattern and "**" not in pattern else _MAX_DEPTH
    waiting = [""]
    while waiting:
        above = waiting.pop()
        folders = []
        for name, is_folder in _list_folder(f"{root}/{above}".rstrip("/") or "/"):
            if is_system_folder(os.fsencode(name)) if is_folder else name.startswith("."):
                continue
            if not is_folder and expression.fullmatch(above + name):
                yield above + name, None
            elif is_folder and above.count("/") < depth:
                folders.append(f"{above}{name}/")
        waiting += sorted(folders, key=lambda folder: natural_sort_key(os.fsencode(folder)), reverse=True)


def _list_folder(path: str) -> Iterator[tuple[str, bool]]:
    here = f"{Path(path).resolve()}/"
    with reading(path), os.scandir(path) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            # A link to one of its own parents would be walked again and again.
            if not (is_folder and entry.is_symlink() and here.startswith(f"{Path(entry.path).resolve()}/")):
                yield entry.name, is_folder


def _translate(pattern: str) -> str:
    """Make a regular expression of a glob."""
    parts = []
    end = 0
    for token in _TOKEN.finditer(pattern):
        folders, anything, name, first, last, words = token.groups()
        parts.append(re.escape(pattern[end : token.start()]))
        end = token.end()
        if folders:
            parts.append("(?:[^/]+/)*")
        elif anything or name:
            parts.append(".*" if anything else "[^/]*")
        elif words is not None:
            parts.append(f"(?:{'|'.join(_translate(word) for word in words.split(','))})")
        else:
            if int(last) - int(first) >= _MAX_RANGE:
                raise DataError(
                    f"--data: expected a range of at most {_MAX_RANGE} numbers, got {token[0]}; use * instead"
                )
            numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
            parts.append(f"(?:{'|'.join(numbers)})")
    return "".join(parts) + re.escape(pattern[end:])


def _archive(found: Format, name: str, path: str, entry: Entry | None, config: Config) -> Archive:
    if entry is None or entry.is_folder:
        raise DataError(f"{path}: expected a {found.name} file, got something that is no regular file; remove it")
    split_name = split_in_path(name, config)
    split: Split | None = None if split_name is None else "train" if split_name == config.train_split else "valid"
    return Archive(found.name, entry.path, name, entry.size, entry.mtime_ns, split, split_name, config.image_column)


def _check_kinds(where: str, archives: list[Archive], image: str | None, compressed: str | None) -> None:
    glob = f"**/*{ending(os.fsencode(archives[0].name))}" if archives else ""
    if archives and image is not None:
        raise DataError(
            f"{where}: expected either class folders of images or archives, got both {image} and {archives[0].name}; "
            f"move one of them elsewhere, or name the archives by a glob such as {glob}"
        )
    if compressed is not None:
        raise DataError(
            f"{where}: expected tar files that can be read at any offset, got {compressed}, which is compressed; "
            "unpack it, or write it again as .tar"
        )
    if not archives:
        raise DataError(f"{where}: expected {' or '.join(ENDINGS)} files, got {image or 'none'}; check the name")
    by_kind = {archive.kind: archive.name for archive in archives}
    if len(by_kind) > 1:
        raise DataError(
            f"{where}: expected archives of one kind, got {' and '.join(by_kind.values())}; "
            f"name one kind by a glob such as {glob}"
        )


def _choose_splits(where: str, archives: list[Archive], config: Config) -> list[Archive]:
    """Leave out what belongs to neither split, and forget the names where they do not say both."""
    valid_name = next((name for name in valid_names(config) if any(name == each.split_name for each in archives)), None)
    unnamed = next((archive.name for archive in archives if archive.split is None), None)
    if valid_name is None or not any(archive.split == "train" for archive in archives):
        # Train alone is a dataset without splits, and the name of a tar may stand for the splits inside.
        return [replace(archive, split=None, split_name=None) for archive in archives]
    if unnamed is not None:
        raise DataError(
            f"{where}: expected {config.train_split} or {valid_name} as a word of every file's path, got {unnamed} "
            "beside files that have it; rename it, or choose files by a glob"
        )
    if config.valid_fraction is not None:
        raise DataError(
            f"--valid-fraction: expected a dataset without splits, got files of {config.train_split} and of "
            f"{valid_name} in {where}; leave the option out, or choose files by a glob"
        )
    return [archive for archive in archives if archive.split_name in (config.train_split, valid_name)]
