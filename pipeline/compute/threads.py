"""Threads that share tasks, each torch operation on one of them.

Input: a function and its tasks. Output: nothing; the function writes. Invariant: every task is done by one thread with
the same operations, so that the number of threads changes no bit of what tasks write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


class Threads:
    """Some threads, the caller's among them.

    Args:
        number: How many; with one, the caller does everything.
    """

    def __init__(self, number: int = 1) -> None:
        self.number = number
        # Started when they are needed. The number of threads inside torch is a thread's own.
        self._pool = ThreadPoolExecutor(max(1, number - 1), initializer=partial(torch.set_num_threads, 1))

    def run(self, function: Callable[[T], object], tasks: Sequence[T]) -> None:
        """Call a function with every task; the first thread that is free takes the next one.

        Raises:
            Exception: What a call raised, when no other call is under way any more.
        """
        num_helpers = min(self.number, len(tasks)) - 1
        if num_helpers < 1:
            for task in tasks:
                function(task)
            return
        left = iter(tasks)
        work = partial(_work, function, left, is_inference=torch.is_inference_mode_enabled())
        helping = [self._pool.submit(work) for _ in range(num_helpers)]
        try:
            work()
        finally:
            wait(helping)
        for helper in helping:
            helper.result()


def _work(function: Callable[[T], object], tasks: Iterable[T], *, is_inference: bool) -> None:
    with torch.inference_mode(is_inference):  # which is a thread's own
        for task in tasks:
            function(task)
