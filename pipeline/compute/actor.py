"""The state of one computing process: images on one device, class means, a model.

Input: decoded Arrow tables, one a shard. Output: counts, sums, epoch records, scored parts: small things. Invariant:
an image is copied to its position in one buffer when it arrives, and that depends on the listing alone.

Axes as in `nearest_mean` and `sgd_linear`; M positions of a buffer, one for each listed image, skipped ones included.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from pipeline.compute.block import Trained
from pipeline.compute.class_blocks import sends_less
from pipeline.compute.classifiers import nearest_mean, sgd_linear, used_classifiers
from pipeline.compute.collective import Collective
from pipeline.compute.descent import Descent
from pipeline.compute.epoch import EpochSums
from pipeline.compute.exchange import Address
from pipeline.compute.features import SQUARE_UNIT, UNIT, to_features
from pipeline.compute.lanes import Lanes, image_dtype
from pipeline.compute.neighborhood import Neighborhood
from pipeline.compute.parts import Part
from pipeline.compute.program import Program, Runner
from pipeline.compute.scoring import ScoredPart, confusion, score_part
from pipeline.compute.spool import Spool
from pipeline.compute.threads import Threads
from pipeline.compute.tiles import Params
from pipeline.data.columns import one_chunk
from pipeline.data.score_join import GivenRows, of_part
from pipeline.plan import Plan
from pipeline.results.figures import EpochRecord
from pipeline.tree import lane_ranges

# Images whose features say how long steps are.
_SCALE_IMAGES = 4096
# What images may take of a GPU's free memory; the rest is for computing with them.
_GPU_SHARE = 0.8


class LaneActor:
    """One actor: some lanes of the training images and some parts of the validation images, on one device.

    Args:
        plan: The shape of the work.
        rank: This actor's number, from 0.
        num_actors: How many there are; part i belongs to actor i modulo this, lanes as `lane_ranges` says.
        is_on_gpu: Whether a GPU was given to this process.
        num_threads: Threads that share the work on the CPU.
        scratch: The folder whose disk keeps the images; None where memory holds them. A GPU that holds them does.
        program: The user's own model, where the plan has one, on the device that `choose_device` chooses.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        num_actors: int,
        *,
        is_on_gpu: bool,
        num_threads: int = 1,
        scratch: str | None = None,
        program: Program | None = None,
    ) -> None:
        # One thread inside torch: sums are then added in one order, whatever OMP_NUM_THREADS says.
        torch.set_num_threads(1)
        self._plan = plan
        self._rank = rank
        self._num_actors = num_actors
        self._device = choose_device(is_on_gpu=is_on_gpu)
        self._collective = Collective(rank, num_actors)
        self._threads = Threads(num_threads if self._device.type == "cpu" else 1)
        self._epoch: EpochSums | None = None
        num_classes, num_values = plan.num_classes, plan.num_values
        self._sums_KD = torch.zeros(num_classes, num_values, dtype=torch.int64, device=self._device)
        self._num_squares = torch.zeros((), dtype=torch.int64)
        self._counts_K = torch.zeros(num_classes, dtype=torch.int64, device=self._device)
        self._lane_counts_L = torch.zeros(plan.num_lanes, dtype=torch.int64)
        self._lanes = lane_ranges(plan.num_lanes, num_actors)[rank]
        self._store_device, self._scratch = self._choose_store(scratch)
        self._parts: dict[int, Part] = {}
        empty = torch.empty(0)
        self._trained = Trained(self._counts_K, empty, None, empty, plan.model)
        self._means: Spool | None = None
        self._runner: Runner | None = None
        if program is not None and plan.model is not None:
            self._runner = Runner(program, plan.model, self._device, self._threads)
        self._descent: Descent | None = None
        self._learning_rate = 0.0

    def describe(self) -> tuple[str, str]:
        """Name the device that this actor computes on, and where it keeps its images: `gpu`, `memory` or `disk`."""
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        is_on_gpu = self._store_device.type == "cuda"
        return device, "gpu" if is_on_gpu else "memory" if self._scratch is None else "disk"

    def listen(self, host: str) -> Address:
        """Accept connections of the other actors on `host`, this actor's own address; return where they reach it."""
        return self._collective.listen(host)

    def join_group(self, token: bytes, *addresses: Address) -> None:
        """Connect with all other actors.

        Args:
            token: What only they know.
            addresses: What `listen` returned to all of them, by rank.

        Raises:
            ActorLostError: If not all of them connect in time.
        """
        has_own_gpu = self._device.type == "cuda" and self._plan.gpus_per_actor >= 1
        self._collective.join(token, addresses, has_own_gpu=has_own_gpu)

    def close(self) -> None:
        """Close the connections with the other actors."""
        self._collective.close()

    def add_train(self, start: int, table: pa.Table) -> None:
        """Count training images into the class sums and keep them, if they are needed again.

        Args:
            start: The shard's first row in the training listing.
            table: `row` int32, counted from there, `class`, `image` and, for neighbors, `key`: of this actor's lanes.
        """
        rows_N = start + table["row"].to_numpy().astype(np.int64)
        labels_N = _labels_of(table, self._device)
        keys = table["key"] if self._plan.num_neighbors > 0 else None
        if self._plan.has_features:
            self._run_model(table, lambda outputs_NO: self._take_train(
                rows_N, to_features(outputs_NO, image_dtype(self._plan)), labels_N, keys))  # fmt: skip
        else:
            self._take_train(rows_N, _pixels_of(table, "image").to(self._device), labels_N, keys)

    def _take_train(
        self,
        rows_N: npt.NDArray[np.int64],
        images_ND: torch.Tensor,
        labels_N: torch.Tensor,
        keys: pa.ChunkedArray | None,
    ) -> None:
        self._counts_K += nearest_mean.add_class_sums(self._sums_KD, images_ND, labels_N)
        lanes_N = torch.from_numpy(self._plan.assignment.lanes(rows_N))
        self._lane_counts_L += torch.bincount(lanes_N, minlength=self._plan.num_lanes)
        if self._plan.has_training:
            self._num_squares += nearest_mean.sum_squares(images_ND)
        if self._plan.keeps_images:
            self._train.put(rows_N, images_ND, labels_N, keys)

    def _run_model(self, table: pa.Table, take: Callable[[torch.Tensor], object]) -> None:
        """Run the model on a shard's images: `take` is called with their outputs, perhaps by a later shard."""
        assert self._runner is not None
        self._runner.put(_pixels_of(table, "model_image" if "model_image" in table.column_names else "image"), take)

    def flush(self) -> None:
        """Run the model on images that have waited for a whole batch."""
        if self._runner:
            self._runner.flush()

    def describe_runs(self) -> tuple[int, float]:
        """Return the images that the model was run on, and the seconds of that."""
        assert self._runner is not None
        return self._runner.num_images, self._runner.busy_s

    def add_valid(self, part: int, offset: int, table: pa.Table) -> None:
        """Keep a validation shard's images until their part is scored.

        Args:
            part: The part that the shard belongs to, one of this actor's.
            offset: Where its first listed image stands in the part.
            table: `row` int32, counted from there, `key`, `class` and `image`.
        """
        plan = self._plan
        if part not in self._parts:
            scratch = self._scratch if plan.keeps_images else None
            self._parts[part] = Part(
                plan.part_sizes[part], plan.num_values, self._store_device, scratch, image_dtype(plan), plan.num_logits
            )
        rows_N, stored = offset + table["row"].to_numpy().astype(np.int64), self._parts[part]
        labels_N, keys = _labels_of(table, self._store_device), table["key"]
        if plan.has_features:
            self._run_model(table, lambda outputs_NO: stored.put(
                rows_N, keys, to_features(outputs_NO, image_dtype(plan)), labels_N))  # fmt: skip
            return
        pixels_ND = _pixels_of(table, "image").to(self._store_device)
        if plan.num_logits:
            self._run_model(table, lambda logits_NO: stored.put(rows_N, keys, pixels_ND, labels_N, logits_NO))
        else:
            stored.put(rows_N, keys, pixels_ND, labels_N)

    def finish_means(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Add up all actors' class sums and divide: every actor then holds the same means.

        Returns:
            The classes' counts, int64 [K], and what `means_from` returns for the first class.
        """
        self.flush()
        add_up, plan = self._collective.add_up, self._plan
        self._sums_KD, self._counts_K = add_up(self._sums_KD), add_up(self._counts_K)
        self._lane_counts_L, self._num_squares = add_up(self._lane_counts_L), add_up(self._num_squares)
        self._trained = replace(self._trained, counts_K=self._counts_K)
        # Where there are several pieces, in a file without a name: until images are scored nobody needs them.
        scratch = None if len(plan.class_pieces) == 1 else self._scratch or tempfile.gettempdir()
        self._means = Spool(scratch)
        for classes in plan.class_pieces:
            rows = slice(classes.start, classes.stop)
            unit = UNIT if plan.has_features else 255
            means_kD = nearest_mean.class_means(self._sums_KD[rows], self._counts_K[rows], unit)
            self._means.put(means_kD.cpu().numpy())
        self._sums_KD = torch.empty(0)  # which are twice as large as the means
        return self._counts_K.cpu().numpy(), self.means_from(0)

    def means_from(self, first: int) -> npt.NDArray[np.float32]:
        """Return the means of some classes, from the given one on, float32 [k, D], 0 to 1; NaN without images.

        Args:
            first: 0, or the class behind those that were returned before.
        """
        assert self._means is not None
        means_kD: npt.NDArray[np.float32] = self._means.get(first // self._plan.class_pieces[0].stop)
        return means_kD

    def begin_training(self) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
        """Begin anew; `load_params` may follow.

        Returns:
            The learning rate; the mean image, float64 [D], 0 to 1, and of features their scale, float64 [D], by which
            `weights.parquet` is written.
        """
        self.flush()
        plan, counts_K = self._plan, self._trained.counts_K
        square_unit = SQUARE_UNIT if plan.has_features else 255**2
        means = (mean_D for classes in plan.class_pieces for mean_D in torch.from_numpy(self.means_from(classes.start)))
        centre = sgd_linear.find_centre(counts_K, means, int(self._num_squares), square_unit)
        scale = self._find_scale(centre) if plan.has_features else None
        self._learning_rate = plan.learning_rate or (scale or centre).safe_rate
        if self._descent is None:
            self._descent = self._make_descent()
        initial_P = sgd_linear.initial_params(plan.num_classes, plan.num_values)
        self._descent.load(initial_P, initial_P)
        centre_D = centre.centre_D.float().to(self._device)
        scale_D = None if scale is None else scale.scale_D.float().to(self._device)
        self._trained = replace(self._trained, model=self._descent.mean, centre_D=centre_D, scale_D=scale_D)
        return self._learning_rate, centre.centre_D.numpy(), None if scale is None else scale.scale_D.numpy()

    @property
    def model(self) -> Params:
        """The mean of the parameters over all steps, which is the linear model."""
        assert self._trained.model is not None
        return self._trained.model

    def load_params(self, first: int, params_2p: npt.NDArray[np.float32]) -> None:
        """Take the parameters of some classes, the first of them given, as `params_from` returns them."""
        assert self._descent is not None
        # Copies: what Ray gives is read-only, and not aligned as torch's own.
        last_p, mean_p = map(torch.tensor, np.split(params_2p, 2))
        self._descent.load(last_p.to(self._device), mean_p.to(self._device), first)

    def params_from(self, first: int) -> npt.NDArray[np.float32]:
        """Return parameters of some classes, from the given one on, after the last epoch.

        Args:
            first: 0, or the class behind those that were returned before.

        Returns:
            Those after the last step, and behind them their mean over all steps, which is the model, float32 [2p].
        """
        assert self._descent is not None
        return self._descent.save(self._plan.class_pieces[first // self._plan.class_pieces[0].stop])

    def _find_scale(self, centre: sgd_linear.Centre) -> sgd_linear.Scale:
        """Find the features' scale by some images of the first lane, which one actor has: then all have the same."""
        found = np.append(np.ones(len(centre.centre_D)), centre.safe_rate)
        if self._rank == 0:
            step = -(-self._plan.lane_positions // _SCALE_IMAGES)
            features_ND, _, _ = self._train.between(0, self._plan.lane_positions, step)
            if len(features_ND):  # else all of them were skipped
                scale = sgd_linear.find_scale(features_ND, centre.centre_D, self._plan.batch_size)
                found = np.append(scale.scale_D.numpy(), scale.safe_rate)
        first = self._collective.gather(found)[0]
        return sgd_linear.Scale(torch.from_numpy(first[:-1].copy()), float(first[-1]))

    @torch.inference_mode()
    def train_epoch(self, epoch: int) -> tuple[EpochRecord, npt.NDArray[np.float32] | None]:
        """Train for one epoch together with all actors, and measure on the validation images.

        Args:
            epoch: From 1; it chooses the order of the images.

        Returns:
            The record; and from the first actor what `params_from` returns for the first class: all hold the same.

        Raises:
            ActorLostError: If another actor is gone.
        """
        plan, trained, descent = self._plan, self._trained, self._descent
        assert descent is not None
        lane_rows = plan.batch_size // plan.num_lanes
        lane_counts = self._lane_counts_L.tolist()
        num_steps = -(-max(lane_counts) // lane_rows)
        self._epoch = sums = EpochSums(self._lanes, num_steps, lane_rows, self._device)
        batches = self._train.batches(epoch, lane_rows, num_steps)
        descent.begin_epoch(num_steps, (epoch - 1) * num_steps, self._learning_rate)
        for index, (images_BD, labels_B, counts) in enumerate(batches):
            step_counts = [min(max(count - index * lane_rows, 0), lane_rows) for count in lane_counts]
            losses_B, is_correct_B = descent.step(images_BD, labels_B, step_counts, trained.centre_D, trained.scale_D)
            sums.add_step(losses_B, is_correct_B, counts)
        num_train = sum(lane_counts[lane] for lane in self._lanes)
        line = dict(zip(self._lanes, descent.look_along(), strict=True))
        record = sums.record(epoch, num_train, descent.end_epoch(), line, *self._validate())
        return record, self.params_from(0) if self._rank == 0 else None

    def count_steps(self) -> int:
        """Say how many steps of the epoch under way, or of the last one, are done; or blocks of a search."""
        if "neighborhood" in vars(self):
            return self.neighborhood.num_blocks_done
        return self._epoch.num_steps_done if self._epoch else 0

    @cached_property
    def neighborhood(self) -> Neighborhood:
        """This actor's share of the search for neighbors; all its images have to be here."""
        self.flush()
        return Neighborhood(self._plan, self._train, self._parts, self._device, self._threads, self._scratch)

    def score_part(self, part: int, median: float | None = None, given: Sequence[GivenRows] = ()) -> ScoredPart:
        """Score a part's images by every classifier and forget them.

        Args:
            part: Its number.
            median: The median distance to the nearest training image, where these were searched for.
            given: Rows among which are those of its images, where they were predicted elsewhere.
        """
        self.flush()
        self._begin_scoring()
        plan = self._plan
        neighbors = None if median is None else self.neighborhood.columns(part)
        is_twin_N = None if median is None else self.neighborhood.are_twins(part, median)
        used = used_classifiers(plan.num_neighbors, has_training=plan.has_training, model=plan.model, given=plan.given)
        stored = self._parts.pop(part)
        if given:
            stored.put_given(of_part(given, part))
        return score_part(stored, self._trained, used, self._device, self._threads, neighbors, is_twin_N)

    @cached_property
    def _train(self) -> Lanes:
        # Made with the first image: without training and neighbors it takes no room.
        return Lanes(self._plan, self._lanes, self._device, self._store_device, self._scratch)

    def _make_descent(self) -> Descent:
        plan = self._plan
        num_bytes = plan.num_values * image_dtype(plan).itemsize
        sizes = (plan.num_classes, plan.num_values, plan.batch_size, num_bytes)
        return Descent(
            plan.num_classes,
            plan.num_values,
            plan.num_lanes,
            device=self._device,
            collective=self._collective,
            threads=self._threads,
            has_class_blocks=sends_less(*sizes, self._device.type),
        )

    def _begin_scoring(self) -> None:
        """Let go of what only training needs, and take the class means back."""
        if self._trained.means_KD.numel():
            return
        self._descent = None
        means_KD = torch.empty(self._plan.num_classes, self._plan.num_values)
        for classes in self._plan.class_pieces:
            means_KD[classes.start : classes.stop] = torch.from_numpy(self.means_from(classes.start))
        self._trained = replace(self._trained, means_KD=means_KD.to(self._device))

    def _choose_store(self, scratch: str | None) -> tuple[torch.device, str | None]:
        """Keep images on the GPU where its share of these is free; else in memory, or on disk."""
        if self._device.type == "cuda":
            num_bytes = self._plan.held_bytes * len(self._lanes) / self._plan.num_lanes
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            if num_bytes <= _GPU_SHARE * free_bytes * self._plan.gpus_per_actor:
                return self._device, None
        return torch.device("cpu"), scratch

    def _validate(self) -> tuple[dict[int, float], npt.NDArray[np.int64]]:
        num_classes = self._plan.num_classes
        losses = {}
        total_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=self._device)
        for part, stored in sorted(self._parts.items()):
            block_losses = []
            for images_ND, labels_N, _ in stored.blocks(self._device):
                log_probabilities_NK = sgd_linear.log_probabilities(
                    self.model, images_ND, self._trained.centre_D, self._threads, self._trained.scale_D
                )
                block_losses.append(-float(log_probabilities_NK.gather(1, labels_N[:, None]).double().sum()))
                total_KK += confusion(labels_N, log_probabilities_NK.argmax(1), num_classes)
            losses[part] = math.fsum(block_losses)
        return losses, total_KK.cpu().numpy()


def choose_device(*, is_on_gpu: bool) -> torch.device:
    """Return what an actor computes on: a pretended GPU, or a build of torch without CUDA, computes on the CPU."""
    return torch.device("cuda", 0) if is_on_gpu and torch.cuda.is_available() else torch.device("cpu")


def _labels_of(table: pa.Table, device: torch.device) -> torch.Tensor:
    """Take the labels of a decoded shard to a device, int64 [N]."""
    return torch.from_numpy(table["class"].to_numpy().astype(np.int64)).to(device)


def _pixels_of(table: pa.Table, column: str) -> torch.Tensor:
    """View the images of a decoded shard, uint8 [N, D], only to be read."""
    images = one_chunk(table[column]).storage
    # Nothing is copied on a CPU: what is done with the pixels is done in the object store's memory.
    size = images.type.list_size
    values = images.values.slice(images.offset * size, len(images) * size)
    pixels_ND: torch.Tensor = from_dlpack(values).view(len(images), size)
    return pixels_ND
