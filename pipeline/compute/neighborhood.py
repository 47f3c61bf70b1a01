"""An actor's share of the search for neighbors, and what follows from them: near-duplicates and doubtful labels.

Input: its training images, its parts, and requests. Output: images that all actors are to search for, and what this one
finds; then rows of two tables. Invariant: every image is searched for among the training images of all actors, and no
result depends on which actor holds which of them.

A request goes through three steps: its owner gives the images (`queries`), every actor searches its own training images
(`search`), the owner takes the nearest of all answers (`take`). Where labels are doubtful, a second request looks for
the nearest image of the class that was given.

Axes: N images, J neighbors, K classes, D values of an image, S images with doubtful labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.compute.classifiers.knn import votes
from pipeline.compute.features import LENGTH
from pipeline.compute.lanes import Lanes, image_dtype
from pipeline.compute.neighbors import FAR, Neighbors, merge, stack
from pipeline.compute.parts import Part
from pipeline.compute.search import search
from pipeline.compute.spool import Spool
from pipeline.compute.strips import TrainBlock
from pipeline.compute.threads import Threads
from pipeline.compute.twins import Candidates, choose_twins, find_candidates, sign
from pipeline.plan import RATIO_NEIGHBOR, Plan, Request
from pipeline.results.duplicates import Pair, Suspect, near_table, suspects_table
from pipeline.results.tables import NeighborColumns

# An image is a near-duplicate of a training image that is at half of the distance of its fifth neighbor at most, or at
# a quarter of the median distance of all validation images to their nearest one. Of MNIST's own validation images 0.1 %
# are so near, of Fashion-MNIST's 0.8 %, in pairs that look alike; of images that were planted (noise of 8, JPEG of
# quality 50, brighter by 5 %, moved by a pixel) 99 %.
MAX_RATIO, MAX_MEDIAN_SHARE = 0.5, 0.25
# A histogram of distances from 0 to 1, by which the median is found without a list of all.
HISTOGRAM_BINS = 2**14
# Signatures of so many training images are kept from one request to the next, at some 80 bytes each.
_MAX_SIGNED = 2**19


@dataclass(frozen=True)
class Queries:
    """Images that are searched for.

    Attributes:
        images_ND: uint8, or features.
        own_rows_N: Their own rows, int64, -1 where they are no training images; None where none is.
        only_labels_N: The classes among which each is searched for, int64; None for all.
        num_neighbors: How many neighbors each is to have.
        has_twins: Whether their near-duplicates are wanted.
    """

    images_ND: npt.NDArray[Any]
    own_rows_N: npt.NDArray[np.int64] | None
    only_labels_N: npt.NDArray[np.int64] | None
    num_neighbors: int
    has_twins: bool


@dataclass(frozen=True)
class Answer:
    """What one actor found: neighbors, and what may be near-duplicates where these were wanted of pixels."""

    neighbors: Neighbors
    candidates: Candidates | None


@dataclass
class Found:
    """What all actors found: neighbors, and the most likely near-duplicates."""

    neighbors: Neighbors
    twins: Neighbors


# Images whose label is not that of most of their neighbors: the split (0 train, 1 valid), the part of a validation
# image, its position there, or the row of a training image, the given label and that of most neighbors, the share of
# neighbors that have the given one, and squared distances to the nearest image of another class and of the given one.
_DOUBTFUL = np.dtype(
    [("split", np.int8), ("part", np.int32), ("place", np.int64), ("label", np.int32), ("suggested", np.int32),
     ("share", np.float64), ("other", np.int64), ("own", np.int64)]
)  # fmt: skip


class Neighborhood:
    """The neighbors of one actor's images.

    Args:
        plan: The job's plan.
        train: The actor's training images.
        parts: Its validation images.
        device: Where is searched.
        threads: They share it, on a CPU.
        scratch: The folder whose disk keeps what is found; None for memory.
    """

    def __init__(
        self,
        plan: Plan,
        train: Lanes,
        parts: Mapping[int, Part],
        device: torch.device,
        threads: Threads,
        scratch: str | None = None,
    ) -> None:
        self._plan = plan
        self._train = train
        self._parts = parts
        self._device = device
        self._threads = threads
        self._answers = Spool(scratch)
        # Numbers of answers, by part.
        self._found: dict[int, list[int]] = {part: [] for part in parts}
        self._histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        self._settled: list[npt.NDArray[np.void]] = [np.zeros(0, _DOUBTFUL)]
        self._pending = np.zeros(0, _DOUBTFUL)
        self.num_blocks_done = 0
        self._signed: list[TrainBlock] = []  # by block, once all are made

    def queries(self, request: Request) -> Queries:
        """Give the images of a request, all of this actor."""
        if request.kind == "doubtful":
            doubtful_S = self._pending[slice(*request.spans[0][1:])]
            own_rows_S = np.where(doubtful_S["split"] == 0, doubtful_S["place"], -1)
            labels_S = doubtful_S["label"].astype(np.int64)
            return Queries(self._images_of(doubtful_S), own_rows_S, labels_S, 1, has_twins=False)
        found = [self._between(request.kind, span) for span in request.spans]
        images_ND = torch.cat([images_ND.cpu() for images_ND, _, _ in found]).numpy()
        is_train = request.kind == "train"
        own_rows_N = np.concatenate([rows_N for _, _, rows_N in found]) if is_train else None
        number = self._plan.num_neighbors if is_train else self._plan.num_searched
        return Queries(images_ND, own_rows_N, None, number, has_twins=not is_train)

    def search(self, queries: Queries) -> Answer:
        """Search this actor's training images."""
        images_ND = torch.from_numpy(queries.images_ND.copy()).to(self._device)
        own_rows_N, only_labels_N = (
            None if each_N is None else torch.from_numpy(each_N.copy())
            for each_N in (queries.own_rows_N, queries.only_labels_N)
        )
        number, threads = queries.num_neighbors, self._threads
        neighbors = search(images_ND, self._blocks(), number, threads, own_rows_N, only_labels_N)
        if not queries.has_twins or self._plan.has_features:
            return Answer(self._named(neighbors), None)
        shape = self._plan.shape
        candidates = find_candidates(images_ND, neighbors, shape, self._signed_blocks(), self._train.take, threads)
        is_compared_NC, near = candidates.distances_NC != FAR, candidates.near
        near.keys_NJ[is_compared_NC] = self._train.keys_of(near.rows_NJ[is_compared_NC])
        return Answer(self._named(neighbors), candidates)

    def take(self, request: Request, *answers: Answer) -> int:
        """Take what all actors found for a request of this one.

        Returns:
            Of how many of this actor's images so far the nearest one of the given class is to be searched for.
        """
        neighbors = merge([answer.neighbors for answer in answers], self._plan.num_searched)
        if request.kind == "doubtful":
            doubtful_S = self._pending[slice(*request.spans[0][1:])]
            doubtful_S["own"] = neighbors.distances_NJ[:, 0] if neighbors.distances_NJ.shape[1] else FAR
            return 0
        twins = None
        if request.kind == "valid":
            found = [answer.candidates for answer in answers if answer.candidates is not None]
            # A small change of an image leaves its features near, or nothing does.
            nearest = neighbors.map(lambda values: values[:, :1])
            twins = choose_twins(found, neighbors, self._plan.num_values) if found else nearest
        voters = neighbors.map(lambda values: values[:, : self._plan.num_neighbors])
        start = 0
        for span in request.spans:
            _, labels_N, places_N = self._between(request.kind, span)
            rows = slice(start, start + len(places_N))
            start = rows.stop
            if twins is not None:
                self._found[span[0]].append(self._answers.put(Found(neighbors[rows], twins[rows])))
                nearest_N = self._rms(neighbors.distances_NJ[rows, 0]).clip(max=1)
                self._histogram += np.bincount(
                    (nearest_N * (HISTOGRAM_BINS - 1)).astype(np.int64), minlength=HISTOGRAM_BINS
                )
            doubtful_S = self._doubt(request.kind == "valid", span[0], places_N, labels_N, voters[rows])
            is_settled_S = doubtful_S["own"] != FAR
            self._settled.append(doubtful_S[is_settled_S])
            self._pending = np.concatenate([self._pending, doubtful_S[~is_settled_S]])
        return len(self._pending)

    def histogram(self) -> npt.NDArray[np.int64]:
        """Count this actor's validation images by the distance to their nearest training image, [HISTOGRAM_BINS]."""
        return self._histogram

    def columns(self, part: int) -> NeighborColumns:
        """Give what the predictions of a part say of neighbors, in the order of the listing."""
        found = self._neighbors(part)
        distances_NJ, number = self._rms(found.distances_NJ), self._plan.num_neighbors
        voters = (found.labels_NJ, distances_NJ) if self._plan.has_features else None
        return NeighborColumns(found.keys_NJ[:, :number], found.labels_NJ[:, :number], distances_NJ[:, :number], voters)

    def are_twins(self, part: int, median: float) -> npt.NDArray[np.bool_]:
        """Say which images of a part are a training image once more, as it is or changed a little; bool [N]."""
        distance_N, ratio_N = self._twin_distances(part)
        # Cosine distances go with the squares of others.
        power = 2 if self._plan.has_features else 1
        return (distance_N <= MAX_MEDIAN_SHARE**power * median) | (ratio_N <= MAX_RATIO**power)

    def judge(
        self, classes: Sequence[str], split_names: Sequence[str], median: float
    ) -> tuple[pa.Table, pa.Table, tuple[int, int]]:
        """Name near-duplicates and doubtful labels.

        Args:
            classes: Their names.
            split_names: What the dataset calls the splits.
            median: Distance of the median validation image to its nearest training image, rms, 0 to 1.

        Returns:
            Rows of `duplicates.parquet`, of `suspects.parquet`; and how many validation images have a twin, and how
            many of these the same pixels.
        """
        pairs, num_twins, num_same = [], 0, 0
        for part in sorted(self._parts):
            is_twin_N, is_same_N = self.are_twins(part, median), self._neighbors(part).distances_NJ[:, 0] == 0
            num_twins, num_same = num_twins + int(is_twin_N.sum()), num_same + int(is_same_N.sum())
            # The same pixels are found by their digests.
            pairs += self._pairs(part, np.flatnonzero(is_twin_N & ~is_same_N))
        suspects = self._suspects()
        tables = near_table(pairs, classes, split_names), suspects_table(suspects, classes, split_names)
        return *tables, (num_twins, num_same)

    def _pairs(self, part: int, rows_N: npt.NDArray[np.int64]) -> list[Pair]:
        stored, twins = self._parts[part], self._stacked(part, "twins")
        labels_N, listed_N = stored.labels(), stored.positions()
        keys = stored.keys_of(listed_N[rows_N])
        distance_N, ratio_N = self._twin_distances(part)
        return [
            Pair(
                row=self._first_row(part) + int(listed_N[row]),
                keys=(twins.keys_NJ[row, 0], key),
                labels=(int(twins.labels_NJ[row, 0]), int(labels_N[row])),
                distance=float(distance_N[row]),
                ratio=float(ratio_N[row]),
            )
            for key, row in zip(keys, rows_N, strict=True)
        ]

    def _suspects(self) -> list[Suspect]:
        doubtful_S = np.concatenate([*self._settled, self._pending])
        own_S, other_S = (np.sqrt(doubtful_S[name].astype(np.float64)) for name in ("own", "other"))
        # By the share of neighbors alone many would be alike: what is nearer decides among these.
        nearness_S = np.divide(own_S, own_S + other_S, out=np.full(len(own_S), 0.5), where=own_S + other_S > 0)
        nearness_S[doubtful_S["own"] == FAR] = 1
        num_neighbors = self._plan.num_neighbors
        score_S = (num_neighbors * (1 - doubtful_S["share"]) + nearness_S) / (num_neighbors + 1)
        keys_S = self._keys_of(doubtful_S)
        return [
            Suspect(
                row=int(each["place"]) + (self._first_row(int(each["part"])) if each["split"] else 0),
                key=keys_S[index],
                split=int(each["split"]),
                label=int(each["label"]),
                suggested=int(each["suggested"]),
                score=float(score_S[index]),
            )
            for index, each in enumerate(doubtful_S)
        ]

    def _first_row(self, part: int) -> int:
        """Return the row of a part's first image, counted through both splits."""
        return self._plan.assignment.num_images + sum(self._plan.part_sizes[:part])

    def _blocks(self) -> Iterator[TrainBlock]:
        for block in self._train.blocks(self._device):
            yield block
            self.num_blocks_done += 1

    def _signed_blocks(self) -> Iterable[TrainBlock]:
        if not self._signed:
            signed = (sign(block, self._plan.shape) for block in self._blocks())
            if self._train.num_positions > _MAX_SIGNED:
                return signed
            self._signed = list(signed)
        return self._signed

    def _between(
        self, kind: str, span: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.int64]]:
        part, start, stop = span
        return (self._train if kind == "train" else self._parts[part]).between(start, stop)

    def _named(self, neighbors: Neighbors) -> Neighbors:
        is_there_NJ = neighbors.distances_NJ != FAR
        neighbors.keys_NJ[is_there_NJ] = self._train.keys_of(neighbors.rows_NJ[is_there_NJ])
        return neighbors

    def _doubt(
        self, is_valid: bool, part: int, places_N: npt.NDArray[np.int64], labels_N: torch.Tensor, neighbors: Neighbors
    ) -> npt.NDArray[np.void]:
        """Describe those images whose label is not that of most of their neighbors."""
        votes_NK = votes(torch.from_numpy(neighbors.labels_NJ), self._plan.num_classes)
        suggested_N = votes_NK.argmax(1)
        rows_S = torch.nonzero(suggested_N != labels_N)[:, 0]
        is_own_SJ = neighbors.labels_NJ[rows_S] == labels_N[rows_S, None].numpy()
        distances_SJ = neighbors.distances_NJ[rows_S]
        doubtful_S = np.zeros(len(rows_S), _DOUBTFUL)
        doubtful_S["split"], doubtful_S["part"], doubtful_S["place"] = is_valid, part, places_N[rows_S]
        doubtful_S["label"], doubtful_S["suggested"] = labels_N[rows_S], suggested_N[rows_S]
        doubtful_S["share"] = is_own_SJ.mean(1) if is_own_SJ.size else 0
        doubtful_S["other"] = np.where(is_own_SJ, FAR, distances_SJ).min(1, initial=FAR)
        doubtful_S["own"] = np.where(is_own_SJ, distances_SJ, FAR).min(1, initial=FAR)
        return doubtful_S

    def _images_of(self, doubtful_S: npt.NDArray[np.void]) -> npt.NDArray[Any]:
        images_SD = torch.empty(len(doubtful_S), self._plan.num_values, dtype=image_dtype(self._plan)).numpy()
        for source, chosen_S in _by_source(doubtful_S):
            places = doubtful_S["place"][chosen_S]
            found_SD = self._train.take(places) if source is None else self._parts[source].take(places)[0]
            images_SD[chosen_S] = found_SD.cpu().numpy()
        return images_SD

    def _keys_of(self, doubtful_S: npt.NDArray[np.void]) -> npt.NDArray[np.object_]:
        keys_S = np.empty(len(doubtful_S), object)
        for source, chosen_S in _by_source(doubtful_S):
            holder = self._train if source is None else self._parts[source]
            keys_S[chosen_S] = holder.keys_of(doubtful_S["place"][chosen_S])
        return keys_S

    def _neighbors(self, part: int) -> Neighbors:
        return self._stacked(part, "neighbors")

    def _stacked(self, part: int, name: Literal["neighbors", "twins"]) -> Neighbors:
        found: list[Neighbors] = [getattr(self._answers.get(number), name) for number in self._found[part]]
        # A request all images of which were skipped does not know how many neighbors others have.
        return stack([each for each in found if len(each.rows_NJ)] or found[:1])

    def _twin_distances(self, part: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the distances of a part's images to their likely twins, rms, by themselves and by a neighbor's."""
        compared = self._neighbors(part).distances_NJ[:, :RATIO_NEIGHBOR][:, -1:]
        distance_N, compared_N = self._rms(self._stacked(part, "twins").distances_NJ[:, 0]), self._rms(compared[:, 0])
        ratio_N = np.divide(distance_N, compared_N, out=np.ones_like(distance_N), where=compared_N > 0)
        return distance_N, ratio_N

    def _rms(self, distances: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Turn squared distances into root mean squared ones of pixels of 0 to 1, or cosine distances, float32."""
        if self._plan.has_features:
            return (distances / (2 * LENGTH**2)).astype(np.float32)
        return (np.sqrt(distances / self._plan.target.num_values) / 255).astype(np.float32)


def _by_source(doubtful_S: npt.NDArray[np.void]) -> Iterator[tuple[int | None, npt.NDArray[np.int64]]]:
    """Say which of them are of which part, None for training images."""
    is_train_S = doubtful_S["split"] == 0
    if is_train_S.any():
        yield None, np.flatnonzero(is_train_S)
    for part in np.unique(doubtful_S["part"][~is_train_S]).tolist():
        yield part, np.flatnonzero(~is_train_S & (doubtful_S["part"] == part))
