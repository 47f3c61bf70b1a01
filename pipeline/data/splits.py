"""What splits are called, which side an image is held out to, and the natural sort order of names.

Input: names, as a file system or an archive gives them. Output: the split that a name stands for. Invariant: the
answer depends on the name and the options alone, so that every process comes to the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.config import Config

VALID_SPLITS = ("valid", "val", "validation", "test")

Split = Literal["train", "valid"]


def valid_names(config: Config) -> tuple[str, ...]:
    """Names that the validation split may have, the first choice first."""
    # Only the default name stands for its synonyms: a name that was given is meant.
    return VALID_SPLITS if config.valid_split == "valid" else (config.valid_split,)


def split_in_path(path: str, config: Config) -> str | None:
    """Find the split that a file's path names, as `data/train-00000-of-00002.parquet` or `val/part-3.tar` do.

    A name counts as a word: no letter stands beside it, and no digit where the name itself has one there. This is the
    rule by which Hugging Face finds splits (https://huggingface.co/docs/datasets/repository_structure), with other
    words. The part nearest to the file decides; a part that names two splits decides nothing.

    Returns:
        The name as it stands in the path, such as `test`, or None.
    """
    names = (config.train_split, *valid_names(config))
    for part in reversed(path.split("/")):
        found = [name for name in names if re.search(_word(name), part)]
        if len(found) == 1:
            return found[0]
    return None


def hashes_of(keys: Iterable[bytes], num_keys: int) -> npt.NDArray[np.uint64]:
    """Return the hashes of N keys by which images are held out, uint64 [N]."""
    hashes = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") for key in keys)
    return np.fromiter(hashes, np.uint64, num_keys)


def are_held_out(hashes_N: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Choose images by their hashes, so that each stays on its side when others come or go; bool [N]."""
    return hashes_N < np.uint64(int(fraction * 2**64))


def natural_sort_key(name: bytes) -> tuple[list[bytes | int], bytes]:
    """Sort numbers inside names by value: class2 before class10."""
    # Splitting at digits puts text at even and numbers at odd places, so like is compared with like.
    parts = re.split(rb"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _word(name: str) -> str:
    before = "[A-Za-z0-9]" if name[0].isdigit() else "[A-Za-z]"
    after = "[A-Za-z0-9]" if name[-1].isdigit() else "[A-Za-z]"
    return f"(?<!{before}){re.escape(name)}(?!{after})"
