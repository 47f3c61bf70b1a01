"""The state of one computing process: images on one device, class means, a model.

What enters: decoded Arrow tables, one a shard. What leaves: counts, sums, epoch records, scored parts: small things.
Always: an image is copied to its place in one buffer when it arrives, and its place depends on the listing alone.

Axes as in `distance` and `sgd`; M is the number of places of a buffer, listed images that may yet be skipped.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import torch
import torch.distributed as dist

from pipeline import distance, sgd
from pipeline.errors import ActorLostError
from pipeline.metrics import EpochRecord
from pipeline.shards import Plan

# A peer that answers none of a step's exchanges for so long is taken for dead.
_EXCHANGE_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class ScoredPart:
    """A part of the validation images with the scores of every classifier.

    Attributes:
        keys: Of N images, in the order of the listing.
        labels: int64 [N].
        predictions: By classifier, int64 [N].
        scores: By classifier, float32 [N, K]: distances, or probabilities.
        confusions: By classifier, int64 [K, K].
    """

    keys: pa.StringArray
    labels: npt.NDArray[np.int64]
    predictions: dict[str, npt.NDArray[np.int64]]
    scores: dict[str, npt.NDArray[np.float32]]
    confusions: dict[str, npt.NDArray[np.int64]]


class LaneActor:
    """One actor: some lanes of the training images and some parts of the validation images, on one device.

    Args:
        plan: The shape of the work.
        rank: This actor's number, from 0.
        num_actors: How many there are; lane and part i belong to actor i modulo this.
        is_on_gpu: Whether a GPU was given to this process.
    """

    def __init__(self, plan: Plan, rank: int, num_actors: int, *, is_on_gpu: bool) -> None:
        # One thread: sums are then added in one order, whatever OMP_NUM_THREADS says, and decoding keeps its cores.
        torch.set_num_threads(1)
        self._plan = plan
        self._rank = rank
        self._num_actors = num_actors
        # A pretended GPU, or a build of torch without CUDA, computes on the CPU.
        self._device = torch.device("cuda", 0) if is_on_gpu and torch.cuda.is_available() else torch.device("cpu")
        self._num_steps_done = 0
        num_classes, num_values = plan.num_classes, plan.target.num_values
        self._sums_KD = torch.zeros(num_classes, num_values, dtype=torch.int64, device=self._device)
        self._num_squares = torch.zeros((), dtype=torch.int64)
        self._counts_K = torch.zeros(num_classes, dtype=torch.int64, device=self._device)
        self._lane_counts_L = torch.zeros(plan.num_lanes, dtype=torch.int64)
        self._means_KD = torch.empty(0)
        self._lanes = list(range(rank, plan.num_lanes, num_actors))
        sizes = [plan.lane_sizes[lane] for lane in self._lanes] if plan.has_training else [0] * len(self._lanes)
        self._lane_starts = dict(zip(self._lanes, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._train = _Buffer(sum(sizes), num_values, self._device)
        self._parts: dict[int, _Buffer] = {}
        self._part_keys: dict[int, dict[int, pa.StringArray]] = {}
        self._params_P = torch.empty(0)
        self._centre_D = torch.empty(0)
        self._learning_rate = 0.0
        self._is_in_group = False
        self._backend = ""

    def describe_device(self) -> str:
        """Name the device that this actor computes on."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"

    def open_store(self, host: str) -> int:
        """Open the meeting point of the process group on `host`, this actor's own address; return its port."""
        # Of itself the store would listen on every address of the machine.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=1024)
        port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_EXCHANGE_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
        return port

    def join_group(self, host: str, port: int, address: str) -> None:
        """Join the process group of all actors at the meeting point that the first of them opened.

        Args:
            host: Of the meeting point.
            port: Likewise.
            address: This actor's own; others reach it, and it listens, there alone.

        Raises:
            ActorLostError: If not all of them come in time.
        """
        # NCCL takes no two members on one GPU; they exchange through the CPU instead.
        is_sharing = self._plan.gpus_per_actor < 1
        self._backend = "nccl" if self._device.type == "cuda" and not is_sharing else "gloo"
        # Of themselves both take the interface that the host's name leads to, which may be another or a public one.
        if interface := _interface_of(address):
            os.environ.setdefault(f"{self._backend.upper()}_SOCKET_IFNAME", interface)
        try:
            if self._rank > 0:
                self._store = dist.TCPStore(host, port, is_master=False, timeout=_EXCHANGE_TIMEOUT)
            dist.init_process_group(
                self._backend,
                store=self._store,
                rank=self._rank,
                world_size=self._num_actors,
                timeout=_EXCHANGE_TIMEOUT,
            )
        except RuntimeError as exc:
            raise ActorLostError(f"actor {self._rank}: expected {self._num_actors} actors to meet, got {exc}") from exc
        self._is_in_group = True

    def add_train(self, lane: int, offset: int, table: pa.Table) -> None:
        """Count a training shard's images into the class sums and keep them, if there is training.

        Args:
            lane: The lane that the shard belongs to, one of this actor's.
            offset: Where its first listed image stands in the lane.
            table: As in `decode.Decoded`.
        """
        images_ND, labels_N = _to_tensors(table, self._device)
        sums_KD, counts_K = distance.class_sums(images_ND, labels_N, self._plan.num_classes)
        self._sums_KD += sums_KD
        self._counts_K += counts_K
        self._num_squares += distance.sum_squares(images_ND)
        self._lane_counts_L[lane] += len(labels_N)
        if self._plan.has_training:
            self._train.put(self._lane_starts[lane] + offset, images_ND, labels_N)

    def add_valid(self, part: int, offset: int, table: pa.Table) -> None:
        """Keep a validation shard's images until their part is scored.

        Args:
            part: The part that the shard belongs to, one of this actor's.
            offset: Where its first listed image stands in the part.
            table: As in `decode.Decoded`.
        """
        if part not in self._parts:
            size = self._plan.part_sizes[part]
            self._parts[part] = _Buffer(size, self._plan.target.num_values, self._device)
            self._part_keys[part] = {}
        self._parts[part].put(offset, *_to_tensors(table, self._device))
        # A copy: the column is a view into the object store, which would keep the whole shard's pixels there.
        self._part_keys[part][offset] = pa.array(table["key"].to_pylist(), pa.string())

    def finish_means(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Add up all actors' class sums and divide: every actor then holds the same means.

        Returns:
            The classes' counts, int64 [K], and means, float32 [K, D], 0 to 1. A class without images has NaN.
        """
        self._sums_KD, self._counts_K = self._add_up(self._sums_KD), self._add_up(self._counts_K)
        self._lane_counts_L = self._add_up(self._lane_counts_L)
        self._num_squares = self._add_up(self._num_squares)
        self._means_KD = distance.class_means(self._sums_KD, self._counts_K)
        return self._counts_K.cpu().numpy(), self._means_KD.cpu().numpy()

    def begin_training(self, params_P: npt.NDArray[np.float32] | None) -> float:
        """Take the parameters of the last finished epoch, or draw new ones from the seed; return the learning rate."""
        num_train, num_squares = int(self._counts_K.sum()), int(self._num_squares)
        centre_D, safe_rate = sgd.centre_and_rate(self._sums_KD, num_train, num_squares)
        self._centre_D = centre_D.to(self._device)
        self._learning_rate = self._plan.learning_rate or safe_rate
        if params_P is None:
            initial_P = sgd.initial_params(self._plan.num_classes, self._plan.target.num_values, self._plan.seed)
        else:
            initial_P = torch.tensor(params_P)  # a copy: what Ray gives is read-only, and not aligned as torch's own
        self._params_P = initial_P.to(self._device)
        return self._learning_rate

    def train_epoch(self, epoch: int) -> tuple[EpochRecord, npt.NDArray[np.float32] | None]:
        """Train for one epoch together with all actors, and measure on the validation images.

        Args:
            epoch: From 1; it chooses the order of the images.

        Returns:
            The record, and the parameters after it, float32 [P], from the first actor; the others hold the same.

        Raises:
            ActorLostError: If another actor is gone.
        """
        started = time.perf_counter()
        self._num_steps_done = 0
        plan = self._plan
        lane_rows = plan.batch_size // plan.num_lanes
        lane_counts = self._lane_counts_L.tolist()
        num_steps = -(-max(lane_counts) // lane_rows)
        orders = []
        for lane in self._lanes:
            rows = self._train.filled_rows(self._lane_starts[lane], plan.lane_sizes[lane])
            orders.append(rows[sgd.lane_order(plan.seed, epoch, lane, lane_counts[lane])])
        losses = {lane: torch.zeros(lane_counts[lane], device=self._device) for lane in self._lanes}
        # Every actor sends as many lanes as the one that has most, so that all send alike.
        num_sent = -(-plan.num_lanes // self._num_actors)
        gradients_ZP = torch.zeros(num_sent, len(self._params_P), device=self._device)
        num_correct = torch.zeros((), dtype=torch.int64, device=self._device)
        norm_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        for place, (rows_B, counts) in enumerate(sgd.batches(orders, lane_rows, num_steps)):
            rows_B = rows_B.to(self._device)
            losses_B, is_correct_B = sgd.lane_gradients(
                self._params_P,
                self._train.images_MD[rows_B],
                self._train.labels_M[rows_B],
                counts,
                gradients_ZP[: len(self._lanes)],
                self._centre_D,
            )
            num_correct += is_correct_B.sum()
            for lane, lane_losses_B in zip(self._lanes, losses_B.split(counts), strict=True):
                losses[lane][place * lane_rows : place * lane_rows + len(lane_losses_B)] = lane_losses_B
            num_images = sum(min(max(count - place * lane_rows, 0), lane_rows) for count in lane_counts)
            norm_sum += sgd.step(self._params_P, self._gather_lanes(gradients_ZP), num_images, self._learning_rate)
            self._num_steps_done += 1
        part_losses, valid_confusion = self._validate()
        record = EpochRecord(
            epoch=epoch,
            num_steps=num_steps,
            lane_losses={lane: float(losses[lane].double().sum()) for lane in self._lanes},
            num_train_correct=int(num_correct),
            num_train=sum(lane_counts[lane] for lane in self._lanes),
            part_losses=part_losses,
            valid_confusion=valid_confusion,
            gradient_norm=float(norm_sum) / num_steps,
            seconds=time.perf_counter() - started,
        )
        return record, self._params_P.cpu().numpy().copy() if self._rank == 0 else None

    def count_steps(self) -> int:
        """Say how many steps of the epoch under way, or of the last one, are done."""
        return self._num_steps_done

    def score_part(self, part: int) -> ScoredPart:
        """Score a part's images by every classifier and forget them."""
        buffer, keys = self._parts.pop(part), self._part_keys.pop(part)
        images_ND, labels_N = buffer.filled()
        l1_NK, rms_NK = distance.distances(images_ND, self._means_KD)
        scores_NK = {"nearest_mean_l1": l1_NK, "nearest_mean_rms": rms_NK}
        predictions_N = {name: distance.nearest(distances_NK) for name, distances_NK in scores_NK.items()}
        if self._plan.has_training:
            log_probabilities_NK = sgd.log_probabilities(
                self._params_P, images_ND, self._plan.num_classes, self._centre_D
            )
            scores_NK["sgd_linear"] = log_probabilities_NK.exp()
            predictions_N["sgd_linear"] = log_probabilities_NK.argmax(1)
        confusions = {
            name: distance.confusion(labels_N, predicted_N, self._plan.num_classes).cpu().numpy()
            for name, predicted_N in predictions_N.items()
        }
        return ScoredPart(
            keys=pa.concat_arrays([keys[offset] for offset in sorted(keys)]),
            labels=labels_N.cpu().numpy(),
            predictions={name: tensor.cpu().numpy() for name, tensor in predictions_N.items()},
            scores={name: tensor.cpu().numpy() for name, tensor in scores_NK.items()},
            confusions=confusions,
        )

    def _validate(self) -> tuple[dict[int, float], npt.NDArray[np.int64]]:
        num_classes = self._plan.num_classes
        losses = {}
        total_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=self._device)
        for part, buffer in sorted(self._parts.items()):
            images_ND, labels_N = buffer.filled()
            log_probabilities_NK = sgd.log_probabilities(self._params_P, images_ND, num_classes, self._centre_D)
            losses[part] = -float(log_probabilities_NK.gather(1, labels_N[:, None]).double().sum())
            total_KK += distance.confusion(labels_N, log_probabilities_NK.argmax(1), num_classes)
        return losses, total_KK.cpu().numpy()

    def _add_up(self, counts: torch.Tensor) -> torch.Tensor:
        """Add up whole numbers over all actors."""
        if not self._is_in_group:
            return counts
        total = counts.to(self._exchange_device())
        self._exchange(lambda: dist.all_reduce(total))
        return total.to(counts.device)

    def _gather_lanes(self, gradients_ZP: torch.Tensor) -> torch.Tensor:
        """Bring all actors' lanes together, in the lanes' order: [Z, P] on each of A actors -> [L, P]."""
        if not self._is_in_group:
            return gradients_ZP
        sent_ZP = gradients_ZP.to(self._exchange_device())
        num_sent, num_params = sent_ZP.shape
        all_P = torch.empty(self._num_actors * num_sent, num_params, device=sent_ZP.device)
        self._exchange(lambda: dist.all_gather_single(all_P, sent_ZP))
        # Lane l is the (l // A)-th of actor l % A: [A, Z, P] -> [Z, A, P] -> [Z·A, P], its tail without lanes cut off.
        by_actor = all_P.view(self._num_actors, num_sent, num_params)
        return by_actor.transpose(0, 1).reshape(-1, num_params)[: self._plan.num_lanes].to(gradients_ZP.device)

    def _exchange(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as exc:
            raise ActorLostError(f"actor {self._rank}: expected the other actors to answer, got {exc}") from exc

    def _exchange_device(self) -> torch.device:
        return self._device if self._backend == "nccl" else torch.device("cpu")


class _Buffer:
    """Images of one group at the places of the listing; the places of skipped images stay empty."""

    def __init__(self, num_places: int, num_values: int, device: torch.device) -> None:
        self.images_MD = torch.empty(num_places, num_values, dtype=torch.uint8, device=device)
        self.labels_M = torch.empty(num_places, dtype=torch.int64, device=device)
        self._is_filled_M = torch.zeros(num_places, dtype=torch.bool)

    def put(self, start: int, images_ND: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Copy a shard to its place."""
        places = slice(start, start + len(labels_N))
        self.images_MD[places] = images_ND
        self.labels_M[places] = labels_N
        self._is_filled_M[places] = True

    def filled_rows(self, start: int, size: int) -> torch.Tensor:
        """Return the filled places among `size` ones from `start`, int64, on the CPU."""
        return self._is_filled_M[start : start + size].nonzero().squeeze(1) + start

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images and labels, without a copy where no place is empty."""
        if bool(self._is_filled_M.all()):
            return self.images_MD, self.labels_M
        rows = self.filled_rows(0, len(self._is_filled_M)).to(self.images_MD.device)
        return self.images_MD[rows], self.labels_M[rows]


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return str(name)
    return None


def _to_tensors(table: pa.Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a decoded shard to the device: images uint8 [N, D] and labels int64 [N]."""
    images = table["image"].combine_chunks().storage
    pixels = images.flatten().to_numpy().reshape(len(table), -1 if len(table) else images.type.list_size)
    # A copy, because the object store's memory is read-only and is to be given back.
    images_ND = torch.from_numpy(pixels.copy()).to(device)
    labels_N = torch.from_numpy(table["class"].to_numpy().astype(np.int64)).to(device)
    return images_ND, labels_N
