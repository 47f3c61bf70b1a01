"""The job from its options to its results: listing, feeding, training, scoring, writing.

Input: a `Config`. Output: the result files and what `run.json` says. Invariant: the driver holds references, counts,
means and parameters, never pixels, and the work in flight is bounded by bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pipeline.compute.classifiers import score_bytes
from pipeline.config import Config
from pipeline.data import files, score_files, uris
from pipeline.data.ahead import DEFAULT_CONCURRENCY
from pipeline.data.listing import Listing
from pipeline.data.score_files import ScoreFile
from pipeline.decoding.cache import Cache
from pipeline.decoding.cache import prepare as prepare_cache
from pipeline.driver import cluster, connect, neighbors, notices, report, scan, tasks, train
from pipeline.driver.actors import Actor, begin_actors, end_actors, start_actors
from pipeline.driver.allocation import Allocation, Storage, allocate, choose_storage
from pipeline.driver.cluster import Node, wait_for_nodes
from pipeline.driver.duplicates import find_duplicates
from pipeline.driver.feed import feed, score
from pipeline.driver.own_model import ModelFile, probe_model, read_model, second_input
from pipeline.driver.scores import join_scores
from pipeline.driver.state import Clock, ImageCounts, Job
from pipeline.driver.train import Training
from pipeline.driver.waiting import Ref, wait_all
from pipeline.driver.write import write_results
from pipeline.errors import (
    ActorLostError,
    ClusterError,
    EvaluationError,
    OptionError,
    OutputError,
    without_secrets,
)
from pipeline.plan import Plan, make_plan
from pipeline.results import checkpoint, writing
from pipeline.results.finished import open_run
from pipeline.results.notebook import Run
from pipeline.results.progress import Progress
from pipeline.results.writing import Output
from pipeline.target import Target

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3


def evaluate(
    config: Config,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_download: Callable[[int, int], None] | None = None,
) -> Run:
    """Run the whole job and write its results.

    Ray is started, or a running cluster joined, and left again; where the caller is connected already, that
    connection is used and kept.

    Args:
        config: The options.
        on_progress: Called several times a second with how far the work is; what it raises ends the job.
        on_download: Called with the bytes done and in all while a dataset known by name is fetched.

    Returns:
        What `run.json` holds, a dictionary that a notebook shows as the table of classifiers; its option `report` is
        false if the page could not be made.

    Raises:
        EvaluationError: One of the tree in `errors`, for everything that a user can correct.
    """
    clock = Clock()
    # Actors have other working folders.
    config = replace(config, scratch=uris.absolute_root("--scratch", config.scratch, OptionError))
    location = files.locate(config.data, on_download, config.read_concurrency or DEFAULT_CONCURRENCY)
    output = Output.at(config.out)
    data = [] if location.kind == "package" else [location.root]
    if any(uris.is_inside(output.root, root) for root in data):
        raise OutputError(f"--out {output.root}: expected a folder outside the dataset, got one in it; choose another")
    score_file = None if config.scores_file is None else score_files.open_scores(config.scores_file)
    cache = _prepare_cache(config, [*data, output.root])
    model_file = read_model(config)
    on_progress(Progress("start", 0, 1, 0.0))
    # The listing is read while Ray starts.
    pending = scan.begin_listing(location, config)
    wait([pending], timeout=0.03)  # a small folder's faults need not wait for Ray
    if pending.done():
        pending.result()
    with connect.connected(config.address, lambda: on_progress(Progress("start", 0, 1, 0.0))) as connection:

        def show(progress: Progress) -> None:
            connection.check()
            on_progress(progress)

        show(Progress("start", 0, 1, 0.0))  # which may end the job: what was asked meanwhile waits for an answer
        nodes = _meet_nodes(config, show, is_joined=connection.is_joined)
        allocation = _allocate(config, nodes)
        model_ref = model_file.place() if model_file else None
        actors = _start_actors(config, allocation, model_ref)  # which import torch while the listing is read
        try:
            listed = scan.finish_listing(pending, location, config, nodes, output, clock, show)
            begun = _Begun(config, allocation, nodes, output, cache, clock, show, model_file, model_ref, score_file)
            job = _plan(begun, actors, *listed)
            run, noted = _run(job, actors)
        finally:
            end_actors(actors)
        return Run(_write_report(job, run, noted) if config.report else run)


class _Begun(NamedTuple):
    """What is settled before the listing is there."""

    config: Config
    allocation: Allocation
    nodes: list[Node]
    output: Output
    cache: Cache | None
    clock: Clock
    show: Callable[[Progress], None]
    model_file: ModelFile | None
    model_ref: Ref | None
    score_file: ScoreFile | None


def _plan(begun: _Begun, actors: list[Actor], listing: Listing, target: Target) -> Job:
    """Look at the model, cut the listing, choose where images are kept, and prepare the results' folder."""
    config, clock, show = begun.config, begun.clock, begun.show
    notices.say_what_may_surprise(listing)
    model = None
    if begun.model_file:
        clock.enter("model")
        tasks.begin_workers(int(cluster.cluster_resources().get("CPU", 1)))
        model = probe_model(config, begun.model_file, actors, listing.classes, target, partial(_tick, show))
        target = replace(target, model_input=second_input(target, model))
    plan, shards = make_plan(config, listing, target, score_bytes(len(listing.classes), model), model)
    plan = replace(plan, given=begun.score_file.kind if begun.score_file else None)
    kept_in = _choose_storage(config, plan, begun.allocation, begun.nodes, show)
    given = None if begun.score_file is None else join_scores(begun.score_file, listing, plan, shards, clock, show)
    writing.prepare(begun.output, overwrite=config.overwrite, resume=config.resume)
    if begun.cache is not None:
        clock.enter("scan")
        shards = scan.name_entries(listing, plan, shards, show)
    return Job(
        config=config,
        listing=listing,
        target=target,
        plan=plan,
        shards=shards,
        allocation=begun.allocation,
        storage=kept_in,
        node_ids=frozenset(node.node_id for node in begun.nodes),
        output=begun.output,
        cache=begun.cache,
        clock=clock,
        on_progress=show,
        model=begun.model_ref,
        given=given,
    )


def _prepare_cache(config: Config, others: Sequence[str]) -> Cache | None:
    """Open the cache, if one is asked for, and see that it is in none of the other places, nor around one."""
    if config.cache is None:
        return None
    cache = Cache.at(config.cache, None if config.cache_gib is None else int(config.cache_gib * 2**30))
    prepare_cache(cache, others)
    return cache


def _write_report(job: Job, run: dict[str, Any], noted: list[Ref]) -> dict[str, Any]:
    """Make the page, after everything else: the results are complete, whatever becomes of it."""
    job.clock.enter("report")
    try:
        images = report.images_of(job.listing, job.config)
        finished = open_run(job.output.root)  # as it will be read when the page is made anew
        report.write_report(finished, images, lambda: job.show("report", 0, 0), job.config.example, noted)
    except EvaluationError as exc:
        again = f"python jobs/report.py {without_secrets(job.output.root)}"
        logger.warning("the page could not be made: %s; the results are complete, make it by %s", exc, again)
        return {**run, "options": {**run["options"], "report": False}}
    return run


def _meet_nodes(config: Config, on_progress: Callable[[Progress], None], *, is_joined: bool) -> list[Node]:
    """Return the cluster's nodes, waiting for those that were asked for."""
    if is_joined:
        wait_for_nodes(config, lambda what, done, total: on_progress(Progress(what, done, total, 0.0)))
        logger.info(cluster.describe_cluster(cluster.living_nodes()))
    elif config.min_nodes > 1:
        raise ClusterError(
            f"--min-nodes {config.min_nodes}: expected a cluster, got none, so Ray was started here; give --address"
        )
    return cluster.living_nodes()


def _allocate(config: Config, nodes: list[Node]) -> Allocation:
    resources = cluster.total_resources(nodes)
    return allocate(config, resources, sum(node.num_cpus > 0 for node in nodes))


def _tick(show: Callable[[Progress], None]) -> bool:
    """Show that the job is still at its start, which is no sign of life."""
    show(Progress("start", 0, 1, 0.0))
    return False


def _start_actors(config: Config, allocation: Allocation, model: Ref | None) -> list[Actor]:
    node_ids = [node.node_id for node in cluster.working_nodes()]
    return start_actors(allocation, node_ids, model)


def _choose_storage(
    config: Config, plan: Plan, allocation: Allocation, nodes: list[Node], on_progress: Callable[[Progress], None]
) -> Storage:
    def tick() -> None:
        on_progress(Progress("start", 0, 1, 0.0))

    chosen = choose_storage(
        plan, allocation.num_actors, cluster.measure_capacities(nodes, allocation, config.scratch, tick)
    )
    if chosen == "disk":
        logger.info(
            "%.1f GiB of images do not fit the memory; they are kept on disk in %s", plan.held_bytes / 2**30,
            config.scratch,
        )  # fmt: skip
    return chosen


def _run(job: Job, actors: list[Actor]) -> tuple[dict[str, Any], list[Ref]]:
    """Run with these actors, and with others, going on from the last finished epoch, as often as they die.

    Returns:
        What `run.json` holds, and references to what the page may show of each prediction file.
    """
    fingerprint = train.fingerprint_of(job)
    training = Training([], None)
    if job.config.resume and (kept := checkpoint.read_checkpoint(job.output, fingerprint)):
        training, fingerprint = Training(kept.history, kept.params), kept.fingerprint
    if len(training.history) > job.config.epochs:
        raise OutputError(
            f"--epochs: expected at least {len(training.history)}, which {job.output.root} has had, got "
            f"{job.config.epochs}; give more, or start over by --overwrite in place of --resume"
        )
    num_deaths = 0
    while True:
        num_epochs = len(training.history)
        try:
            actors = actors or _start_actors(job.config, job.allocation, job.model)
            scratch = job.config.scratch if job.storage == "disk" else None
            counts = feed(job, actors, begin_actors(actors, job.plan, job.allocation, scratch))
            _check_images(job, counts, fingerprint)
            if num_deaths == 0:
                notices.say_where_gpus_are_missing(job, counts)
            _compute(job, actors, counts, training, fingerprint)
            if job.plan.model is not None:
                runs = [actor.call.remote("describe_runs") for actor in actors]
                counts.runs = wait_all(runs, "the model", partial(job.show, "score", 1, 1))
            run = write_results(job, counts, training, find_duplicates(job, counts))
            return run, [counts.noted[part] for part in sorted(counts.noted)]
        except ActorLostError as exc:
            train.save(job, training, fingerprint)
            num_deaths = num_deaths + 1 if len(training.history) == num_epochs else 1
            if num_deaths > _MAX_DEATHS:
                raise ClusterError(f"the actors: expected them to run, got {num_deaths} deaths; {exc}") from exc
            logger.warning("%s; restarting all actors, to go on after epoch %d", exc, len(training.history))
            job = _reallocate(job)
        except BaseException:  # an interrupt above all: what is trained so far is what --resume goes on from
            try:
                train.save(job, training, fingerprint)
            except OutputError as exc:  # which would stand in the place of what ended the job
                logger.warning("%s", exc)
            raise
        finally:
            # At once: a reference in somebody's traceback would keep them, and their GPUs, from the next job.
            end_actors(actors)
            actors = []


def _compute(
    job: Job, actors: list[Actor], counts: ImageCounts, training: Training, fingerprint: dict[str, Any]
) -> None:
    """Do what actors do with images that they keep."""
    if job.plan.has_training:
        train.train(job, actors, training, fingerprint)
    if job.plan.num_neighbors > 0:
        counts.neighbors = neighbors.find(job, actors)
    if job.plan.keeps_images:
        score(job, actors, counts)


def _reallocate(job: Job) -> Job:
    """Look at what is left of the cluster, since what died may have been a node."""
    show = job.on_progress
    cluster.wait_for_gpus(job.config, lambda what, done, total: show(Progress(what, done, total, 0.0)))
    nodes = cluster.living_nodes()
    allocation = _allocate(job.config, nodes)
    if job.allocation.gpus_per_actor > 0 and allocation.gpus_per_actor == 0:
        logger.warning("the GPUs are gone: going on on the CPU, whose sums differ from a GPU's in their last bits")
    # Once on disk, on disk: how much of it actors that are ending still take is not to be told.
    kept_in = "disk" if job.storage == "disk" else _choose_storage(job.config, job.plan, allocation, nodes, show)
    return replace(job, allocation=allocation, storage=kept_in, node_ids=frozenset(node.node_id for node in nodes))


def _check_images(job: Job, counts: ImageCounts, fingerprint: dict[str, Any]) -> None:
    """See that what training goes on with are the images that it began with, not others under their names."""
    images = hashlib.sha256(counts.train_counts_K.tobytes() + counts.means_KD.tobytes()).hexdigest()
    if fingerprint.setdefault("images", images) != images:
        raise OutputError(
            f"{job.listing.location.root}: expected the images with which {job.output.root} was begun, got others; run "
            "with the same data, or give --overwrite"
        )
