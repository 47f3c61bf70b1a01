"""The search for the nearest training images by itself, and the libraries that it is compared with.

Run from `jobs/` as `python -m benchmarks.search NAME REQUEST`.

Input: the name of a search and a `Search` as JSON, on the command line. Output: an `Answer` as JSON, the last line on
standard output. Invariant: `phase_s` covers the search alone, without loading and without an index of its own that a
library has made before; all searches are exact, and their votes are compared.

Axes: N images, J neighbors, D values of one image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.request import Answer, serve

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.compute.neighbors import Neighbors

_BLOCK_ROWS = 16384


@dataclass(frozen=True)
class Search:
    """The work for a search.

    Attributes:
        arrays: Folder of `train_images.npy` (uint8 [N, D]), `train_labels.npy` (int64 [N]) and the same of `valid`.
        num_neighbors: J.
        num_threads: Threads that share it.
    """

    arrays: str
    num_neighbors: int = 5
    num_threads: int = 2

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read one of the arrays."""
        import numpy as np

        array: npt.NDArray[Any] = np.load(Path(self.arrays, f"{name}.npy"))
        return array


def search_blocks(task: Search) -> Answer:
    """Search as an actor does."""
    return _search(task, 1)


def search_two_halves(task: Search) -> Answer:
    """Search as two actors do, with a thread each, of which each has half of the training images."""
    return _search(task, 2)


def _search(task: Search, num_actors: int) -> Answer:
    import numpy as np
    import torch

    from pipeline.compute.neighbors import merge, search
    from pipeline.compute.strips import TrainBlock
    from pipeline.compute.threads import Threads

    torch.set_num_threads(1)
    images_ND = torch.from_numpy(task.load("valid_images"))
    others_ND, labels_N = torch.from_numpy(task.load("train_images")), torch.from_numpy(task.load("train_labels"))
    rows_N = torch.arange(len(labels_N))

    def search_share(rank: int) -> Neighbors:
        own = slice(len(rows_N) * rank // num_actors, len(rows_N) * (rank + 1) // num_actors)
        num_blocks = -(-(own.stop - own.start) // _BLOCK_ROWS)
        # As an actor's lanes give them: every n-th image.
        parts = (
            [each[own][first::num_blocks] for each in (others_ND, rows_N, labels_N)] for first in range(num_blocks)
        )
        threads = Threads(task.num_threads // num_actors)
        return search(images_ND, (TrainBlock(*part) for part in parts), task.num_neighbors, threads)

    search(images_ND[:1], [TrainBlock(others_ND[:8], rows_N[:8], labels_N[:8])], 1)  # which chooses how to multiply
    started = time.perf_counter()
    with ThreadPoolExecutor(num_actors, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = merge(list(pool.map(search_share, range(num_actors))), task.num_neighbors)
    return _answer(task, np.asarray(found.labels_NJ), time.perf_counter() - started)


def faiss_flat(task: Search) -> Answer:
    """Search by faiss's exact index of squared distances, in float32."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(task.num_threads)
    index = faiss.IndexFlatL2(task.load("train_images").shape[1])
    index.add(task.load("train_images").astype(np.float32))
    images_ND = task.load("valid_images").astype(np.float32)
    started = time.perf_counter()
    _, rows_NJ = index.search(images_ND, task.num_neighbors)
    seconds = time.perf_counter() - started
    return _answer(task, task.load("train_labels")[rows_NJ], seconds)


def sklearn_brute(task: Search) -> Answer:
    """Search by scikit-learn's brute force, in float32."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    index = NearestNeighbors(n_neighbors=task.num_neighbors, algorithm="brute")
    index.fit(task.load("train_images").astype(np.float32))
    images_ND = task.load("valid_images").astype(np.float32)
    started = time.perf_counter()
    with threadpool_limits(task.num_threads):
        rows_NJ = index.kneighbors(images_ND, return_distance=False)
    seconds = time.perf_counter() - started
    return _answer(task, task.load("train_labels")[rows_NJ], seconds)


def _answer(task: Search, found_labels_NJ: npt.NDArray[np.int64], seconds: float) -> Answer:
    import numpy as np

    labels_N = task.load("valid_labels")
    num_classes = int(labels_N.max()) + 1
    votes_NK = np.stack([(found_labels_NJ == label).sum(1) for label in range(num_classes)], 1)
    num_correct = int((votes_NK.argmax(1) == labels_N).sum())
    num_images = len(labels_N) + len(task.load("train_labels"))
    return Answer(num_images, num_correct, len(labels_N), phase_s=seconds, num_units=len(labels_N))


SEARCHES: dict[str, Callable[[Search], Answer]] = {
    "search": search_blocks,
    "search_2": search_two_halves,
    "faiss_flat": faiss_flat,
    "sklearn_brute": sklearn_brute,
}


if __name__ == "__main__":
    serve(SEARCHES, Search)
