"""A block of validation images beside what was learnt from the training images: what a classifier scores.

Input: images on a device and a `Trained`. Output: what several classifiers share, computed once. Invariant: a block is
scored on the device that it is on.

Axes: N images, J neighbors, K classes, D values of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from pipeline.compute.classifiers import nearest_mean
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params
from pipeline.model import Model


@dataclass
class Trained:
    """What was computed from all training images.

    Attributes:
        counts_K: Training images of each class, int64.
        means_KD: Their means, float32, 0 to 1.
        model: The linear model, the mean over the steps of SGD; None without SGD.
        centre_D: The mean image, which is taken off the linear model's inputs, float32; empty without SGD.
        own_model: What is known of the user's own model; None without one.
        scale_D: Of features, by what those inputs are multiplied, float32; None of pixels.
    """

    counts_K: torch.Tensor
    means_KD: torch.Tensor
    model: Params | None
    centre_D: torch.Tensor
    own_model: Model | None = None
    scale_D: torch.Tensor | None = None


@dataclass
class Block:
    """Images that are scored together.

    Attributes:
        images_ND: uint8, 0 to 255.
        trained: What was learnt.
        threads: They share the work, on the CPU.
        neighbor_labels_NJ: The classes of their nearest training images, int64; empty where none are searched for.
        logits_NO: What the user's own model answers, float32; empty without one.
        voters: Of features, the classes, int64, and cosine distances, float32, of the nearest training images, [N, J].
        given: What was predicted elsewhere, as a `classifiers.Scorer` returns it; None for nothing.
    """

    images_ND: torch.Tensor
    trained: Trained
    threads: Threads = field(default_factory=Threads)
    neighbor_labels_NJ: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    logits_NO: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    voters: tuple[torch.Tensor, ...] = ()
    given: tuple[torch.Tensor | None, torch.Tensor] | None = None

    @cached_property
    def distances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The distances to all class means by `l1` and `rms`, float32 [N, K] each."""
        return nearest_mean.distances(self.images_ND, self.trained.means_KD, self.threads)
