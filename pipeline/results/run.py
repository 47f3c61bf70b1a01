"""`run.json`: one run's options, versions, counts and figures, and the mark that it is finished.

Input: a `RunRecord`. Output: what `run.json` holds. Invariant: no secret key of a URI is in it, and what two runs of
the same content differ in (times, places, versions) is outside `results_sha256`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.listing import Listing
from pipeline.errors import without_secrets
from pipeline.results.writing import Output
from pipeline.target import Target


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        config: The options.
        listing: What the dataset holds.
        target: What every image became.
        output: Where the results are.
        num_train: Images trained on.
        num_valid: Images validated on.
        num_skipped_by_reason: Images that could not be decoded.
        num_resized: Images that had another size than the target.
        num_shards: Shards that the listing was cut into.
        num_shards_from_cache: Of these, found in the cache.
        learning_rate: Of SGD; None without it.
        stopped_by: Which rule ended the training; None without it.
        num_nodes: Nodes of the cluster.
        num_actors: Actors of the job.
        gpus_per_actor: The share of a GPU that each had.
        devices: What each computed on.
        stores: Where each kept its images: `gpu`, `memory` or `disk`.
        began: The UTC time at which the job began.
        seconds: By phase, and `total`.
        duplicates: Counts of images with the same pixels.
        neighbors: What the search for neighbors came to; None without one.
        model: What the user's own model is, and how it was run; None without one.
        scores: What is to be said of a file of predictions; None without one.
        last_epoch: The last row of `history.parquet`; None without SGD.
        metrics: The rows of `metrics.parquet`.
        results_sha256: The digest of all tables' content.
    """

    config: Config
    listing: Listing
    target: Target
    output: Output
    num_train: int
    num_valid: int
    num_skipped_by_reason: Mapping[str, int]
    num_resized: int
    num_shards: int
    num_shards_from_cache: int
    learning_rate: float | None
    stopped_by: str | None
    num_nodes: int
    num_actors: int
    gpus_per_actor: float
    devices: Sequence[str]
    stores: Sequence[str]
    began: str
    seconds: Mapping[str, float]
    duplicates: Mapping[str, int]
    neighbors: Mapping[str, Any] | None
    model: Mapping[str, Any] | None
    scores: Mapping[str, Any] | None
    last_epoch: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    results_sha256: str


def run_json(record: RunRecord) -> dict[str, Any]:
    """Lay out `run.json`."""
    config, listing = record.config, record.listing
    places = ("data", "out", "cache", "model", "model_classes", "scores_file")
    given = {name: getattr(config, name) for name in places}
    shown = {name: text and without_secrets(text) for name, text in given.items()}
    return {
        "version": __version__,
        "options": {**asdict(config), **shown},
        "versions": library_versions(),
        "dataset": {
            "root": without_secrets(listing.location.root),
            "classes": list(listing.classes),
            "dropped_classes": list(listing.dropped),
            "valid_split": listing.valid_split,
            "num_ignored_files": listing.num_ignored,
        },
        "target": {name: value for name, value in asdict(record.target).items() if name != "model_input"},
        "num_listed": listing.num_images,
        "num_train": record.num_train,
        "num_valid": record.num_valid,
        "num_skipped": sum(record.num_skipped_by_reason.values()),
        "num_skipped_by_reason": dict(record.num_skipped_by_reason),
        "num_resized": record.num_resized,
        "duplicates": dict(record.duplicates),
        "neighbors": record.neighbors,
        "model": record.model,
        "scores": record.scores,
        "num_shards": record.num_shards,
        "num_shards_from_cache": record.num_shards_from_cache,
        "learning_rate": record.learning_rate,
        "stopped_by": record.stopped_by,
        "last_epoch": None if record.last_epoch is None else dict(record.last_epoch),
        "num_nodes": record.num_nodes,
        "actors": {
            "number": record.num_actors,
            "gpus_each": record.gpus_per_actor,
            "devices": list(record.devices),
            "images_kept_in": sorted(set(record.stores)),
        },
        "began": record.began,
        "seconds": dict(record.seconds),
        "images_per_s": listing.num_images / record.seconds["decode"],
        "metrics": list(record.metrics),
        "results_sha256": record.results_sha256,
        "out": without_secrets(record.output.root),
    }


def library_versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "pillow", "pyarrow")},
    }
