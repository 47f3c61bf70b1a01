"""What people are shown: progress, and the summary of a finished run.

What enters: `Progress` records and what `run.json` holds. What leaves: lines of text. Always: a figure is shown as it
was computed, rounded only here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

_MAX_CLASSES = 10
_ENDS = 5


@dataclass(frozen=True)
class Progress:
    """How far a phase is.

    Attributes:
        phase: `start`, `nodes`, `GPUs`, `scan`, `times`, `decode`, `means`, `train` or `score`.
        done: Nodes or GPUs that are there, archives indexed, files whose times are known, images decoded or skipped,
            steps of the epoch, or parts written.
        total: Of how many.
        seconds: Since the phase began.
        epoch: While training, the epoch under way, from 1.
        num_epochs: The most epochs there will be.
        loss: While training, the mean training loss of the last finished epoch, in nats.
    """

    phase: str
    done: int
    total: int
    seconds: float
    epoch: int | None = None
    num_epochs: int | None = None
    loss: float | None = None


def library_versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "pillow", "pyarrow")},
    }


def progress_line(progress: Progress) -> str:
    """Say in one line how far the work is, how fast, and how long it still takes."""
    match progress.phase:
        case "start":
            return "starting Ray and listing the images"
        case "nodes" | "GPUs":
            return f"waiting for the cluster's {progress.phase}, {progress.done} of {progress.total} are there"
        case "scan":
            return f"indexed {progress.done:,} of {progress.total:,} archives"
        case "times":
            return f"looked up {progress.done:,} of {progress.total:,} files for the cache"
        case "decode" if progress.done == 0:
            return f"starting to decode {progress.total:,} images"
        case "decode":
            rate = progress.done / max(progress.seconds, 1e-9)
            left = _duration((progress.total - progress.done) / rate)
            return f"decoded {progress.done:,} of {progress.total:,} images, {rate:,.0f} a second, {left} left"
        case "means":
            return "all images are decoded, computing the class means"
        case "train":
            loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
            return (
                f"epoch {progress.epoch} of {progress.num_epochs}, step {progress.done:,} of {progress.total:,}{loss}"
            )
        case _:
            return f"scored {progress.done:,} of {progress.total:,} prediction files"


def summary(run: Mapping[str, Any]) -> str:
    """Lay a finished run out for a terminal: accuracies by classifier and class, counts, times."""
    target, seconds = run["target"], run["seconds"]
    kept = f", {run['num_shards_from_cache']:,} of {run['num_shards']:,} shards from the cache"
    lines = []
    for classifier in dict.fromkeys(row["classifier"] for row in run["metrics"]):
        rows = [row for row in run["metrics"] if row["classifier"] == classifier]
        lines += [*_classifier_lines(classifier, rows), ""]
    phases = ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items() if phase != "total")
    ignored = sum(run["dataset"]["num_ignored_files"].values())
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in run["num_skipped_by_reason"].items())
    skipped = f"{run['num_skipped']:,} skipped" + (f" ({reasons}; see skipped.parquet)" if reasons else "")
    lines += [
        f"images     {run['num_listed']:,} listed: {run['num_train']:,} to train on, {run['num_valid']:,} to validate "
        f"on, {skipped}; {run['num_resized']:,} resized; other files ignored: {ignored:,}",
        f"decoded    to {target['height']}x{target['width']} {target['mode']}, {run['images_per_s']:,.0f} a second"
        + (kept if run["options"]["cache"] is not None else ""),
        f"seconds    {seconds['total']:.1f} ({phases})",
        f"computed   on {_devices(run['actors']['devices'])}",
        f"results    {run['out']}",
        f"sha256     {run['results_sha256']}",
    ]
    return "\n".join(lines)


def _classifier_lines(classifier: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    classes = [row for row in rows if row["scope"] == "class"]
    shown, num_between = classes, 0
    if len(classes) > _MAX_CLASSES:
        shown = sorted((row for row in classes if row["accuracy"] is not None), key=lambda row: row["accuracy"])
        num_between = max(0, len(shown) - 2 * _ENDS)
        if num_between:
            shown = [*shown[:_ENDS], *shown[-_ENDS:]]
    others = [row for row in rows if row["scope"] != "class"]
    names = [row["class"] if row["scope"] == "class" else row["scope"].replace("_", " ") for row in rows]
    width = max(len(name) for name in names)
    lines = [f"{classifier}"]
    for row in (*shown, *others):
        name = row["class"] if row["scope"] == "class" else row["scope"].replace("_", " ")
        lines.append(f"  {name:<{width}}  {_figures(row)}".rstrip())
        if num_between and row is shown[_ENDS - 1]:
            lines.append(f"  ... {num_between} class{'es' if num_between > 1 else ''} between")
    return lines


def _figures(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return "no images"
    if row["num_images"] is None:
        return f"{row['accuracy']:.4f}"
    interval = f"{row['accuracy_low']:.4f} to {row['accuracy_high']:.4f}"
    return f"{row['accuracy']:.4f}  ({interval})  {row['num_correct']:,} of {row['num_images']:,}"


def _devices(devices: Sequence[str]) -> str:
    return ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
