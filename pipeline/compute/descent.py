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

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from pipeline.compute.class_blocks import ROWS, ClassBlocks
from pipeline.compute.classifiers import sgd_linear
from pipeline.compute.collective import Collective, Pieces
from pipeline.compute.lane_products import add_tree, write_logits
from pipeline.compute.lane_sums import LaneSums, Rows
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params, Tile, empty_inputs, fill_inputs
from pipeline.results.figures import LINE
from pipeline.tree import lane_ranges

# What actors exchange at once: enough to make up for the wait.
_ROUND_VALUES = 2**20
# The norm of a gradient of B rows is computed from B·B products of rows, without the gradient, where B·B is at most so
# many times K: the one costs products as long as an input, the other passes over all parameters. In so many tasks.
_MAX_PRODUCTS_PER_CLASS, _NORM_TASKS = 16, 4
# Rows of fewer inputs, or classes, go through operations together: more calls would cost more than threads could save.
_MIN_SHARED_INPUTS, _MIN_SHARED_LOGITS = 2**19, 2**14


@dataclass(frozen=True)
class _LastStep:
    """What an epoch's last step was made from: inputs, which stay until the next epoch, and logits before it.

    Inputs may be those of all actors, in groups of `counts`; labels and logits are of this actor's own rows of them.
    """

    inputs_BC: torch.Tensor
    labels_B: torch.Tensor
    counts: list[int]
    own: slice
    lane_counts: list[int]
    logits_BK: torch.Tensor


class Descent:
    """One actor's part in the descent.

    Args:
        num_classes: K.
        num_values: D.
        num_lanes: Lanes of all actors.
        device: Where it computes.
        collective: What connects it with the others.
        threads: They share its work, on a CPU.
        has_class_blocks: Whether actors share classes, as `class_blocks.sends_less` says; else sums of lanes.
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
        has_class_blocks: bool = False,
    ) -> None:
        self.params = Params(num_classes, num_values, device)
        self.mean = Params(num_classes, num_values, device)
        self._collective = collective
        self._threads = threads if device.type == "cpu" else Threads()
        self._lanes = lane_ranges(num_lanes, collective.num_actors)
        self._own_lanes = self._lanes[collective.rank]
        self._blocks = ClassBlocks(self.params, collective) if has_class_blocks else None
        self._sums = LaneSums(self.params, len(self._own_lanes) if self._blocks is None else 1)
        self._inputs_BC = empty_inputs(0, num_values, device)
        self._last: _LastStep | None = None
        self._received: dict[int, torch.Tensor] = {}
        tiles = self.params.tiles
        size = max(1, _ROUND_VALUES // max(tile.size for tile in tiles))
        # Of every tile what this actor steps.
        spans = [self._span(number, collective.rank) for number in range(len(tiles))]
        units = zip(spans, self.params.units, self.mean.units, strict=True)
        self._own_units = [(span, params_UM[span], mean_UM[span]) for span, params_UM, mean_UM in units]
        self._own_tiles = range(len(tiles)) if self._blocks is None else self._blocks.tiles[collective.rank]
        self._rounds = [range(len(tiles))[first : first + size] for first in range(0, len(tiles), size)]

    def load(self, last_p: torch.Tensor, mean_p: torch.Tensor, first: int = 0) -> None:
        """Take the parameters after the last step, and their mean over all steps, float32 [p], of classes from one."""
        self.params.load(last_p, first)
        self.mean.load(mean_p, first)

    def save(self, classes: range | None = None) -> npt.NDArray[np.float32]:
        """Return what `load` took, as it is now, of some classes: one behind the other, float32 [2p]."""
        classes = range(self.params.num_classes) if classes is None else classes
        saved_2p = torch.empty(2, len(classes) * (self.params.num_values + 1), device=self.params.device)
        for params, saved_p in zip((self.params, self.mean), saved_2p, strict=True):
            params.save(saved_p, classes.start)
        return saved_2p.flatten().cpu().numpy()

    def begin_epoch(self, num_steps: int, num_steps_before: int, learning_rate: float) -> None:
        """Prepare for so many steps, after so many of former epochs, of one length in units of the mean gradient."""
        max_units = max(tile.num_units for tile in self.params.tiles)
        num_places = max(len(self.params.tiles), _NORM_TASKS)
        self._squares_STU = torch.zeros(num_steps, num_places, max_units, device=self.params.device)
        self._num_images: list[int] = []
        self._is_behind = False  # whether the mean lacks the last step
        self._num_steps_before, self._learning_rate = num_steps_before, learning_rate

    def step(
        self,
        images_bD: torch.Tensor,
        labels_b: torch.Tensor,
        lane_counts: list[int],
        centre_D: torch.Tensor | float,
        scale_D: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict this actor's rows of a step, and move the parameters, and the mean, of all actors.

        For softmax cross-entropy the gradient by the logits is the probabilities minus the one-hot label (Bishop,
        "Pattern Recognition and Machine Learning", 2006, eq. 4.109), so no graph is recorded.

        Args:
            images_bD: uint8, lane after lane.
            labels_b: int64.
            lane_counts: Rows of each lane of all actors; those of this actor's add up to b.
            centre_D: Taken off the pixels, both 0 to 1.
            scale_D: By what the rest is multiplied; None for 1.

        Returns:
            The losses [b], float32 in nats, and whether each row was predicted right [b], bool.

        Raises:
            ActorLostError: If another actor is gone.
        """
        self._num_images.append(sum(lane_counts))
        images_BD, labels_B, own, counts = images_bD, labels_b, slice(None), self._own(lane_counts)
        if self._blocks is not None:
            of_actors = [sum(lane_counts[lanes.start : lanes.stop]) for lanes in self._lanes]
            images_BD, labels_B, own = self._blocks.gather_rows(images_bD, labels_b, of_actors)
            counts = [len(rows) for rows in labels_B.split(ROWS)]
        inputs_BC = self._take_inputs(images_BD, centre_D, scale_D)
        logits_BK = self._logits(inputs_BC, counts)
        is_last = len(self._num_images) == len(self._squares_STU)
        if is_last:
            self._last = _LastStep(inputs_BC, labels_b, counts, own, self._own(lane_counts), logits_BK[own].clone())
        errors_BK, losses_B, is_correct_B = self._predict(logits_BK, labels_B)
        rows = Rows(errors_BK.T, inputs_BC, counts if self._blocks is None else [len(labels_B)])
        if self._blocks is not None and len(labels_B) ** 2 <= _MAX_PRODUCTS_PER_CLASS * self.params.num_classes:
            shares = range(self._collective.rank, _NORM_TASKS, self._collective.num_actors)
            tasks = [partial(self._note_square, share) for share in shares]
            was_behind, self._is_behind = self._is_behind, not (self._is_behind or is_last)
            step = partial(self._step_in_place, was_behind=was_behind)
            tasks += [partial(step, number) for number in self._own_tiles]
            self._threads.run(lambda task: task(rows), tasks)
        elif self._collective.num_actors == 1 or self._blocks is not None:
            assert not self._is_behind  # steps of an epoch have as many rows as the one before, or fewer
            self._threads.run(lambda number: self._step_tile(number, rows), self._own_tiles)
        else:
            self._step_together(rows)
        return losses_B[own], is_correct_B[own]

    def look_along(self) -> list[list[float]]:
        """Measure the loss of the epoch's last step along its gradient, on the images that the gradient is of.

        Logits are linear in the parameters, so those before and after the step are enough for any length of a step.

        Returns:
            For each lane of this actor, sums over its images in that step: the losses at the lengths `LINE`, in steps,
            in nats, then the slope at the beginning, in nats a step, then their number.
        """
        last = self._last
        assert last is not None
        moves_BK = self._logits(last.inputs_BC, last.counts)[last.own].sub_(last.logits_BK)
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
            for params in (self.mean,) if self._blocks is None else (self.mean, self.params):
                self._collective.swap(*self._own_pieces(params, range(len(params.tiles))))
        squares_S = squares_STU.reshape(len(squares_STU), -1).sum(1, dtype=np.float64)
        norms_S = np.sqrt(squares_S.clip(min=0))  # by rounding, shares may add up to less
        return float((norms_S / self._num_images).mean())

    def _take_inputs(
        self, images_BD: torch.Tensor, centre_D: torch.Tensor | float, scale_D: torch.Tensor | None
    ) -> torch.Tensor:
        num_rows, num_values = images_BD.shape
        if len(self._inputs_BC) < num_rows:
            self._inputs_BC = empty_inputs(num_rows, num_values, images_BD.device)
        inputs_BC = self._inputs_BC if len(self._inputs_BC) == num_rows else self._inputs_BC[:num_rows]
        if num_rows * num_values < _MIN_SHARED_INPUTS:
            fill_inputs(inputs_BC, images_BD, centre_D, scale_D)
        else:
            shares = self._shares(num_rows)
            self._threads.run(lambda share: fill_inputs(inputs_BC[share], images_BD[share], centre_D, scale_D), shares)
        return inputs_BC

    def _own(self, lane_counts: list[int]) -> list[int]:
        return lane_counts[self._own_lanes.start : self._own_lanes.stop]

    def _logits(self, inputs_BC: torch.Tensor, counts: list[int]) -> torch.Tensor:
        num_rows, num_classes = len(inputs_BC), self.params.num_classes
        # Rows begin where memory is aligned, as products need it.
        strides = (-(-num_classes // 16) * 16, 1)
        logits_BK = torch.empty_strided((num_rows, num_classes), strides, device=inputs_BC.device)
        blocks = slice(None) if self._blocks is None else self._blocks.own
        write_logits(self.params, inputs_BC, counts, logits_BK, self._threads, blocks)
        if self._blocks is not None:
            self._blocks.gather_logits(logits_BK)
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

    def _step_tile(self, number: int, rows: Rows) -> None:
        sum_UM = self._sums.buffer(number)
        self._sums.write(number, sum_UM, rows)
        self._step_units(number, sum_UM)

    def _note_square(self, share: int, rows: Rows) -> None:
        """Note a share of the square of the gradient that `_step_in_place` does without; all actors have all rows.

        A gradient is a sum of products of errors and inputs, so its square is the sum, over pairs of rows, of products
        of their errors times products of their inputs (I. Goodfellow, "Efficient per-example gradient computations",
        arXiv:1510.01799, has those of a row with itself). Where rows cancel, float32 leaves an error of about 1 %.
        """
        size = -(-len(rows.inputs_BC) // _NORM_TASKS)
        some = slice(share * size, (share + 1) * size)
        of_errors_bB = rows.errors_KB[:, some].T @ rows.errors_KB
        of_inputs_bB = rows.inputs_BC[some] @ rows.inputs_BC.T
        self._squares_STU[len(self._num_images) - 1, share, 0] = (of_errors_bB.double() * of_inputs_bB).sum()

    def _step_in_place(self, number: int, rows: Rows, *, was_behind: bool) -> None:
        """Step a tile of this actor without its gradient, and take it into the mean, in every second step twice.

        The mean is read from memory half as often then; before a step, parameters are still those after the last one.
        """
        tile, matrix_kc, mean_kc = self.params.tiles[number], self.params.matrices[number], self.mean.matrices[number]
        num_steps = self._num_steps_before + len(self._num_images)
        if was_behind:
            sgd_linear.average(mean_kc, matrix_kc, num_steps - 1)
        errors_kB, inputs_Bc = rows.errors_KB[tile.classes], rows.inputs_BC[:, tile.columns]
        matrix_kc.addmm_(errors_kB, inputs_Bc, alpha=-self._learning_rate / self._num_images[-1])
        if not self._is_behind:
            sgd_linear.average(mean_kc, matrix_kc, num_steps)

    def _step_together(self, rows: Rows) -> None:
        """Step with all actors, round by round: what a round has moved is given away with the next one's sums."""
        collective = self._collective
        before = range(0)
        for numbers in [*self._rounds, range(0)]:
            sums = self._empty_sums(numbers)
            tasks = list(zip(numbers, sums, strict=True))
            self._threads.run(lambda task: self._sums.write(*task, rows), tasks)
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

    def _step_units(self, number: int, sum_UM: torch.Tensor) -> None:
        """Move this actor's units of a tile against the sum of all lanes' gradients, and take them into the mean."""
        if not sum_UM.numel():
            return
        step, num_images = len(self._num_images) - 1, self._num_images[-1]
        units, params_UM, mean_UM = self._own_units[number]
        tile, sums_U = self.params.tiles[number], self._squares_STU[step, number, units]
        if tile.num_units == 1:
            torch.dot(sum_UM[0], sum_UM[0], out=sums_U[0])
        else:
            squares_UM = torch.mul(sum_UM, sum_UM, out=self._sums.spare(number)[units])
            if sum_UM.device.type == "cpu":
                torch.sum(squares_UM, 1, out=sums_U)
            else:  # which may make sums of several rows otherwise than those of one, which another actor may have
                for squares_M, sum_ in zip(squares_UM, sums_U, strict=True):
                    torch.sum(squares_M, 0, out=sum_)
        params_UM.sub_(sum_UM, alpha=self._learning_rate / num_images)
        sgd_linear.average(mean_UM, params_UM, self._num_steps_before + step + 1)

    def _span(self, number: int, rank: int) -> slice:
        """Return the units of a tile that an actor steps; in another tile they are others', so that all do alike."""
        num_units, num_actors = self.params.tiles[number].num_units, self._collective.num_actors
        if self._blocks is not None:
            return slice(0, num_units if number in self._blocks.tiles[rank] else 0)
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
