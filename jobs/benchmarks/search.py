"""The search for the nearest training images by itself, and the libraries that it is compared with.

Run from `jobs/` as `python -m benchmarks.search NAME REQUEST`.

Input: the name of a search and a `Search` as JSON, on the command line. Output: an `Answer` as JSON, the last line on
standard output. Invariant: `phase_s` covers the search alone, without loading and without an index of its own that a
library has made before; all searches are exact, and their votes are compared.

Axes: N images, J neighbors, D values of one image.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.request import Answer, serve

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BLOCK_ROWS = 16384


@dataclass(frozen=True)
class Search:
    """The work for a search.

    Attributes:
        arrays: Folder of `train_images.npy` (uint8 [N, D]), `train_labels.npy` (int64 [N]) and the same of `valid`.
        num_neighbors: J.
        num_threads: Of the libraries.
    """

    arrays: str
    num_neighbors: int = 5
    num_threads: int = 2

    def load(self, name: str) -> npt.NDArray[Any]:
        """Read one of the arrays."""
        import numpy as np

        array: npt.NDArray[Any] = np.load(Path(self.arrays, f"{name}.npy"))
        return array


def _search(task: Search, num_actors: int, num_threads: int) -> Answer:
    """Search as actors do that share the training images: processes with so many threads each."""
    import numpy as np
    import torch

    from pipeline.compute.neighbors import merge
    from pipeline.compute.search import search
    from pipeline.compute.strips import TrainBlock
    from pipeline.compute.threads import Threads

    torch.set_num_threads(1)
    images_ND = torch.from_numpy(task.load("valid_images"))
    others_ND, labels_N = torch.from_numpy(task.load("train_images")), torch.from_numpy(task.load("train_labels"))
    rows_N = torch.arange(len(labels_N))

    def act(rank: int, driver: Connection) -> None:
        own = slice(len(rows_N) * rank // num_actors, len(rows_N) * (rank + 1) // num_actors)
        num_blocks = -(-(own.stop - own.start) // _BLOCK_ROWS)
        # As an actor's lanes give them: every n-th image.
        parts = (
            [each[own][first::num_blocks] for each in (others_ND, rows_N, labels_N)] for first in range(num_blocks)
        )
        blocks = (TrainBlock(*part) for part in parts)
        search(images_ND[:1], [TrainBlock(others_ND[:8], rows_N[:8], labels_N[:8])], 1)  # chooses how to multiply
        driver.send("ready")
        driver.recv()
        driver.send(search(images_ND, blocks, task.num_neighbors, Threads(num_threads)))

    forks = multiprocessing.get_context("fork")  # which share what was loaded
    pipes = [forks.Pipe() for _ in range(num_actors)]
    actors = [forks.Process(target=act, args=(rank, end), daemon=True) for rank, (_, end) in enumerate(pipes)]
    for actor in actors:
        actor.start()
    for pipe, _ in pipes:
        pipe.recv()
    started = time.perf_counter()
    for pipe, _ in pipes:
        pipe.send("go")
    found = merge([pipe.recv() for pipe, _ in pipes], task.num_neighbors)
    seconds = time.perf_counter() - started
    for actor in actors:
        actor.join()
    return _answer(task, np.asarray(found.labels_NJ), seconds)


def _faiss(task: Search, *, picks_kernels: bool) -> Answer:
    """Search by faiss's exact index of squared distances, in float32.

    Its OpenBLAS is of 2021: where it does not know the processor, it takes kernels of 2004, unless others are named.
    """
    import torch

    kernels = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if picks_kernels and kernels:
        os.environ["OPENBLAS_CORETYPE"] = kernels

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
    "search": partial(_search, num_actors=1, num_threads=2),
    "search_one_thread": partial(_search, num_actors=1, num_threads=1),
    "search_two_halves": partial(_search, num_actors=2, num_threads=1),
    "faiss_flat": partial(_faiss, picks_kernels=True),
    "faiss_as_installed": partial(_faiss, picks_kernels=False),
    "sklearn_brute": sklearn_brute,
}


if __name__ == "__main__":
    serve(SEARCHES, Search)
