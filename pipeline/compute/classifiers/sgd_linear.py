"""A linear model and its stochastic gradient descent, with the gradient cut into lanes.

Input: uint8 images, one row an image, and labels. Output: parameters, losses, probabilities. Invariant: a lane's
gradient is computed from its own rows by products of its own, and lanes are added in their order, so that the result
does not depend on which process holds which lane.

Axes: N images, B rows of a step, K classes, D values of one image, L lanes, Z lanes that one process holds, P
parameters (K·D weights, class by class, then K biases). Parameters and gradients are float32, labels int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

if TYPE_CHECKING:
    from pipeline.compute.block import Block

# Rows scored at once, by the size of an image alone: products of another shape may differ in the last bit.
_MAX_SCORE_ROWS = 1024
_SCORE_BYTES = 32 * 2**20
# Rows of a step that are taken through all its operations at once: more do not stay in a processor's cache.
_STEP_ROWS = 512
# Of the weights of steps in the mean of all: the mean is that of about the last third of them.
_DECAY = 2


@dataclass(frozen=True)
class Centre:
    """The mean training image, and the step that is safe for images around it.

    Attributes:
        centre_D: What training and scoring take off the pixels, float32, 0 to 1, on the CPU.
        of_means_D: The same as the mean of the class means, float64: with it the written bias is that of the written
            means, whoever computes it.
        safe_rate: The length of the step.
    """

    centre_D: torch.Tensor
    of_means_D: torch.Tensor
    safe_rate: float


def find_centre(sums_KD: torch.Tensor, counts_K: torch.Tensor, means_KD: torch.Tensor, num_squares: int) -> Centre:
    """Find the mean image, and the step that is safe for images around it.

    Descent is stable while the step is below 2 / L, where L, the largest curvature of softmax cross-entropy, is at most
    half the mean squared norm of the inputs, the constant 1 of the bias included (D. Böhning, "Multinomial logistic
    regression algorithm", Ann. Inst. Stat. Math. 44 (1992), 197-200). Taking the mean image off makes that norm small:
    what all images share would otherwise decide it.

    Args:
        sums_KD: int64, the sums of each class's pixels, 0 to 255.
        counts_K: int64, the images in these sums.
        means_KD: float32, 0 to 1, as `nearest_mean.class_means` returns them.
        num_squares: The sum of all squared pixels.
    """
    # On the CPU and in float64, so that every actor and every device finds the same.
    counts_K = counts_K.cpu()
    num_images = int(counts_K.sum())
    centre_D = sums_KD.sum(0).cpu().double() / (255 * num_images)
    variance = num_squares / (255**2 * num_images) - float(centre_D.square().sum())
    of_means_D = counts_K.double() @ means_KD.cpu().double() / num_images
    return Centre(centre_D.float(), of_means_D, 4 / (variance + 1))


def initial_params(num_classes: int, num_values: int) -> torch.Tensor:
    """Return the parameters before the first step, float32 [P], zero.

    The loss is convex, so that any start leads to the same minimum; where there are more values than images to hold
    them, random weights would stay to the end, as noise.
    """
    return torch.zeros(num_classes * num_values + num_classes)


def split_params(params_P: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """View parameters, or a gradient, as weights [K, D] and bias [K]."""
    weights_KD = params_P[:-num_classes].view(num_classes, -1)
    return weights_KD, params_P[-num_classes:]


def lane_gradients(
    params_P: torch.Tensor,
    images_BD: torch.Tensor,
    labels_B: torch.Tensor,
    lane_counts: Sequence[int],
    gradients_ZP: torch.Tensor,
    centre_D: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict a step's rows and write each lane's gradient of the summed cross-entropy.

    For softmax cross-entropy the gradient by the logits is the probabilities minus the one-hot label (Bishop, "Pattern
    Recognition and Machine Learning", 2006, eq. 4.109), so no graph is recorded.

    Args:
        params_P: The model.
        images_BD: uint8, lane after lane.
        labels_B: int64.
        lane_counts: Rows of each lane, adding up to B.
        gradients_ZP: Overwritten, for each lane, with the sum over its rows; as `empty_gradients` makes it.
        centre_D: Taken off the pixels, both 0 to 1.

    Returns:
        The losses [B], float32 in nats, and whether each row was predicted right [B], bool.
    """
    num_lanes = max(1, _STEP_ROWS // max(1, *lane_counts))
    losses, is_correct, start = [], [], 0
    for first in range(0, len(lane_counts), num_lanes):
        counts = lane_counts[first : first + num_lanes]
        stop = start + sum(counts)
        some_losses_B, is_some_correct_B = _some_gradients(
            params_P,
            images_BD[start:stop],
            labels_B[start:stop],
            counts,
            gradients_ZP[first : first + num_lanes],
            centre_D,
        )
        losses.append(some_losses_B)
        is_correct.append(is_some_correct_B)
        start = stop
    return torch.cat(losses), torch.cat(is_correct)


def _some_gradients(
    params_P: torch.Tensor,
    images_BD: torch.Tensor,
    labels_B: torch.Tensor,
    lane_counts: Sequence[int],
    gradients_ZP: torch.Tensor,
    centre_D: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `lane_gradients` does for some of its lanes, with the same results."""
    num_classes = params_P.shape[0] // (images_BD.shape[1] + 1)
    weights_KD, bias_K = split_params(params_P, num_classes)
    inputs_BD = _aligned_rows(images_BD).div_(255).sub_(centre_D)
    weights_DK = weights_KD.T
    inputs = inputs_BD.split(lane_counts)
    # Products lane by lane, from and to aligned memory: their last bits depend on the number of rows, and on some
    # processors on the address. All else works row by row.
    logits_BK = torch.cat([torch.addmm(bias_K, lane_inputs_BD, weights_DK) for lane_inputs_BD in inputs])
    is_correct_B = logits_BK.argmax(1) == labels_B
    log_probabilities_BK = log_softmax(logits_BK, 1)
    losses_B = -log_probabilities_BK.gather(1, labels_B[:, None]).squeeze(1)
    errors_BK = _aligned_rows(log_probabilities_BK.exp_())
    errors_BK.scatter_add_(1, labels_B[:, None], torch.full_like(losses_B, -1)[:, None])
    errors = errors_BK.split(lane_counts)
    gradients = gradients_ZP[:, :-num_classes].unflatten(1, weights_KD.shape).unbind()
    for lane_errors_BK, lane_inputs_BD, gradient_KD in zip(errors, inputs, gradients, strict=True):
        torch.mm(lane_errors_BK.T, lane_inputs_BD, out=gradient_KD)
    gradients_ZK = gradients_ZP[:, -num_classes:]
    if lane_counts.count(lane_counts[0]) == len(lane_counts):
        # [Z·R, K] -> [Z, R, K] -> [Z, K], the same additions as below in one call.
        gradients_ZK.copy_(errors_BK.unflatten(0, (len(lane_counts), -1)).sum(1))
    else:
        gradients_ZK.copy_(torch.stack([lane_errors_BK.sum(0) for lane_errors_BK in errors]))
    return losses_B, is_correct_B


def empty_gradients(num_lanes: int, num_params: int, device: torch.device) -> torch.Tensor:
    """Make room for gradients, float32 [Z, P], zero: each begins at a multiple of 64 bytes, as products need it."""
    return torch.zeros(num_lanes, -(-num_params // 16) * 16, device=device)[:, :num_params]


def step(
    params_P: torch.Tensor, gradients_LP: Sequence[torch.Tensor], num_images: int, learning_rate: float
) -> torch.Tensor:
    """Add the lanes' gradients in order and move the parameters, in place, against their mean.

    Args:
        params_P: The model.
        gradients_LP: Sums over the rows of each lane.
        num_images: Rows of all lanes in this step.
        learning_rate: The step's length in units of the mean gradient.

    Returns:
        The norm of the mean gradient, a scalar.
    """
    total_P = gradients_LP[0].clone()
    for gradient_P in gradients_LP[1:]:
        total_P += gradient_P
    total_P /= num_images
    params_P.sub_(total_P, alpha=learning_rate)
    norm: torch.Tensor = torch.linalg.vector_norm(total_P)
    return norm


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
    num_classes = len(trained.counts_K)
    log_probabilities_NK = log_probabilities(trained.params_P, block.images_ND, num_classes, trained.centre_D)
    return log_probabilities_NK.exp(), log_probabilities_NK.argmax(1)


def score_rows(num_values: int) -> int:
    """Return how many images of D values are scored by one product; their float32 copy bounds the memory."""
    return max(1, min(_MAX_SCORE_ROWS, _SCORE_BYTES // (4 * num_values)))


def log_probabilities(
    params_P: torch.Tensor, images_ND: torch.Tensor, num_classes: int, centre_D: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Score images: the logarithm of the probability of every class, float32 [N, K]; `centre_D` as in training."""
    weights_KD, bias_K = split_params(params_P, num_classes)
    blocks = [
        log_softmax(torch.addmm(bias_K, block_ND.float().div_(255).sub_(centre_D), weights_KD.T), 1)
        for block_ND in images_ND.split(score_rows(images_ND.shape[1]))
    ]
    return torch.cat(blocks)


def _aligned_rows(rows_BV: torch.Tensor) -> torch.Tensor:
    """Copy rows as float32 to where each begins at a multiple of 64 bytes, as every tensor of torch's does."""
    num_rows, num_values = rows_BV.shape
    padded_BV = torch.empty(num_rows, -(-num_values // 16) * 16, device=rows_BV.device)
    return padded_BV[:, :num_values].copy_(rows_BV)


def derive_seed(*parts: object) -> int:
    """Turn what a random stream is for into a seed; streams of neighbouring seeds or lanes have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
