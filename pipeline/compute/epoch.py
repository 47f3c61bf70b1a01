"""The losses and hits of one epoch, as one actor meets them.

Input: what every step gives. Output: an `EpochRecord`. Invariant: a lane's losses are added lane by lane, so that the
sums do not depend on which actor holds which lane.

Axes: B rows of a step, R rows that a lane gives to a step at most, S steps, Z lanes of this actor.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipeline.results.figures import EpochRecord

# Steps whose figures are put together at once: one by one they would cost a small step a twentieth.
_MAX_WAITING = 64


class EpochSums:
    """What one actor adds up in an epoch.

    Args:
        lanes: The numbers of its Z lanes.
        num_steps: S.
        lane_rows: R.
        device: Where steps are computed, and their figures kept until the end: a GPU is not waited for in each step.
    """

    def __init__(self, lanes: Sequence[int], num_steps: int, lane_rows: int, device: torch.device) -> None:
        self.num_steps_done = 0
        self._started = time.perf_counter()
        self._lanes = lanes
        self._losses_SZR = torch.zeros(num_steps, len(lanes), lane_rows, device=device)
        self._num_correct = torch.zeros((), dtype=torch.int64, device=device)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, Sequence[int]]] = []

    def add_step(self, losses_B: torch.Tensor, is_correct_B: torch.Tensor, lane_counts: Sequence[int]) -> None:
        """Take the next step's figures.

        Args:
            losses_B: float32, in nats, lane after lane.
            is_correct_B: bool.
            lane_counts: Rows of each lane.
        """
        self.num_steps_done += 1
        self._waiting.append((losses_B, is_correct_B, lane_counts))
        if len(self._waiting) == _MAX_WAITING:
            self._take_waiting()

    def _take_waiting(self) -> None:
        if not self._waiting:
            return
        losses, is_correct, counts = zip(*self._waiting, strict=True)
        losses_SZR = self._losses_SZR[self.num_steps_done - len(counts) : self.num_steps_done]
        if all(len(losses_B) == losses_SZR[0].numel() for losses_B in losses):
            losses_SZR.view(-1).copy_(torch.cat(losses))
        else:
            for losses_ZR, losses_B, lane_counts in zip(losses_SZR, losses, counts, strict=True):
                for lane_losses_R, lane_losses_B in zip(losses_ZR, losses_B.split(list(lane_counts)), strict=True):
                    lane_losses_R[: len(lane_losses_B)] = lane_losses_B
        self._num_correct += torch.cat(is_correct).sum()
        self._waiting.clear()

    def record(
        self,
        epoch: int,
        num_train: int,
        gradient_norm: float,
        line_sums: Mapping[int, list[float]],
        part_losses: Mapping[int, float],
        valid_confusion_KK: npt.NDArray[np.int64],
    ) -> EpochRecord:
        """Put the epoch's figures together.

        Args:
            epoch: From 1.
            num_train: Images of this actor's lanes.
            gradient_norm: The average over the steps, of all lanes.
            line_sums: By lane, what `Descent.look_along` returns.
            part_losses: By part, the sum of its validation images' losses after the epoch.
            valid_confusion_KK: Of these parts.
        """
        self._take_waiting()
        num_steps = len(self._losses_SZR)
        return EpochRecord(
            epoch=epoch,
            num_steps=num_steps,
            lane_losses={
                lane: float(self._losses_SZR[:, index].double().sum()) for index, lane in enumerate(self._lanes)
            },
            num_train_correct=int(self._num_correct),
            num_train=num_train,
            part_losses=dict(part_losses),
            valid_confusion=valid_confusion_KK,
            gradient_norm=gradient_norm,
            line_sums=dict(line_sums),
            seconds=time.perf_counter() - self._started,
        )
