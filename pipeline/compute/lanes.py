"""The training images of some lanes, in memory, on a GPU or on disk, and the order in which an epoch takes them.

Input: images with their lanes and offsets. Output: for each step, the next rows of every lane. Invariant: the order
depends on the seed, the epoch, the lane and the images' offsets alone, and not on where the images are kept.

A lane is stored as chunks, each of every n-th image of it, so that a chunk of a sorted listing holds all classes. An
epoch takes the chunks of a lane in another order each time, and the images of a chunk in another order: what is on disk
is read chunk by chunk from front to back, the next one while steps are made with this one.

Axes: B rows of a step, D values of an image, M positions of all lanes, N images, Z lanes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.compute.classifiers import sgd_linear
from pipeline.compute.features import DTYPES
from pipeline.compute.spool import Spool
from pipeline.compute.strips import TrainBlock
from pipeline.errors import ClusterError
from pipeline.plan import Plan

# What is searched at once, and so many of it are read together.
_BLOCK_BYTES = 16 * 2**20
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 16, 16384
_SPREAD_BLOCKS = 4

Batch = tuple[torch.Tensor, torch.Tensor]


class Lanes:
    """Some lanes of a job.

    Args:
        plan: The job's plan.
        lanes: The numbers of Z lanes.
        device: Where steps take their rows.
        store: Where images are kept.
        scratch: The folder whose disk keeps them, where `store` is the CPU; None for its memory.

    Raises:
        ClusterError: If there is no room on that disk.
    """

    def __init__(
        self, plan: Plan, lanes: Sequence[int], device: torch.device, store: torch.device, scratch: str | None
    ) -> None:
        self._plan = plan
        self._device = device
        self._is_on_disk = scratch is not None
        self._num_chunks = plan.num_chunks
        lane_positions = plan.lane_positions
        self._chunk_rows = lane_positions // self._num_chunks
        self._starts = {lane: index * lane_positions for index, lane in enumerate(lanes)}
        num_positions = len(lanes) * lane_positions
        self._images_MD = empty_images(num_positions, plan.num_values, store, scratch, image_dtype(plan))
        self._labels_M = torch.empty(num_positions, dtype=torch.int32, device=store)
        self._is_filled_M = np.zeros(num_positions, np.bool_)
        self._keys = Spool(scratch)
        # By the first row of each shard.
        self._key_numbers: dict[int, int] = {}

    @property
    def num_positions(self) -> int:
        """Images that these lanes have room for."""
        return len(self._images_MD)

    def put(
        self,
        rows_N: npt.NDArray[np.int64],
        images_ND: torch.Tensor,
        labels_N: torch.Tensor,
        keys: pa.ChunkedArray | None = None,
    ) -> None:
        """Copy images to their positions.

        Args:
            rows_N: Their rows in the training listing.
            images_ND: uint8.
            labels_N: int64.
            keys: Their keys, string, where neighbors are to be named.
        """
        if keys is not None and len(rows_N):
            # A copy: the column is a view into the object store, which would keep the whole shard's pixels there.
            self._key_numbers[int(rows_N[0])] = self._keys.put((rows_N, pa.array(keys.to_pylist(), pa.string())))
        positions_N = self._positions(rows_N)
        put_images(self._images_MD, positions_N, images_ND)
        self._labels_M[torch.from_numpy(positions_N).to(self._labels_M.device)] = labels_N.to(self._labels_M)
        self._is_filled_M[positions_N] = True

    def blocks(self, device: torch.device) -> Iterator[TrainBlock]:
        """Give all images, in blocks of as many positions, on a device.

        A block is every n-th image of some chunks, and so of images of all classes, however the listing is sorted: the
        nearest found in one are then near.
        """
        value_bytes = 8 if self._plan.has_features else 1  # as they are searched
        step = max(_MIN_BLOCK_ROWS, min(_MAX_BLOCK_ROWS, _BLOCK_BYTES // (value_bytes * self._images_MD.shape[1])))
        size = self._chunk_rows * max(1, _SPREAD_BLOCKS * step // max(1, self._chunk_rows))
        for start in range(0, len(self._images_MD), max(1, size)):
            stop = min(start + size, len(self._images_MD))
            num_blocks = -(-(stop - start) // step)
            for first in range(start, start + num_blocks):
                images_TD, labels_T, rows_T = self.between(first, stop, num_blocks)
                if len(rows_T):
                    yield TrainBlock(images_TD.to(device), torch.from_numpy(rows_T), labels_T)

    def between(self, start: int, stop: int, step: int = 1) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64]]:
        """Give the images at some positions, [N, D], where they are kept; their labels and rows, int64 [N]."""
        positions = slice(start, stop, step)
        is_filled_N = self._is_filled_M[positions]
        places_N = np.flatnonzero(is_filled_N)
        images_ND = self._images_MD[positions]
        if len(places_N) < len(is_filled_N):
            images_ND = images_ND.index_select(0, torch.from_numpy(places_N).to(images_ND.device))
        labels_N = self._labels_M[positions].cpu().long()[places_N]
        return images_ND.contiguous(), labels_N, self._rows(start + step * places_N)

    def take(self, rows_N: npt.NDArray[np.int64]) -> torch.Tensor:
        """Give the images, uint8 [N, D], of rows of the listing that are here."""
        positions_N = torch.from_numpy(self._positions(rows_N)).to(self._images_MD.device)
        return self._images_MD.index_select(0, positions_N)

    def keys_of(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
        """Give the keys, str, of rows of the listing that are here."""
        firsts_S = sorted(self._key_numbers)
        keys_N = np.full(len(rows_N), "", object)
        shards_N = np.searchsorted(firsts_S, rows_N, side="right") - 1
        for shard in np.unique(shards_N):
            rows_R, keys = self._keys.get(self._key_numbers[firsts_S[shard]])
            chosen_N = np.flatnonzero(shards_N == shard)
            # One by one: Arrow's own way loads pyarrow.compute.
            keys_N[chosen_N] = [keys[place].as_py() for place in np.searchsorted(rows_R, rows_N[chosen_N]).tolist()]
        return keys_N

    def _positions(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Find where rows of the listing are kept, int64 [N]."""
        assignment = self._plan.assignment
        offsets_N = assignment.offsets(rows_N)
        starts_L = np.array([self._starts.get(lane, -1) for lane in range(assignment.num_lanes)])
        # [lane][chunk][row of the chunk]: the p-th image of a lane is in chunk p modulo their number.
        positions_N = starts_L[assignment.lanes(rows_N)] + offsets_N % self._num_chunks * self._chunk_rows
        positions_N += offsets_N // self._num_chunks
        return positions_N

    def _rows(self, positions_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Find the rows of the listing that are kept at positions, int64 [N]."""
        rows_N = np.empty_like(positions_N)
        lane_positions = self._num_chunks * self._chunk_rows
        for lane, start in self._starts.items():
            is_of_lane_N = (positions_N >= start) & (positions_N < start + lane_positions)
            chunks_N, places_N = np.divmod(positions_N[is_of_lane_N] - start, self._chunk_rows)
            rows_N[is_of_lane_N] = self._plan.assignment.rows(lane, places_N * self._num_chunks + chunks_N)
        return rows_N

    def batches(self, epoch: int, lane_rows: int, num_steps: int) -> Iterator[tuple[torch.Tensor, Any, list[int]]]:
        """Give the rows of every step of an epoch.

        Args:
            epoch: From 1.
            lane_rows: Rows that a lane gives to a step; one that has run out gives fewer, or none.
            num_steps: Steps of the epoch.

        Yields:
            Images uint8 [B, D] and labels int64 [B], lane after lane, and how many rows are of each lane.
        """
        if self._device.type == "cpu" and not self._is_on_disk:
            yield from self._batches_in_memory(epoch, lane_rows, num_steps)
            return
        with ThreadPoolExecutor(1) as reader:
            lanes = [self._lane_batches(lane, epoch, lane_rows, reader) for lane in self._starts]
            for _ in range(num_steps):
                images, labels = zip(*(next(lane) for lane in lanes), strict=True)
                yield torch.cat(images), torch.cat(labels), [len(each) for each in labels]

    def _batches_in_memory(
        self, epoch: int, lane_rows: int, num_steps: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        """Do as `batches`: all rows of a step are copied at once, and no others."""
        lanes = [self._lane_positions(lane, epoch, lane_rows) for lane in self._starts]
        for _ in range(num_steps):
            positions = [next(lane) for lane in lanes]
            positions_B = torch.from_numpy(np.concatenate(positions))
            # Many times as fast as indexing by brackets, which copies byte by byte.
            images_BD, labels_B = (each.index_select(0, positions_B) for each in (self._images_MD, self._labels_M))
            yield images_BD, labels_B.long(), [len(each) for each in positions]

    def _lane_positions(self, lane: int, epoch: int, lane_rows: int) -> Iterator[npt.NDArray[np.int64]]:
        rest_R = empty = np.zeros(0, np.int64)
        for chunk in self._chunk_order(lane, epoch):
            positions_N = np.concatenate((rest_R, self._chunk_start(lane, chunk) + self._row_order(lane, epoch, chunk)))
            cut = len(positions_N) // lane_rows * lane_rows
            yield from positions_N[:cut].reshape(-1, lane_rows)
            rest_R = positions_N[cut:]
        if len(rest_R):
            yield rest_R
        while True:
            yield empty

    def _chunk_order(self, lane: int, epoch: int) -> list[int]:
        order: list[int] = shuffled(self._num_chunks, self._plan.seed, epoch, lane, "chunks").tolist()
        return order

    def _chunk_start(self, lane: int, chunk: int) -> int:
        return self._starts[lane] + chunk * self._chunk_rows

    def _row_order(self, lane: int, epoch: int, chunk: int) -> npt.NDArray[np.int64]:
        """Draw the order in which an epoch takes a chunk's images, by their places in it, int64 [N]."""
        start = self._chunk_start(lane, chunk)
        rows_N: npt.NDArray[np.int64] = np.flatnonzero(self._is_filled_M[start : start + self._chunk_rows])
        order_N: npt.NDArray[np.int64] = shuffled(len(rows_N), self._plan.seed, epoch, lane, chunk).numpy()
        return rows_N[order_N]

    def _lane_batches(self, lane: int, epoch: int, lane_rows: int, reader: ThreadPoolExecutor) -> Iterator[Batch]:
        rest_RD, rest_R = self._images_MD[:0].to(self._device), self._labels_M[:0].long().to(self._device)
        empty = rest_RD, rest_R
        for images_ND, labels_N in self._shuffled_chunks(lane, epoch, reader):
            if len(rest_R):
                images_ND, labels_N = torch.cat((rest_RD, images_ND)), torch.cat((rest_R, labels_N))
            cut = len(labels_N) // lane_rows * lane_rows
            if cut:  # of no rows, torch makes one piece all the same
                yield from zip(images_ND[:cut].split(lane_rows), labels_N[:cut].split(lane_rows), strict=True)
            rest_RD, rest_R = images_ND[cut:], labels_N[cut:]
        if len(rest_R):
            yield rest_RD, rest_R
        while True:
            yield empty

    def _shuffled_chunks(self, lane: int, epoch: int, reader: ThreadPoolExecutor) -> Iterator[Batch]:
        order = self._chunk_order(lane, epoch)
        if not self._is_on_disk:
            for chunk in order:
                yield self._shuffled_chunk(lane, epoch, chunk)
            return
        coming = reader.submit(self._shuffled_chunk, lane, epoch, order[0])
        for following in [*order[1:], None]:
            images_ND, labels_N = coming.result()
            if following is not None:
                coming = reader.submit(self._shuffled_chunk, lane, epoch, following)
            yield images_ND, labels_N

    def _shuffled_chunk(self, lane: int, epoch: int, chunk: int) -> Batch:
        start = self._chunk_start(lane, chunk)
        stop = start + self._chunk_rows
        rows_N = torch.from_numpy(self._row_order(lane, epoch, chunk)).to(self._images_MD.device)
        images_ND = self._images_MD[start:stop]
        if self._is_on_disk:
            images_ND = images_ND.clone()  # from front to back, as a disk is read best
        chosen_ND = images_ND.index_select(0, rows_N)
        return chosen_ND.to(self._device), self._labels_M[start:stop][rows_N].long().to(self._device)


def image_dtype(plan: Plan) -> torch.dtype:
    """Return what images are kept as: pixels, or features."""
    return DTYPES[plan.model.feature_dtype] if plan.model and plan.has_features else torch.uint8


def empty_images(
    num_images: int, num_values: int, device: torch.device, scratch: str | None, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Make room for images, [M, D]: on a device, or mapped from a file without a name in a folder.

    Such a file goes with the process, however it ends.

    Raises:
        ClusterError: If there is no room on disk.
    """
    if scratch is None or num_images == 0:
        return torch.empty(num_images, num_values, dtype=dtype, device=device)
    num_bytes = num_images * num_values * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # else a full disk would be a crash later
            bytes_M = np.memmap(file, np.uint8, "r+", shape=num_bytes)
    except OSError as exc:
        raise ClusterError(
            f"--scratch {scratch}: expected {num_bytes / 2**30:.1f} GiB for images that memory cannot hold, got "
            f"{exc.strerror}; give another folder, a smaller --size, or more nodes"
        ) from exc
    return torch.from_numpy(bytes_M).view(dtype).view(num_images, num_values)


def put_images(images_MD: torch.Tensor, positions_N: npt.NDArray[np.int64], images_ND: torch.Tensor) -> None:
    """Copy images, [N, D], to their positions in [M, D]."""
    if images_MD.device.type == "cpu":
        # By NumPy, which copies rows at once: torch goes byte by byte, at a tenth of the speed.
        images_MD.numpy()[positions_N] = images_ND.cpu().numpy()
    else:
        images_MD[torch.from_numpy(positions_N).to(images_MD.device)] = images_ND.to(images_MD.device)


def shuffled(num_images: int, *parts: object) -> torch.Tensor:
    """Draw a permutation of 0 to `num_images` - 1, int64, on the CPU, from what it is for: seed, epoch, lane, chunk."""
    generator = torch.Generator().manual_seed(sgd_linear.derive_seed("order", *parts))
    return torch.randperm(num_images, generator=generator)
