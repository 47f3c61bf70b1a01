"""Stochastic gradient descent of the linear model, tile by tile, by one actor or several.

Input: the rows of an actor's lanes in a step. Output: their losses; and parameters that have moved. Invariant: nothing
as large as a lane's whole gradient is ever held, and neither the number of actors nor that of threads changes a bit.

Each unit of a tile has one actor that steps it: the others send it their sums of that unit's gradient, and get its new
parameters. So twice the parameters leave an actor in a step, less what stays: a reduce-scatter and an all-gather
(R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", Int. J. High
Perform. Comput. Appl. 19 (2005)), except that sums are made in the tree's order.

Axes: as in `tiles`; A actors, T tiles (of `look_along`, lengths); n values of some units in one piece.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.classifiers import sgd_linear
from pipeline.compute.collective import Collective, Pieces
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params, Tile, add_lanes, add_tree, empty_inputs, fill_inputs, write_logits
from pipeline.results.figures import LINE

# What actors exchange at once: enough to make up for the wait.
_ROUND_VALUES = 2**20
# Rows of fewer inputs, or classes, go through operations together: more calls would cost more than threads could save.
_MIN_SHARED_INPUTS, _MIN_SHARED_LOGITS = 2**19, 2**14


@dataclass(frozen=True)
class _Rows:
    """What a step's gradient is made of: errors_KB, derivatives of the losses by the logits, and inputs_BC."""

    errors_KB: torch.Tensor
    inputs_BC: torch.Tensor
    lane_counts: list[int]


@dataclass(frozen=True)
class _LastStep:
    """What an epoch's last step was made from: inputs, which stay until the next epoch, and logits before it."""

    inputs_BC: torch.Tensor
    labels_B: torch.Tensor
    lane_counts: list[int]
    logits_BK: torch.Tensor


@dataclass(frozen=True)
class _Buffers:
    """One thread's memory as a tile of one shape needs it: all of it [k, c], two of them also [U, M]."""

    first_UM: torch.Tensor
    second_UM: torch.Tensor
    matrices: list[torch.Tensor]


class Descent:
    """One actor's part in the descent.

    Args:
        num_classes: K.
        num_values: D.
        num_lanes: Lanes of this actor.
        device: Where it computes.
        collective: What connects it with the others.
        threads: They share its work, on a CPU.
    """

    def __init__(
        self,
        num_classes: int,
        num_values: int,
        num_lanes: int,
        *,
        device: torch.device,
        collective: Collective,
        threads: Threads,
    ) -> None:
        self.params = Params(num_classes, num_values, device)
        self.mean = Params(num_classes, num_values, device)
        self._scale: Params | None = None
        self._collective = collective
        self._threads = threads if device.type == "cpu" else Threads()
        # As many as a tree of the lanes needs, and at least two.
        self._num_buffers = max(1, (num_lanes - 1).bit_length()) + 1
        self._of_thread = threading.local()
        self._inputs_BC = empty_inputs(0, num_values, device)
        self._last: _LastStep | None = None
        self._received: dict[int, torch.Tensor] = {}
        tiles = self.params.tiles
        size = max(1, _ROUND_VALUES // max(tile.size for tile in tiles))
        # Of every tile what this actor steps.
        spans = [self._span(number, collective.rank) for number in range(len(tiles))]
        units = zip(spans, self.params.units, self.mean.units, strict=True)
        self._own_units = [(span, params_UM[span], mean_UM[span]) for span, params_UM, mean_UM in units]
        self._rounds = [range(len(tiles))[first : first + size] for first in range(0, len(tiles), size)]

    def load(self, last_P: torch.Tensor, mean_P: torch.Tensor) -> None:
        """Take the parameters after the last step, and their mean over all steps, float32 [P] each."""
        self.params.load(last_P)
        self.mean.load(mean_P)

    def scale(self, squares_D: torch.Tensor) -> None:
        """Multiply the gradients of the weights of each value by a factor from now on; those of biases stay."""
        self._scale = Params(self.params.num_classes, self.params.num_values, self.params.device)
        squares_KD = squares_D.float().to(self.params.device).expand(self.params.num_classes, -1)
        self._scale.load(torch.cat((squares_KD.flatten(), squares_KD.new_ones(len(squares_KD)))))

    def save(self) -> npt.NDArray[np.float32]:
        """Return what `load` took, as it is now, one behind the other, float32 [2P]."""
        num_params = self.params.num_classes * (self.params.num_values + 1)
        saved_2P = torch.empty(2, num_params, device=self.params.device)
        self.params.save(saved_2P[0])
        self.mean.save(saved_2P[1])
        return saved_2P.flatten().cpu().numpy()

    def begin_epoch(self, num_steps: int, num_steps_before: int, learning_rate: float) -> None:
        """Prepare for so many steps, after so many of former epochs, of one length in units of the mean gradient."""
        max_units = max(tile.num_units for tile in self.params.tiles)
        self._squares_STU = torch.zeros(num_steps, len(self.params.tiles), max_units, device=self.params.device)
        self._num_images: list[int] = []
        self._num_steps_before, self._learning_rate = num_steps_before, learning_rate

    def step(
        self,
        images_BD: torch.Tensor,
        labels_B: torch.Tensor,
        lane_counts: list[int],
        centre_D: torch.Tensor | float,
        num_images: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict a step's rows and move the parameters, and the mean, of all actors.

        For softmax cross-entropy the gradient by the logits is the probabilities minus the one-hot label (Bishop,
        "Pattern Recognition and Machine Learning", 2006, eq. 4.109), so no graph is recorded.

        Args:
            images_BD: uint8, lane after lane.
            labels_B: int64.
            lane_counts: Rows of each lane, adding up to B.
            centre_D: Taken off the pixels, both 0 to 1.
            num_images: Rows of all actors in this step.

        Returns:
            The losses [B], float32 in nats, and whether each row was predicted right [B], bool.

        Raises:
            ActorLostError: If another actor is gone.
        """
        self._num_images.append(num_images)
        inputs_BC = self._take_inputs(images_BD, centre_D)
        logits_BK = self._logits(inputs_BC, lane_counts)
        if len(self._num_images) == len(self._squares_STU):
            self._last = _LastStep(inputs_BC, labels_B, lane_counts, logits_BK.clone())
        errors_BK, losses_B, is_correct_B = self._predict(logits_BK, labels_B)
        rows = _Rows(errors_BK.T, inputs_BC, lane_counts)
        if self._collective.num_actors == 1:
            self._threads.run(lambda number: self._step_tile(number, rows), range(len(self.params.tiles)))
        else:
            self._step_together(rows)
        return losses_B, is_correct_B

    def look_along(self) -> list[list[float]]:
        """Measure the loss of the epoch's last step along its gradient, on the images that the gradient is of.

        Logits are linear in the parameters, so those before and after the step are enough for any length of a step.

        Returns:
            For each lane of this actor, sums over its images in that step: the losses at the lengths `LINE`, in steps,
            in nats, then the slope at the beginning, in nats a step, then their number.
        """
        last = self._last
        assert last is not None
        moves_BK = self._logits(last.inputs_BC, last.lane_counts).sub_(last.logits_BK)
        columns = [
            -torch.add(last.logits_BK, moves_BK, alpha=length).log_softmax(1).gather(1, last.labels_B[:, None])
            for length in LINE
        ]
        slopes_B = (last.logits_BK.softmax(1) * moves_BK).sum(1) - moves_BK.gather(1, last.labels_B[:, None])[:, 0]
        figures_BT = torch.cat([*columns, slopes_B[:, None], torch.ones_like(slopes_B)[:, None]], 1).double().cpu()
        self._last = None
        return [own_RT.sum(0).tolist() for own_RT in figures_BT.split(last.lane_counts)]

    def end_epoch(self) -> float:
        """Bring the mean of all actors together, and return the average norm of the steps' mean gradients."""
        squares_STU = self._squares_STU.cpu().numpy()
        if self._collective.num_actors > 1:
            # Each unit's are one actor's, and zero at all others.
            squares_STU = self._collective.gather(squares_STU).sum(0)
            self._collective.swap(*self._own_pieces(self.mean, range(len(self.mean.tiles))))
        norms_S = np.sqrt(squares_STU.reshape(len(squares_STU), -1).sum(1, dtype=np.float64))
        return float((norms_S / self._num_images).mean())

    def _take_inputs(self, images_BD: torch.Tensor, centre_D: torch.Tensor | float) -> torch.Tensor:
        num_rows, num_values = images_BD.shape
        if len(self._inputs_BC) < num_rows:
            self._inputs_BC = empty_inputs(num_rows, num_values, images_BD.device)
        inputs_BC = self._inputs_BC if len(self._inputs_BC) == num_rows else self._inputs_BC[:num_rows]
        if num_rows * num_values < _MIN_SHARED_INPUTS:
            fill_inputs(inputs_BC, images_BD, centre_D)
        else:
            shares = self._shares(num_rows)
            self._threads.run(lambda share: fill_inputs(inputs_BC[share], images_BD[share], centre_D), shares)
        return inputs_BC

    def _logits(self, inputs_BC: torch.Tensor, lane_counts: list[int]) -> torch.Tensor:
        num_rows, num_classes = len(inputs_BC), self.params.num_classes
        # Rows begin where memory is aligned, as products need it.
        strides = (-(-num_classes // 16) * 16, 1)
        logits_BK = torch.empty_strided((num_rows, num_classes), strides, device=inputs_BC.device)
        write_logits(self.params, inputs_BC, lane_counts, logits_BK, self._threads)
        return logits_BK

    def _predict(
        self, logits_BK: torch.Tensor, labels_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses' derivatives by the logits [B, K], in their place, the losses [B], and which are right."""
        num_rows, device = len(labels_B), logits_BK.device
        losses_B = torch.empty(num_rows, device=device)
        is_correct_B = torch.empty(num_rows, dtype=torch.bool, device=device)
        rows = (logits_BK, labels_B, losses_B, is_correct_B)
        if logits_BK.numel() < _MIN_SHARED_LOGITS:
            _finish(*rows)
        else:
            self._threads.run(lambda share: _finish(*(each[share] for each in rows)), self._shares(num_rows))
        return logits_BK, losses_B, is_correct_B

    def _shares(self, num_rows: int) -> list[slice]:
        """Cut rows that go through operations one by one into a piece a thread."""
        size = -(-num_rows // self._threads.number)
        return [slice(first, first + size) for first in range(0, num_rows, size)]

    def _step_tile(self, number: int, rows: _Rows) -> None:
        tile = self.params.tiles[number]
        sum_UM = self._buffers(tile).first_UM
        self._sum_lanes(number, sum_UM, rows)
        self._step_units(number, sum_UM)

    def _step_together(self, rows: _Rows) -> None:
        """Step with all actors, round by round: what a round has moved is given away with the next one's sums."""
        collective = self._collective
        before = range(0)
        for numbers in [*self._rounds, range(0)]:
            sums = self._empty_sums(numbers)
            tasks = list(zip(numbers, sums, strict=True))
            self._threads.run(lambda task: self._sum_lanes(*task, rows), tasks)
            sent, received = self._own_pieces(self.params, before)
            parts: list[list[torch.Tensor]] = [[] for _ in numbers]
            for rank in range(collective.num_actors):
                if rank == collective.rank:
                    taken = [sums[place][self._span(number, rank)] for place, number in enumerate(numbers)]
                else:
                    taken = self._empty_pieces(rank, numbers)
                    received[rank] += taken
                    sent[rank] += [sums[place][self._span(number, rank)] for place, number in enumerate(numbers)]
                for place, part_UM in enumerate(taken):
                    parts[place].append(part_UM)
            collective.swap(sent, received)
            given = list(zip(numbers, parts, strict=True))
            self._threads.run(lambda task: self._step_own(*task), given)
            before = numbers

    def _step_own(self, number: int, parts: list[torch.Tensor]) -> None:
        """Step this actor's units of a tile, given the sums of all actors' lanes, by rank."""
        self._step_units(number, add_tree(parts))

    def _sum_lanes(self, number: int, sum_UM: torch.Tensor, rows: _Rows) -> None:
        """Write the sum of this actor's lanes' gradients of a tile."""
        tile = self.params.tiles[number]
        buffers = self._buffers(tile)
        matrices = buffers.matrices
        if sum_UM is not buffers.first_UM:
            matrices = [tile.matrix(sum_UM), *matrices[1:]]
        num_values = matrices[0].numel()
        if num_values < tile.size:
            sum_UM.view(-1)[num_values:] = 0
        errors, inputs = rows.errors_KB, rows.inputs_BC
        if len(self.params.tiles) > 1:
            errors, inputs = errors[tile.classes], inputs[:, tile.columns]
        add_lanes(errors.split(rows.lane_counts, 1), inputs.split(rows.lane_counts), matrices)

    def _step_units(self, number: int, sum_UM: torch.Tensor) -> None:
        """Move this actor's units of a tile against the sum of all lanes' gradients, and take them into the mean."""
        if not sum_UM.numel():
            return
        step, num_images = len(self._num_images) - 1, self._num_images[-1]
        units, params_UM, mean_UM = self._own_units[number]
        squares_UM, sums_U = (
            self._buffers(self.params.tiles[number]).second_UM[units],
            self._squares_STU[step, number, units],
        )
        torch.mul(sum_UM, sum_UM, out=squares_UM)
        if sum_UM.device.type == "cpu":
            torch.sum(squares_UM, 1, out=sums_U)
        else:  # a GPU may make sums of several rows otherwise than those of one, which another actor may have
            for square_1M, sum_1 in zip(squares_UM.split(1), sums_U.split(1), strict=True):
                torch.sum(square_1M, 1, out=sum_1)
        if self._scale is not None:
            sum_UM = torch.mul(sum_UM, self._scale.units[number][units], out=squares_UM)
        params_UM.sub_(sum_UM, alpha=self._learning_rate / num_images)
        sgd_linear.average(mean_UM, params_UM, self._num_steps_before + step + 1)

    def _buffers(self, tile: Tile) -> _Buffers:
        """Return the buffers of the thread that asks, cut for a tile."""
        if not hasattr(self._of_thread, "cut"):
            size = max(tile.size for tile in self.params.tiles)
            self._of_thread.memory = torch.empty(self._num_buffers, size, device=self.params.device)
            self._of_thread.cut = {}
        cut: dict[tuple[int, ...], _Buffers] = self._of_thread.cut
        key = (*tile.shape, tile.num_units)
        if key not in cut:
            first_UM, second_UM, *_ = self._of_thread.memory[:, : tile.size].unflatten(1, (tile.num_units, -1))
            matrices = [tile.matrix(buffer_N[: tile.size]) for buffer_N in self._of_thread.memory]
            cut[key] = _Buffers(first_UM, second_UM, matrices)
        return cut[key]

    def _span(self, number: int, rank: int) -> slice:
        """Return the units of a tile that an actor steps; in another tile they are others', so that all do alike."""
        num_units, num_actors = self.params.tiles[number].num_units, self._collective.num_actors
        first = (rank - number * num_units) % num_actors
        return slice(-(-first * num_units // num_actors), -(-(first + 1) * num_units // num_actors))

    def _own_pieces(self, params: Params, numbers: range) -> tuple[Pieces, Pieces]:
        """Say what of some tiles each other actor is given, which is what this one steps, and what it gives."""
        own = [params.units[number][self._span(number, self._collective.rank)] for number in numbers]
        others = [rank for rank in range(self._collective.num_actors) if rank != self._collective.rank]
        theirs = {rank: [params.units[number][self._span(number, rank)] for number in numbers] for rank in others}
        return {rank: list(own) for rank in others}, theirs

    def _empty_sums(self, numbers: range) -> list[torch.Tensor]:
        """Make room for the sums of some tiles, [U, M] each."""
        return self._cut(-1, [(self.params.tiles[number], slice(None)) for number in numbers])

    def _empty_pieces(self, rank: int, numbers: range) -> list[torch.Tensor]:
        """Make room for what an actor gives of its sums of some tiles."""
        return self._cut(rank, [(self.params.tiles[n], self._span(n, self._collective.rank)) for n in numbers])

    def _cut(self, key: int, pieces: list[tuple[Tile, slice]]) -> list[torch.Tensor]:
        """Cut a buffer, which is used again, into some units of tiles."""
        shapes = [(len(range(tile.num_units)[units]), tile.unit_size) for tile, units in pieces]
        ends = [0, *accumulate(num_units * unit_size for num_units, unit_size in shapes)]
        if key not in self._received or len(self._received[key]) < ends[-1]:
            self._received[key] = torch.empty(ends[-1], device=self.params.device)
        buffer_N = self._received[key]
        return [buffer_N[first:last].view(shape) for (first, last), shape in zip(pairwise(ends), shapes, strict=True)]


def _finish(
    logits_BK: torch.Tensor, labels_B: torch.Tensor, losses_B: torch.Tensor, is_correct_B: torch.Tensor
) -> None:
    """Turn logits, in place, into the losses' derivatives by them; write the losses and whether rows are right."""
    labels_B1 = labels_B[:, None]
    torch.eq(logits_BK.argmax(1), labels_B, out=is_correct_B)
    log_probabilities_BK = torch.log_softmax(logits_BK, 1)
    losses_B1 = log_probabilities_BK.gather(1, labels_B1)
    torch.neg(losses_B1, out=losses_B[:, None])
    torch.exp(log_probabilities_BK, out=logits_BK)
    logits_BK.scatter_add_(1, labels_B1, losses_B1.fill_(-1))
