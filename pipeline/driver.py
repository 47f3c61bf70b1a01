"""The job from its options to its results: listing, feeding, training, scoring, writing.

What enters: a `Config`. What leaves: the result files and what `run.json` says. Always: the driver holds references,
counts, means and parameters, never images or their rows, and the work in flight is bounded by bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline import (
    __version__,
    archives,
    decode,
    driver_cluster,
    driver_connect,
    driver_ray,
    driver_scan,
    driver_train,
    files,
    loading,
    metrics,
    report,
    results,
    sources,
    storage,
)
from pipeline.cache import Cache
from pipeline.cache import prepare as prepare_cache
from pipeline.config import Config
from pipeline.decode import Target
from pipeline.driver_cluster import Node, wait_for_nodes
from pipeline.driver_feed import Job, Tally, feed, write_part
from pipeline.driver_ray import Actor
from pipeline.driver_scan import Found
from pipeline.driver_train import Training
from pipeline.errors import AccountError, ActorLostError, ClusterError, OptionError, OutputError, without_secrets
from pipeline.files import Location
from pipeline.report import Clock, Progress
from pipeline.results import Output
from pipeline.shards import Fit, Plan, Storage, choose_storage, fit_cluster, make_plan
from pipeline.sources import Listing

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3


def evaluate(
    config: Config,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_download: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the whole job and write its results.

    Ray is started, or a running cluster joined, and left again; where the caller is connected already, that
    connection is used and kept.

    Args:
        config: The options.
        on_progress: Called several times a second with how far the work is; what it raises ends the job.
        on_download: Called with the bytes done and in all while a dataset known by name is fetched.

    Returns:
        What `run.json` holds.

    Raises:
        EvaluationError: One of the tree in `errors`, for everything that a user can mend.
    """
    clock = Clock()
    # Actors have other working folders.
    config = replace(config, scratch=storage.absolute_root("--scratch", config.scratch, OptionError))
    location = files.locate(config.data, on_download)
    output = Output.at(config.out)
    data = [] if location.kind == "parquet" else [location.root]
    if any(storage.is_inside(output.root, root) for root in data):
        raise OutputError(f"--out {output.root}: expected a folder outside the dataset, got one in it; choose another")
    cache = None
    if config.cache is not None:
        cache = Cache.at(config.cache, None if config.cache_gib is None else int(config.cache_gib * 2**30))
        prepare_cache(cache, [*data, output.root])
    on_progress(Progress("start", 0, 1, 0.0))
    # The listing is read while Ray starts.
    look = _begin_look(location, config)
    wait([look], timeout=0.03)  # a small folder's faults need not wait for Ray
    if look.done():
        look.result()
    with driver_connect.connected(config.address) as is_joined:
        on_progress(Progress("start", 0, 1, 0.0))  # which may end the job: what was asked meanwhile waits for an answer
        nodes = _meet_nodes(config, on_progress, is_joined=is_joined)
        fit = _fit(config, nodes)
        actors = _start_actors(config, fit)  # which import torch while the listing is read
        try:
            listing, target = _finish_look(look, location, config, nodes, output, clock, on_progress)
            plan, shards = make_plan(config, listing, target)
            kept_in = _choose_storage(config, plan, fit, nodes)
            results.prepare(output, overwrite=config.overwrite, resume=config.resume)
            if cache is not None:
                clock.enter("scan")
                shards = driver_scan.name_entries(listing, plan, shards, on_progress)
            node_ids = frozenset(node.node_id for node in nodes)
            job = Job(config, listing, target, plan, shards, fit, kept_in, node_ids, output, cache, clock, on_progress)
            return _run(job, actors)
        finally:
            driver_ray.end_actors(actors)


def _meet_nodes(config: Config, on_progress: Callable[[Progress], None], *, is_joined: bool) -> list[Node]:
    """Return the cluster's nodes, waiting for those that were asked for."""
    if is_joined:
        wait_for_nodes(config, lambda what, done, total: on_progress(Progress(what, done, total, 0.0)))
        logger.info(driver_cluster.describe(driver_cluster.living_nodes()))
    elif config.min_nodes > 1:
        raise ClusterError(
            f"--min-nodes {config.min_nodes}: expected a cluster, got none, so Ray was started here; give --address"
        )
    return driver_cluster.living_nodes()


def _finish_look(
    look: Future[tuple[Listing, Target] | Found],
    location: Location,
    config: Config,
    nodes: list[Node],
    output: Output,
    clock: Clock,
    on_progress: Callable[[Progress], None],
) -> tuple[Listing, Target]:
    """Wait for the look at the dataset, see that all nodes have the same, and have archives indexed."""
    while not look.done():
        on_progress(Progress("start", 0, 1, 0.0))
        wait([look], timeout=0.2)
    look_at = look.result()
    if len(nodes) > 1:
        driver_cluster.check_paths(nodes, location, _some_files(location, look_at), output)
    if isinstance(look_at, Found):
        clock.enter("scan")
        return driver_scan.list_archives(location, config, look_at, on_progress)
    return look_at


def _some_files(location: Location, look: tuple[Listing, Target] | Found) -> list[bytes]:
    """Choose some images, or archives, of a local folder by their names below the root."""
    if location.kind != "folder":
        return []
    if isinstance(look, Found):
        return [os.fsencode(os.path.relpath(look.archives[place].path, location.root)) for place in (0, -1)]
    rows: Any = look[0].train  # a table, as archives are only found yet
    keys = rows["key"]
    return [keys[place].as_py() for place in (0, len(keys) // 2, len(keys) - 1)]


def _fit(config: Config, nodes: list[Node]) -> Fit:
    resources = driver_cluster.total_resources(nodes)
    return fit_cluster(config, resources, sum(node.num_cpus > 0 for node in nodes))


def _start_actors(config: Config, fit: Fit) -> list[Actor]:
    node_ids = [node.node_id for node in driver_cluster.working_nodes()]
    return driver_ray.start_actors(fit, node_ids)


def _choose_storage(config: Config, plan: Plan, fit: Fit, nodes: list[Node]) -> Storage:
    chosen = choose_storage(plan, fit.num_actors, driver_cluster.find_rooms(nodes, fit, config.scratch))
    if chosen == "disk":
        logger.info(
            "%.1f GiB of images do not fit the memory; they are kept on disk in %s", plan.held_bytes / 2**30,
            config.scratch,
        )  # fmt: skip
    return chosen


def _begin_look(location: Location, config: Config) -> Future[tuple[Listing, Target] | Found]:
    """Look in a thread that nothing waits for: an interrupt need not wait for a slow listing's end."""
    look: Future[tuple[Listing, Target] | Found] = Future()

    def run() -> None:
        # While Ray starts, the main thread has it wait, and what any thread hears would be answered by Ray's handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            look.set_result(_look(location, config))
        except BaseException as exc:  # noqa: BLE001 - all of it: what is kept here is raised by result()
            look.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return look


def _look(location: Location, config: Config) -> tuple[Listing, Target] | Found:
    """List the dataset and settle the images' size and mode from a sample; archives are only found, not yet opened."""
    if location.kind != "parquet":
        ignored: Counter[str] = Counter()
        filesystem, root = location.filesystem
        if found := archives.find_archives(filesystem, root, location.pattern, config, ignored):
            return Found(found, ignored)
    listing = sources.list_dataset(location, config)
    places = decode.sample_rows(len(listing.train))
    return listing, decode.choose_target(config, loading.read_headers(location, listing.train, None, places))


def _run(job: Job, actors: list[Actor]) -> dict[str, Any]:
    """Run with these actors, and with others, going on from the last finished epoch, as often as they die."""
    fingerprint = driver_train.describe(job)
    checkpoint = results.read_checkpoint(job.output, fingerprint) if job.config.resume else None
    training = Training([], None)
    if checkpoint:
        training, fingerprint = Training(checkpoint.history, checkpoint.params_P), checkpoint.fingerprint
    if len(training.history) > job.config.epochs:
        raise OutputError(
            f"--epochs: expected at least {len(training.history)}, which {job.output.root} has had, got "
            f"{job.config.epochs}; give more, or --overwrite"
        )
    num_deaths = 0
    while True:
        num_epochs = len(training.history)
        try:
            actors = actors or _start_actors(job.config, job.fit)
            scratch = job.config.scratch if job.storage == "disk" else None
            tally = feed(job, actors, driver_ray.begin(actors, job.plan, job.fit, scratch))
            _check_images(job, tally, fingerprint)
            if num_deaths == 0:
                _say_where_gpus_are_missing(job, tally)
            if job.plan.has_training:
                driver_train.train(job, actors, training, fingerprint)
                _score(job, actors, tally)
            return _write(job, tally, training)
        except ActorLostError as exc:
            driver_train.save(job, training, fingerprint)
            num_deaths = num_deaths + 1 if len(training.history) == num_epochs else 1
            if num_deaths > _MAX_DEATHS:
                raise ClusterError(f"the actors: expected them to live, got {num_deaths} deaths; {exc}") from exc
            logger.warning("%s; starting all actors anew, to go on after epoch %d", exc, len(training.history))
            job = _fit_again(job)
        except BaseException:  # an interrupt above all: what is trained so far is what --resume goes on from
            driver_train.save(job, training, fingerprint)
            raise
        finally:
            # At once: a reference in somebody's traceback would keep them, and their GPUs, from the next job.
            driver_ray.end_actors(actors)
            actors = []


def _fit_again(job: Job) -> Job:
    """Look at what is left of the cluster, since what died may have been a node."""
    show = job.on_progress
    driver_cluster.wait_for_gpus(job.config, lambda what, done, total: show(Progress(what, done, total, 0.0)))
    nodes = driver_cluster.living_nodes()
    fit = _fit(job.config, nodes)
    if job.fit.gpus_per_actor > 0 and fit.gpus_per_actor == 0:
        logger.warning("the GPUs are gone: going on on the CPU, whose sums differ from a GPU's in their last bits")
    # Once on disk, on disk: how much of it actors that are ending still take is not to be told.
    kept_in = "disk" if job.storage == "disk" else _choose_storage(job.config, job.plan, fit, nodes)
    return replace(job, fit=fit, storage=kept_in, node_ids=frozenset(node.node_id for node in nodes))


def _check_images(job: Job, tally: Tally, fingerprint: dict[str, Any]) -> None:
    """See that what training goes on with are the images that it began with, not others under their names."""
    images = hashlib.sha256(tally.counts_K.tobytes() + tally.means_KD.tobytes()).hexdigest()
    if fingerprint.setdefault("images", images) != images:
        raise OutputError(
            f"{job.listing.location.root}: expected the images with which {job.output.root} was begun, got others; run "
            "with the same data, or give --overwrite"
        )


def _say_where_gpus_are_missing(job: Job, tally: Tally) -> None:
    num_on_cpu = tally.devices.count("cpu")
    if job.fit.gpus_per_actor > 0 and num_on_cpu:
        logger.warning(
            "%d actors were given GPUs, but torch finds no CUDA device there; they compute on the CPU", num_on_cpu
        )


def _score(job: Job, actors: list[Actor], tally: Tally) -> None:
    """Have every part scored by all classifiers and written."""
    job.clock.enter("score")
    waiting = {write_part(job, actors, part): part for part in range(len(job.plan.part_sizes))}
    while waiting:
        finished = driver_ray.wait_some(
            list(waiting),
            f"{len(waiting)} prediction files",
            lambda: job.show("score", len(tally.digests), len(job.plan.part_sizes)),
        )
        for done in finished:
            tally.take_part(waiting.pop(done), driver_ray.get(done))


def _write(job: Job, tally: Tally, training: Training) -> dict[str, Any]:
    """Add the counts up, check that every image is accounted for, and write all tables and run.json."""
    job.clock.enter("write")
    listing, output = job.listing, job.output
    num_train, num_valid = tally.num_decoded["train"], tally.num_decoded["valid"]
    confusions = tally.confusions
    for name, confusion_KK in confusions.items():
        num_scored = int(confusion_KK.sum())
        is_right = num_scored == num_valid and int(tally.counts_K.sum()) == num_train
        if not is_right or num_train + num_valid + tally.num_skipped != listing.num_images:
            raise AccountError(
                f"{name}: expected {listing.num_images} listed images, got {num_train} to train on "
                f"({tally.counts_K.sum()} in the means), {num_valid} to validate on ({num_scored} scored) and "
                f"{tally.num_skipped} skipped; run again, and if it comes again report it"
            )
    rows = [
        row for name, counts_KK in confusions.items() for row in metrics.accuracies(name, listing.classes, counts_KK)
    ]
    digests = {f"part-{part:05d}": digest for part, digest in tally.digests.items()}
    tables = {
        "metrics": results.metrics_table(rows),
        "confusion": results.confusion_table(listing.classes, confusions),
        "means": results.means_table(listing.classes, job.target, tally.counts_K, tally.means_KD),
    }
    if training.params is not None:
        centre_D = tally.counts_K @ tally.means_KD.astype(np.float64) / tally.counts_K.sum()
        tables["weights"] = results.weights_table(listing.classes, job.target, training.params, centre_D)
        tables["history"] = results.history_table(training.history)
    for name, table in tables.items():
        digests[name] = results.write_table(output, name, table)
    skipped = (driver_ray.get(tally.skipped[index]) for index in sorted(tally.skipped))
    digests["skipped"] = results.write_tables(output, "skipped", decode.SKIPPED_SCHEMA, skipped)
    seconds = job.clock.read()
    places = {"data": job.config.data, "out": job.config.out, "cache": job.config.cache}
    shown_places = {name: place and without_secrets(place) for name, place in places.items()}
    run = {
        "version": __version__,
        "options": {**asdict(job.config), **shown_places},
        "versions": report.library_versions(),
        "dataset": {
            "root": without_secrets(listing.location.root),
            "classes": list(listing.classes),
            "valid_split": listing.valid_split,
            "num_ignored_files": listing.num_ignored,
        },
        "target": asdict(job.target),
        "num_listed": listing.num_images,
        "num_train": num_train,
        "num_valid": num_valid,
        "num_skipped": tally.num_skipped,
        "num_skipped_by_reason": dict(sorted(tally.num_skipped_by_reason.items())),
        "num_resized": tally.num_resized,
        "num_shards": len(job.shards),
        "num_shards_from_cache": tally.num_from_cache,
        "learning_rate": training.learning_rate,
        "stopped_by": metrics.stop_reason(job.config, training.history),
        "num_nodes": len(job.node_ids),
        "actors": {
            "number": job.fit.num_actors,
            "gpus_each": job.fit.gpus_per_actor,
            "devices": tally.devices,
            "images_kept_in": sorted(set(tally.stores)),
        },
        "began": job.clock.began,
        "seconds": seconds,
        "images_per_s": listing.num_images / seconds["decode"],
        "metrics": tables["metrics"].to_pylist(),
        "results_sha256": results.combine_digests(digests),
        "out": without_secrets(output.root),
    }
    results.write_run(output, run)
    results.delete_checkpoint(output)
    return run
