"""The state of one computing process: images on one device, class means, a model.

What enters: decoded Arrow tables, one a shard. What leaves: counts, sums, epoch records, scored parts: small things.
Always: an image is copied to its place in one buffer when it arrives, and its place depends on the listing alone.

Axes as in `distance` and `sgd`; M is the number of places of a buffer, listed images that may yet be skipped.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import torch
import torch.distributed as dist
from torch.utils.dlpack import from_dlpack

from pipeline.compute.classifiers import nearest_mean, sgd_linear
from pipeline.compute.exchange import TIMEOUT_SECONDS, Address, Exchange
from pipeline.compute.lanes import Lanes
from pipeline.compute.parts import Part
from pipeline.data.columns import one_chunk
from pipeline.errors import ActorLostError
from pipeline.plan import Plan
from pipeline.results.figures import CLASSIFIERS, EpochRecord

# What images may take of a GPU's free memory; the rest is for computing with them.
_GPU_SHARE = 0.8
T = TypeVar("T")


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
        num_threads: Threads for distances on the CPU.
        scratch: The folder whose disk keeps the images; None where memory holds them. A GPU that holds them does.
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
    ) -> None:
        # One thread inside torch: sums are then added in one order, whatever OMP_NUM_THREADS says.
        torch.set_num_threads(1)
        self._plan = plan
        self._rank = rank
        self._num_actors = num_actors
        self._num_threads = num_threads
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
        self._store_device, self._scratch = self._choose_store(scratch)
        self._train: Lanes | None = None
        self._parts: dict[int, Part] = {}
        self._params_P = torch.empty(0)
        self._centre_D = torch.empty(0)
        self._learning_rate = 0.0
        self._exchange: Exchange | None = None
        self._has_nccl = False

    def describe(self) -> tuple[str, str]:
        """Name the device that this actor computes on, and where it keeps its images: `gpu`, `memory` or `disk`."""
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        is_on_gpu = self._store_device.type == "cuda"
        return device, "gpu" if is_on_gpu else "memory" if self._scratch is None else "disk"

    def listen(self, host: str) -> Address:
        """Wait for the others' calls on `host`, this actor's own address; return where they reach it."""
        self._exchange = Exchange(host)
        return self._exchange.address

    def join_group(self, token: bytes, *addresses: Address) -> None:
        """Connect with all other actors.

        Args:
            token: What only they know.
            addresses: What `listen` returned to all of them, by rank.

        Raises:
            ActorLostError: If not all of them come in time.
        """
        assert self._exchange is not None
        try:
            self._exchange.connect(self._rank, addresses, token)
            # NCCL takes no two members on one GPU; they exchange through the CPU instead.
            if self._device.type == "cuda" and self._plan.gpus_per_actor >= 1:
                self._join_nccl(self._exchange, addresses)
        except (OSError, RuntimeError) as exc:
            raise ActorLostError(f"actor {self._rank}: expected {self._num_actors} actors to meet, got {exc}") from exc

    def add_train(self, start: int, table: pa.Table) -> None:
        """Count training images into the class sums and keep them, if there is training.

        Args:
            start: The shard's first row in the training listing.
            table: `row` int32, counted from there, `class` and `image`, all of this actor's lanes.
        """
        images_ND, labels_N = _to_tensors(table, self._device)
        rows_N = start + table["row"].to_numpy().astype(np.int64)
        sums_KD, counts_K = nearest_mean.class_sums(images_ND, labels_N, self._plan.num_classes)
        self._sums_KD += sums_KD
        self._counts_K += counts_K
        lanes_N = torch.from_numpy(self._plan.assignment.lanes(rows_N))
        self._lane_counts_L += torch.bincount(lanes_N, minlength=self._plan.num_lanes)
        if self._plan.has_training:
            self._num_squares += nearest_mean.sum_squares(images_ND)
            if self._train is None:
                self._train = self._make_lanes()
            self._train.put(rows_N, images_ND, labels_N)

    def add_valid(self, part: int, offset: int, table: pa.Table) -> None:
        """Keep a validation shard's images until their part is scored.

        Args:
            part: The part that the shard belongs to, one of this actor's.
            offset: Where its first listed image stands in the part.
            table: `row` int32, counted from there, `key`, `class` and `image`.
        """
        if part not in self._parts:
            size, num_values = self._plan.part_sizes[part], self._plan.target.num_values
            scratch = self._scratch if self._plan.has_training else None
            self._parts[part] = Part(size, num_values, self._store_device, scratch)
        rows_N = offset + table["row"].to_numpy().astype(np.int64)
        self._parts[part].put(rows_N, table["key"], *_to_tensors(table, self._store_device))

    def finish_means(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Add up all actors' class sums and divide: every actor then holds the same means.

        Returns:
            The classes' counts, int64 [K], and means, float32 [K, D], 0 to 1. A class without images has NaN.
        """
        self._sums_KD, self._counts_K = self._add_up(self._sums_KD), self._add_up(self._counts_K)
        self._lane_counts_L = self._add_up(self._lane_counts_L)
        self._num_squares = self._add_up(self._num_squares)
        self._means_KD = nearest_mean.class_means(self._sums_KD, self._counts_K)
        return self._counts_K.cpu().numpy(), self._means_KD.cpu().numpy()

    def begin_training(self, params_P: npt.NDArray[np.float32] | None) -> float:
        """Take the parameters of the last finished epoch, or draw new ones from the seed; return the learning rate."""
        num_train, num_squares = int(self._counts_K.sum()), int(self._num_squares)
        centre_D, safe_rate = sgd_linear.centre_and_rate(self._sums_KD, num_train, num_squares)
        self._centre_D = centre_D.to(self._device)
        self._learning_rate = self._plan.learning_rate or safe_rate
        if params_P is None:
            initial_P = sgd_linear.initial_params(self._plan.num_classes, self._plan.target.num_values, self._plan.seed)
        else:
            initial_P = torch.tensor(params_P)  # a copy: what Ray gives is read-only, and not aligned as torch's own
        self._params_P = initial_P.to(self._device)
        return self._learning_rate

    @torch.inference_mode()
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
        if self._train is None:  # all images of these lanes were skipped, or there are none
            self._train = self._make_lanes()
        losses_SZR = torch.zeros(num_steps, len(self._lanes), lane_rows, device=self._device)
        # Every actor sends as many lanes as the one that has most, so that all send alike.
        num_sent = -(-plan.num_lanes // self._num_actors)
        gradients_ZP = sgd_linear.empty_gradients(num_sent, len(self._params_P), self._device)
        num_correct = torch.zeros((), dtype=torch.int64, device=self._device)
        norm_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        batches = self._train.batches(epoch, lane_rows, num_steps)
        for index, (images_BD, labels_B, counts) in enumerate(batches):
            losses_B, is_correct_B = sgd_linear.lane_gradients(
                self._params_P, images_BD, labels_B, counts, gradients_ZP[: len(self._lanes)], self._centre_D
            )
            num_correct += is_correct_B.sum()
            if len(losses_B) == losses_SZR[index].numel():
                losses_SZR[index] = losses_B.view_as(losses_SZR[index])
            else:
                for lane_losses_R, lane_losses_B in zip(losses_SZR[index], losses_B.split(counts), strict=True):
                    lane_losses_R[: len(lane_losses_B)] = lane_losses_B
            num_images = sum(min(max(count - index * lane_rows, 0), lane_rows) for count in lane_counts)
            norm_sum += sgd_linear.step(
                self._params_P, self._gather_lanes(gradients_ZP), num_images, self._learning_rate
            )
            self._num_steps_done += 1
        part_losses, valid_confusion = self._validate()
        record = EpochRecord(
            epoch=epoch,
            num_steps=num_steps,
            lane_losses={lane: float(losses_SZR[:, index].double().sum()) for index, lane in enumerate(self._lanes)},
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
        stored = self._parts.pop(part)
        names = CLASSIFIERS if self._plan.has_training else CLASSIFIERS[:2]
        scores: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        predictions: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for images_ND, _ in stored.blocks(self._device):
            l1_NK, rms_NK = nearest_mean.distances(images_ND, self._means_KD, self._num_threads)
            for name, distances_NK in zip(names, (l1_NK, rms_NK), strict=False):
                scores[name].append(distances_NK)
                predictions[name].append(nearest_mean.nearest(distances_NK))
            if self._plan.has_training:
                log_probabilities_NK = self._log_probabilities(images_ND)
                scores["sgd_linear"].append(log_probabilities_NK.exp())
                predictions["sgd_linear"].append(log_probabilities_NK.argmax(1))
        labels_N = stored.labels()
        predictions_N = {name: torch.cat(blocks).cpu() for name, blocks in predictions.items()}
        return ScoredPart(
            keys=stored.keys(),
            labels=labels_N.numpy(),
            predictions={name: tensor.numpy() for name, tensor in predictions_N.items()},
            scores={name: torch.cat(blocks).cpu().numpy() for name, blocks in scores.items()},
            confusions={
                name: nearest_mean.confusion(labels_N, tensor, self._plan.num_classes).numpy()
                for name, tensor in predictions_N.items()
            },
        )

    def _make_lanes(self) -> Lanes:
        return Lanes(self._plan, self._lanes, self._device, self._store_device, self._scratch)

    def _log_probabilities(self, images_ND: torch.Tensor) -> torch.Tensor:
        return sgd_linear.log_probabilities(self._params_P, images_ND, self._plan.num_classes, self._centre_D)

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
            for images_ND, labels_N in stored.blocks(self._device):
                log_probabilities_NK = self._log_probabilities(images_ND)
                block_losses.append(-float(log_probabilities_NK.gather(1, labels_N[:, None]).double().sum()))
                total_KK += nearest_mean.confusion(labels_N, log_probabilities_NK.argmax(1), num_classes)
            losses[part] = math.fsum(block_losses)
        return losses, total_KK.cpu().numpy()

    def _join_nccl(self, exchange: Exchange, addresses: Sequence[Address]) -> None:
        """Form the process group by which GPUs exchange; the first actor keeps its meeting point."""
        host = addresses[0][0]
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        port = 0
        if self._rank == 0:
            # Of itself the store would listen on every address of the machine.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family, backlog=1024)
            port = int(listener.getsockname()[1])
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
            )
        port = int(exchange.gather(np.array([port]))[0, 0])
        if self._rank > 0:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        # Of itself NCCL takes the interface that the host's name leads to, which may be another or a public one.
        if interface := _interface_of(addresses[self._rank][0]):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        dist.init_process_group(
            "nccl", store=self._store, rank=self._rank, world_size=self._num_actors, timeout=timeout
        )
        self._has_nccl = True

    def _add_up(self, counts: torch.Tensor) -> torch.Tensor:
        """Add up whole numbers over all actors."""
        if self._exchange is None:
            return counts
        exchange = self._exchange
        total = self._answer_of_all(lambda: exchange.add_up(counts.cpu().numpy()))
        return torch.from_numpy(total).to(counts.device)

    def _gather_lanes(self, gradients_ZP: torch.Tensor) -> Sequence[torch.Tensor]:
        """Bring all actors' lanes together, in the lanes' order: [Z, P] on each of A actors -> L times [P]."""
        if self._exchange is None:
            return gradients_ZP.unbind()
        if self._has_nccl:
            sent_ZP = gradients_ZP.contiguous()
            all_AZP = torch.empty(self._num_actors, *sent_ZP.shape, device=sent_ZP.device)
            self._answer_of_all(lambda: dist.all_gather_single(all_AZP.flatten(0, 1), sent_ZP))
        else:
            exchange = self._exchange
            gathered = self._answer_of_all(lambda: exchange.gather(gradients_ZP.cpu().numpy()))
            all_AZP = torch.from_numpy(gathered).to(gradients_ZP.device)
        # Lane l is the (l // A)-th of actor l % A.
        return [all_AZP[lane % self._num_actors, lane // self._num_actors] for lane in range(self._plan.num_lanes)]

    def _answer_of_all(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except (OSError, RuntimeError) as exc:
            raise ActorLostError(f"actor {self._rank}: expected the other actors to answer, got {exc}") from exc


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return str(name)
    return None


def _to_tensors(table: pa.Table, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a decoded shard to the device: images uint8 [N, D], on a CPU only to be read, and labels int64 [N]."""
    images = one_chunk(table["image"]).storage
    # Nothing is copied on a CPU: what is done with the pixels is done in the object store's memory.
    size = images.type.list_size
    values = images.values.slice(images.offset * size, len(images) * size)
    images_ND = from_dlpack(values).view(len(images), size).to(device)
    labels_N = torch.from_numpy(table["class"].to_numpy().astype(np.int64)).to(device)
    return images_ND, labels_N
