"""A linear model: where its training begins, what of its steps is reported, and how it scores.

Input: class means; uint8 images, one row an image. Output: a centre, a step's length, probabilities. Invariant: images
are scored in products of as many rows, whoever scores them.

Axes: N images, R rows of a product, C columns of inputs, K classes, D values of one image, P parameters (K·D weights,
class by class, then K biases), float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

from pipeline.compute.lane_products import write_logits
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params, empty_inputs, fill_inputs

if TYPE_CHECKING:
    from pipeline.compute.block import Block

# Rows scored at once, by the size of an image alone: products of another shape may differ in the last bit.
_MAX_SCORE_ROWS = 1024
_SCORE_BYTES = 12 * 2**20
# Of a feature's variance, so much of the mean of all is added: what hardly varies is not made large.
_SCALE_FLOOR = 0.1
_POWER_STEPS = 30
# Of the weights of steps in the mean of all: the mean is that of about the last third of them.
_DECAY = 2


@dataclass(frozen=True)
class Centre:
    """The mean training image, and the step that is safe for images around it.

    Attributes:
        centre_D: What training and scoring take off the pixels, float64, 0 to 1, on the CPU.
        safe_rate: The length of the step.
    """

    centre_D: torch.Tensor
    safe_rate: float


def find_centre(
    counts_K: torch.Tensor, means: Iterable[torch.Tensor], num_squares: int, square_unit: int = 255**2
) -> Centre:
    """Find the mean image, and the step that is safe for images around it.

    Descent is stable while the step is below 2 / L, where L, the largest curvature of softmax cross-entropy, is at most
    half the mean squared norm of the inputs, the constant 1 of the bias included (D. Böhning, "Multinomial logistic
    regression algorithm", Ann. Inst. Stat. Math. 44 (1992), 197-200). Taking the mean image off makes that norm small:
    what all images share would otherwise decide it.

    Args:
        counts_K: int64, the images of each class.
        means: Of the classes, one after the other, float32 [D], 0 to 1, as `nearest_mean.class_means` returns them.
        num_squares: The sum of all squared pixels.
        square_unit: The value of a square that stands for 1.
    """
    # On the CPU, in float64 and in the classes' order, so that every actor and every device finds the same.
    shares_K = counts_K.cpu().double() / int(counts_K.sum())
    centre_D = torch.zeros((), dtype=torch.float64)
    for share, mean_D in zip(shares_K, means, strict=True):
        if share:
            centre_D = centre_D + share * mean_D.cpu().double()
    variance = num_squares / (square_unit * int(counts_K.sum())) - float(centre_D.square().sum())
    return Centre(centre_D, 4 / (variance + 1))


@dataclass(frozen=True)
class Scale:
    """What makes features alike in size, and the step that is safe for them.

    Attributes:
        scale_D: By what features less their mean are multiplied, float64, on the CPU.
        safe_rate: The length of a step.
    """

    scale_D: torch.Tensor
    safe_rate: float


def find_scale(features_ND: torch.Tensor, centre_D: torch.Tensor, batch_size: int) -> Scale:
    """Find the scale of each feature, and the step that is safe for batches of so many images.

    A model's features are of any scale, and a step that is safe for the largest of them moves the weights of the others
    too slowly to be done in some ten epochs; so they are brought to variances of about 1. Of a batch of b images the
    largest curvature is known better than of one: with λ for the largest eigenvalue of the features' second moments and
    T for their trace, the step is safe below 4b / ((b - 1) λ + T) (S. Ma, R. Bassily, M. Belkin, "The power of
    interpolation", ICML 2018, with Böhning's bound, see `find_centre`).

    Args:
        features_ND: Some training images, at least one, of all classes.
        centre_D: float64, what training takes off them.
        batch_size: b.
    """
    centred_ND = features_ND.cpu().double() - centre_D
    variance_D = centred_ND.square().mean(0)
    scale_D = (variance_D + _SCALE_FLOOR * (float(variance_D.mean()) or 1.0)).rsqrt()
    scaled_ND = centred_ND * scale_D
    # By the power method: from all directions at once, so that the largest one is among them.
    largest, direction_D = 0.0, torch.ones_like(centre_D)
    for _ in range(_POWER_STEPS):
        direction_D = scaled_ND.T @ (scaled_ND @ direction_D) / len(scaled_ND)
        largest = float(direction_D.norm())
        direction_D /= max(largest, torch.finfo(torch.float64).tiny)
    trace = float(scaled_ND.square().sum()) / len(scaled_ND) + 1
    return Scale(scale_D, 4 * batch_size / ((batch_size - 1) * max(1.0, largest) + trace))


def initial_params(num_classes: int, num_values: int) -> torch.Tensor:
    """Return the parameters before the first step, float32 [P], zero: one value in memory, only to be read.

    The loss is convex, so that any start leads to the same minimum; where there are more values than images to hold
    them, random weights would stay to the end, as noise.
    """
    return torch.zeros(()).expand(num_classes * num_values + num_classes)


def average(mean_P: torch.Tensor, params_P: torch.Tensor, num_steps: int) -> None:
    """Take the parameters after a step into their weighted mean over all steps, in place: the model that is reported.

    With steps of one length the parameters jitter around the minimum; their mean settles (B. T. Polyak, A. B. Juditsky,
    "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 30 (1992)). The weight of a step
    grows with the square of its number, so that the first ones are forgotten and no number of steps need be known
    (O. Shamir, T. Zhang, "Stochastic gradient descent for non-smooth optimization", ICML 2013, polynomial decay).

    Args:
        mean_P: The mean before this step; its values do not matter at the first one.
        params_P: The parameters after this step.
        num_steps: How many steps there have been, this one included.
    """
    mean_P.lerp_(params_P, (_DECAY + 1) / (num_steps + _DECAY))


def score(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Score a block by the probability of each class; see `classifiers.Scorer`."""
    trained = block.trained
    assert trained.model is not None
    log_probabilities_NK = log_probabilities(
        trained.model, block.images_ND, trained.centre_D, block.threads, trained.scale_D
    )
    return log_probabilities_NK.exp(), log_probabilities_NK.argmax(1)


def score_rows(num_values: int) -> int:
    """Return how many images of D values are scored by one product; their float32 copy bounds the memory."""
    return max(1, min(_MAX_SCORE_ROWS, _SCORE_BYTES // (4 * num_values)))


def log_probabilities(
    model: Params,
    images_ND: torch.Tensor,
    centre_D: torch.Tensor | float = 0.0,
    threads: Threads | None = None,
    scale_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score images: the logarithm of the probability of every class, float32 [N, K]; centre and scale as in training.

    `threads` share the products, on a CPU.
    """
    num_images, num_values = images_ND.shape
    num_rows = score_rows(num_values)
    result_NK = torch.empty(num_images, model.num_classes, device=images_ND.device)

    def fill(start: int) -> None:
        rows = slice(start, start + num_rows)
        inputs_RC = empty_inputs(len(images_ND[rows]), num_values, images_ND.device)
        fill_inputs(inputs_RC, images_ND[rows], centre_D, scale_D)
        logits_RK = torch.empty(len(inputs_RC), model.num_classes, device=images_ND.device)
        write_logits(model, inputs_RC, [len(inputs_RC)], logits_RK, Threads())
        result_NK[rows] = log_softmax(logits_RK, 1)

    shared = threads if threads is not None and images_ND.device.type == "cpu" else Threads()
    shared.run(fill, range(0, num_images, num_rows))
    return result_NK


def derive_seed(*parts: object) -> int:
    """Turn what a random stream is for into a seed; streams of neighbouring seeds or lanes have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
