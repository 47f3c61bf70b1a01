"""The request to a benchmark process and its answer; and the files of a folder of images.

Input: the name of a peer and a request as JSON, on the command line. Output: an `Answer` as JSON, the last line on
standard output. Invariant: every process gets the same files in the same order.
"""

# Every peer pays for every import here: only light ones, the others inside the functions.
from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The default of Ray Data's `read_images`, so that all commands read the same files.
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True)
class Answer:
    """What a command found, and how long its inner phase took.

    Attributes:
        num_images: Images decoded, of both splits.
        num_correct: Images of `valid` that are given their own class; None where nothing is classified.
        num_valid: Images of `valid`.
        checksum: A figure that depends on every value: the mean training pixel, 0 to 1, or the norm of the parameters.
        phase_s: Seconds of the phase that the workload is about: decoding, steps of SGD, feeding; None where a command
            cannot tell.
        num_units: Images (an epoch counts each anew) or shards of that phase.
        quarter_bytes: Resident memory of the process after a quarter of that phase.
    """

    num_images: int
    num_correct: int | None = None
    num_valid: int | None = None
    checksum: float | None = None
    phase_s: float | None = None
    num_units: int | None = None
    quarter_bytes: int | None = None


@dataclass(frozen=True)
class Images:
    """A folder of `train/<class>/` and `valid/<class>/`, and what every image becomes; `mode` is L or RGB.

    Where there is an `endpoint`, the folder's files are also the objects of the bucket `bucket` there.
    """

    data: str
    height: int
    width: int
    mode: str
    is_resized: bool
    endpoint: str = ""
    bucket: str = ""


def serve(peers: Mapping[str, Callable[[Any], Answer]], request_type: Callable[..., Any]) -> None:
    """Run the peer that the command line names and write its answer."""
    _, name, request = sys.argv
    answer = peers[name](request_type(**json.loads(request)))
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    if "daft" in sys.modules:
        # Its threads can abort the interpreter at exit.
        sys.stdout.flush()
        os._exit(0)


def class_names(data: str) -> list[str]:
    """List the classes in natural sort order (2 before 10); a tie goes to the first class."""

    def parts(name: str) -> list[int | str]:
        return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]

    return sorted((entry.name for entry in os.scandir(Path(data, "train")) if entry.is_dir()), key=parts)


def image_paths(data: str, split: str, name: str) -> list[str]:
    """List a class's images in a split, sorted."""
    folder = Path(data, split, name)
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted(entry.path for entry in entries if entry.name.lower().endswith(_IMAGE_ENDINGS))


def labelled_paths(data: str, split: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """List a split's N images, class by class, and the index of each one's class, int64 [N]."""
    import numpy as np

    by_class = [image_paths(data, split, name) for name in class_names(data)]
    labels_N = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class])
    return [path for paths in by_class for path in paths], labels_N


def evaluate_answer(run: Mapping[str, Any], results: Path, phase: str = "decode") -> Answer:
    """Make an answer like the peers' from what `evaluate.py` printed and wrote, with the time of one of its phases."""
    import pyarrow.parquet as pq

    names = ("nearest_mean_l1", "nearest_mean_euclidean")  # of pixels, or of a model's features
    metric = next(row for row in run["metrics"] if row["classifier"] in names and row["scope"] == "all")
    means = pq.read_table(results / "means.parquet", columns=["num_images", "mean"]).to_pylist()
    total = sum(row["num_images"] * sum(row["mean"]) / len(row["mean"]) for row in means)
    num_images = run["num_train"] + run["num_valid"]
    return Answer(
        num_images,
        metric["num_correct"],
        metric["num_images"],
        checksum=total / run["num_train"],
        phase_s=run["seconds"][phase],
        num_units=num_images if phase == "decode" else run["num_valid"],
    )
