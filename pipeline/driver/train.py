"""Training epoch by epoch, as the driver sees it: a small record of each, checkpoints, and when to stop.

Input: a `Job` and actors that hold its images. Output: a `Training` that is kept up to date. Invariant: what is in it
belongs to finished epochs, so that new actors can go on from it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from pipeline.driver.actors import Actor, follow
from pipeline.driver.state import Job
from pipeline.driver.waiting import Ref, get_result, wait_all
from pipeline.errors import TrainingError
from pipeline.model import Model
from pipeline.results import checkpoint, figures
from pipeline.results.checkpoint import Checkpoint
from pipeline.results.figures import EpochMetric

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 5.0
# What training computes, to the last bit: another version's cannot go on here.
_MODEL = "mean of all steps, pixels times 1/255, lanes added as a tree, many classes in place"
_MODEL_OF_FEATURES = "mean of all steps, features of variance 1, lanes added as a tree, many classes in place"


@dataclass
class Training:
    """Training as it stands, which outlives the actors.

    Attributes:
        history: A row a finished epoch.
        params: Those after the last step, and behind them their mean over all steps, float32 [2P]; None before the
            first epoch.
        learning_rate: None before training has begun.
        centre_D: The mean image, float64, 0 to 1; None before training has begun.
        scale_D: Of features, by what they are multiplied less their mean, float64; None of pixels.
    """

    history: list[EpochMetric]
    params: npt.NDArray[np.float32] | None
    learning_rate: float | None = None
    centre_D: npt.NDArray[np.float64] | None = None
    scale_D: npt.NDArray[np.float64] | None = None

    @property
    def model(self) -> npt.NDArray[np.float32] | None:
        """The parameters that are reported, float32 [P]."""
        return None if self.params is None else np.split(self.params, 2)[1]


def train(job: Job, actors: list[Actor], training: Training, fingerprint: dict[str, Any]) -> None:
    """Train epoch by epoch until one of the four rules says stop.

    Args:
        job: The job.
        actors: Its actors, with all images.
        training: As it stands; kept up to date with every finished epoch.
        fingerprint: What checkpoints are of.

    Raises:
        ActorLostError: If an actor dies.
        TrainingError: If the loss is no number any more.
    """
    job.clock.enter("train")
    last_saved = time.monotonic()
    begun = [actor.call.remote("begin_training") for actor in actors]
    num_steps = -(-max(job.plan.assignment.lane_sizes) // (job.plan.batch_size // job.plan.num_lanes))
    epoch = len(training.history) + 1
    answers = wait_all(begun, "beginning to train", lambda: job.show("train", 0, num_steps, epoch=epoch))
    training.learning_rate, training.centre_D, training.scale_D = answers[0]
    if training.params is not None:
        _give_params(job, actors, training.params)
    refs = _begin_epoch(job, actors, training.history)
    while refs:
        epoch = len(training.history) + 1
        loss = training.history[-1].train_loss if training.history else None
        show = partial(job.show, "train", total=num_steps, epoch=epoch, loss=loss)
        records = wait_all([record for record, _ in refs], f"epoch {epoch}", follow(actors[0], show))
        row = figures.epoch_metric(records)
        if bad_losses := [loss for loss in (row.train_loss, row.valid_loss) if not math.isfinite(loss)]:
            raise TrainingError(
                f"epoch {epoch}: expected a loss, got {bad_losses[0]}; give a smaller --learning-rate than "
                f"{training.learning_rate:g}"
            )
        # The actors are at the next epoch while this one's parameters come, and are saved.
        pieces = _ask_params(job, actors[0], refs[0][1])
        refs = _begin_epoch(job, actors, [*training.history, row])
        # Not references: they would be lost with the node of the first actor. Before the history, which it belongs to.
        training.params = _join_params(job, pieces)
        training.history.append(row)
        if time.monotonic() - last_saved > _CHECKPOINT_SECONDS:
            save(job, training, fingerprint)
            last_saved = time.monotonic()
    _say_if_it_only_guesses(job, training)


def _begin_epoch(job: Job, actors: list[Actor], history: Sequence[EpochMetric]) -> list[tuple[Ref, Ref]]:
    """Have the actors train for the epoch after those of a history, unless that says stop.

    Returns:
        For each, references to its record, and to the first piece of the parameters.
    """
    if figures.stop_reason(job.config, history) is not None:
        return []
    return [actor.call.options(num_returns=2).remote("train_epoch", len(history) + 1) for actor in actors]


def _give_params(job: Job, actors: list[Actor], params_2P: npt.NDArray[np.float32]) -> None:
    """Give actors the parameters, some classes after the other."""
    views = _by_class(params_2P, job.plan.num_classes)
    for classes in job.plan.class_pieces:
        piece = ray.put(np.concatenate([view[classes.start : classes.stop].ravel() for view in views]))
        given = [actor.call.remote("load_params", classes.start, piece) for actor in actors]
        wait_all(given, "giving actors the parameters", lambda: False)


def _ask_params(job: Job, actor: Actor, first: Ref) -> deque[Ref]:
    """Ask an actor for the parameters as they are now, in the same way; of the first piece there is a reference."""
    later = (actor.call.remote("params_from", classes.start) for classes in job.plan.class_pieces[1:])
    return deque([first, *later])


def _join_params(job: Job, pieces: deque[Ref]) -> npt.NDArray[np.float32]:
    """Put the parameters together, float32 [2P]; a piece is let go as soon as it is copied."""
    num_classes = job.plan.num_classes
    params_2P = np.empty(2 * num_classes * (job.plan.num_values + 1), np.float32)
    views = _by_class(params_2P, num_classes)
    for classes in job.plan.class_pieces:
        piece_2p = get_result(pieces.popleft(), "the parameters")
        for own, given in zip(views, _by_class(piece_2p, len(classes)), strict=True):
            own[classes.start : classes.stop] = given
    return params_2P


def _by_class(params_2p: npt.NDArray[np.float32], num_classes: int) -> list[npt.NDArray[np.float32]]:
    """View parameters of so many classes as weights [k, D] and biases [k], those of the last step and their mean."""
    halves = np.split(params_2p, 2)
    return [view for half in halves for view in (half[:-num_classes].reshape(num_classes, -1), half[-num_classes:])]


def save(job: Job, training: Training, fingerprint: dict[str, Any]) -> None:
    """Write a checkpoint of what is trained so far, if anything is."""
    if training.params is not None:
        checkpoint.write_checkpoint(job.output, Checkpoint(fingerprint, training.history, training.params))


def fingerprint_of(job: Job) -> dict[str, Any]:
    """Say what training depends on: with these equal, it can go on where it stopped."""
    config, model = job.config, job.plan.model
    own = {} if model is None else {"--model": model.sha256, "--model-output": model.output, **_input_of(model)}
    return {
        **own,
        "listing": job.listing.sha256,
        "target": f"{job.target.height}x{job.target.width} {job.target.mode}",
        "--draft": config.draft,
        "--learning-rate": config.learning_rate,
        "--batch-size": config.batch_size,
        "--seed": config.seed,
        "--lanes": config.lanes,
        "model": _MODEL_OF_FEATURES if job.plan.has_features else _MODEL,
        "--scores": job.given.about["sha256"] if job.given else None,
    }


def _input_of(model: Model) -> dict[str, Any]:
    """Say what features depend on, beside the model."""
    asked = {"--model-mean": list(model.mean), "--model-std": list(model.std), "--feature-dtype": model.feature_dtype}
    return {**asked, "--model-batch-size": model.batch_size, "model input": asdict(model.input)}


def _say_if_it_only_guesses(job: Job, training: Training) -> None:
    last, guessing = training.history[-1], math.log(job.plan.num_classes)
    loss = last.train_loss
    if loss > guessing and last.epoch * last.num_steps > 1:  # before the first step, it can do nothing else
        logger.warning(
            "training: expected a loss below %.4g, that of guessing, got %.4g; give a smaller "
            "--learning-rate than %g",
            guessing, loss, training.learning_rate,
        )  # fmt: skip
