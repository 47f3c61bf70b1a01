"""The results of a job: all tables but the predictions, which actors write, and run.json.

Input: counts, parameters, and references to tables of duplicates and suspects. Output: files, and what run.json says.
Invariant: every listed image is accounted for, or nothing is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.driver.duplicates import Duplicates
from pipeline.driver.notices import say_where_images_are_few
from pipeline.driver.own_model import describe_model
from pipeline.driver.state import ImageCounts, Job
from pipeline.driver.train import Training
from pipeline.driver.waiting import get_result
from pipeline.errors import ImageCountError
from pipeline.results import checkpoint, figures, tables, writing
from pipeline.results.duplicates import merge_duplicates, merge_suspects
from pipeline.results.run import RunRecord, run_json
from pipeline.results.tables import DUPLICATES_SCHEMA, SKIPPED_SCHEMA, SUSPECTS_SCHEMA


def write_results(job: Job, counts: ImageCounts, training: Training, duplicates: Duplicates) -> dict[str, Any]:
    """Add the counts up, check that every image is accounted for, and write all tables and run.json."""
    job.clock.enter("write")
    listing, output = job.listing, job.output
    num_train, num_valid = counts.num_decoded["train"], counts.num_decoded["valid"]
    confusions = counts.confusions
    for name, confusion_KK in confusions.items():
        num_scored = int(confusion_KK.sum())
        is_right = num_scored == num_valid and int(counts.train_counts_K.sum()) == num_train
        if not is_right or num_train + num_valid + counts.num_skipped != listing.num_images:
            raise ImageCountError(
                f"{name}: expected {listing.num_images} listed images, got {num_train} to train on "
                f"({counts.train_counts_K.sum()} in the means), {num_valid} to validate on ({num_scored} scored) and "
                f"{counts.num_skipped} skipped; run again, and if it comes again report it"
            )
    say_where_images_are_few(listing, counts)
    rows = [
        row
        for name, counts_KK in confusions.items()
        for row in figures.accuracies(name, listing.classes, counts_KK, counts.num_in_top.get(name))
    ]
    digests = {f"part-{part:05d}": digest for part, digest in counts.digests.items()}
    model = job.plan.model
    if model is not None:
        digests["model"] = hashlib.sha256(json.dumps(model.identity, sort_keys=True).encode()).hexdigest()
    contents = {
        "metrics": tables.metrics_table(rows),
        "confusion": tables.confusion_table((*listing.classes, *(model.extra_classes if model else ())), confusions),
        "means": tables.means_table(listing.classes, job.plan.shape, counts.train_counts_K, counts.means_KD),
    }
    if training.model is not None and training.centre_D is not None:
        contents["weights"] = tables.weights_table(
            listing.classes, job.plan.shape, training.model, training.centre_D, training.scale_D
        )
        contents["history"] = tables.history_table(training.history)
    # Where there are many classes, means and weights are large, and one is compressed beside the other.
    with ThreadPoolExecutor(2) as pool:
        written = pool.map(partial(writing.write_table, output), contents.keys(), contents.values())
        digests.update(zip(contents, written, strict=True))
    skipped = (get_result(counts.skipped[index]) for index in sorted(counts.skipped))
    digests["skipped"] = writing.write_tables(output, "skipped", SKIPPED_SCHEMA, skipped)
    near, doubtful = (counts.neighbors.near, counts.neighbors.suspects) if counts.neighbors else ([], [])
    groups = merge_duplicates(*([get_result(ref) for ref in refs] for refs in (duplicates.tables, near)))
    digests["duplicates"] = writing.write_tables(output, "duplicates", DUPLICATES_SCHEMA, groups)
    suspects = merge_suspects(*([get_result(ref) for ref in refs] for refs in (duplicates.suspects, doubtful)))
    nums_suspects: list[int] = []
    digests["suspects"] = writing.write_tables(
        output, "suspects", SUSPECTS_SCHEMA, _note_lengths(suspects, nums_suspects)
    )
    run = run_json(
        RunRecord(
            config=job.config,
            listing=job.listing,
            target=job.target,
            output=output,
            num_train=num_train,
            num_valid=num_valid,
            num_skipped_by_reason=dict(sorted(counts.num_skipped_by_reason.items())),
            num_resized=counts.num_resized,
            num_shards=len(job.shards),
            num_shards_from_cache=counts.num_from_cache,
            learning_rate=training.learning_rate,
            stopped_by=figures.stop_reason(job.config, training.history),
            num_nodes=len(job.node_ids),
            num_actors=job.allocation.num_actors,
            gpus_per_actor=job.allocation.gpus_per_actor,
            devices=counts.devices,
            stores=counts.stores,
            began=job.clock.began,
            seconds=job.clock.read(),
            duplicates=duplicates.counts,
            neighbors=_describe_neighbors(job, counts, sum(nums_suspects)),
            model=describe_model(job.config, model, counts, job.clock.read()),
            scores=job.given.about if job.given else None,
            last_epoch=asdict(training.history[-1]) if training.history else None,
            metrics=contents["metrics"].to_pylist(),
            results_sha256=writing.combine_digests(digests),
        )
    )
    writing.write_run(output, run)
    checkpoint.delete_checkpoint(output)
    return run


def _note_lengths(parts: Iterator[pa.Table], lengths: list[int]) -> Iterator[pa.Table]:
    for part in parts:
        lengths.append(len(part))
        yield part


def _describe_neighbors(job: Job, counts: ImageCounts, num_suspects: int) -> dict[str, Any] | None:
    """Say for `run.json` what the search for neighbors came to."""
    found = counts.neighbors
    if found is None:
        return None
    num_others = counts.num_decoded["valid"] - found.num_twins
    return {
        "number": job.plan.num_neighbors,
        "of": "all" if job.plan.searches_train else "valid",
        "by": "features" if job.plan.has_features else "pixels",
        "median_distance": found.median,
        "num_twins": found.num_twins,
        "num_near_twins": found.num_twins - found.num_same,
        "num_suspects": num_suspects,
        "accuracy_without_twins": {
            name: (int(confusion_KK.trace()) - counts.num_twins_correct[name]) / num_others if num_others else None
            for name, confusion_KK in counts.confusions.items()
        },
    }
