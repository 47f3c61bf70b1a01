"""Reading ahead: many reads at a time, their answers in order, in bounded memory.

Input: a way to read, and what is to be read. Output: what was read, in the order of the items. Invariant: how many
answer before their turn is bounded by number and by bytes, and what answers first changes nothing.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
# Told how many bytes are to be read, before they are; returns when there is room for them.
Admit = Callable[[int], None]
# Requests at a time in one process. Of 30 ms, 64 make 1,900 small reads a second and 128 make 2,800, of 100 ms 620 and
# 1,200, of 5 ms 3,000 either way; each costs 0.2 ms of CPU, whatever their number.
DEFAULT_CONCURRENCY = 128
# Of what is being read or waits for its turn. An object of 10 MB, from a store that sends 100 MB/s on a connection, is
# on its way for 0.1 s; three of them at once are faster than a core decodes. In memory it is up to three times as much,
# as the client joins what came in parts.
MAX_BYTES_AHEAD = 32 * 2**20
# Reads that are begun at first, and how many times as many when the consumer has to wait. Those that are on their way
# without need cost CPU: with 128 a photograph takes 0.1 ms more.
_FIRST_REACH, _GROWTH = 16, 4
# A disk is read by the decoding thread itself, unless reads wait for so long, as on a network file system: of every
# block of reads the first ones tell.
_SLOW_READ_SECONDS = 0.0005
_BLOCK_READS, _TIMED_READS = 256, 16


def read_many(
    read: Callable[[Item, Admit], Answer], items: Iterable[Item], concurrency: int, *, is_local: bool
) -> Iterator[Answer | OSError]:
    """Read items and yield what was read, in their order; ahead, unless from a disk that answers at once.

    Args:
        read: Called with each item, and as `read_ahead` says.
        items: What is to be read.
        concurrency: Reads at a time.
        is_local: Whether from a disk of this machine.

    Yields:
        What a read returned, or the `OSError` that it raised.
    """
    upcoming = iter(items)
    while is_local:
        waited_s = 0.0
        for item in itertools.islice(upcoming, _TIMED_READS):
            begun_s, begun_cpu_s = time.perf_counter(), time.thread_time()
            answer = _try(read, item, _admit)
            # Not the copying, for which another thread would need as long, but the waiting.
            waited_s += time.perf_counter() - begun_s - (time.thread_time() - begun_cpu_s)
            yield answer
        if waited_s > _TIMED_READS * _SLOW_READ_SECONDS:
            break
        num_read = 0
        for item in itertools.islice(upcoming, _BLOCK_READS - _TIMED_READS):
            num_read += 1
            # As in `_try`: a call less for each of a million files is a tenth of a second.
            try:
                answer = read(item, _admit)
            except OSError as exc:
                answer = exc
            yield answer
        if num_read < _BLOCK_READS - _TIMED_READS:
            return
    yield from read_ahead(read, upcoming, concurrency)


def read_ahead(
    read: Callable[[Item, Admit], Answer], items: Iterable[Item], concurrency: int, max_bytes: int = MAX_BYTES_AHEAD
) -> Iterator[Answer | OSError]:
    """Read items on threads and yield what was read, in their order.

    Args:
        read: Called with an item, and with a function that it calls, once, with the number of its bytes before they are
            read.
        items: What is to be read.
        concurrency: Reads at a time, at most; twice as many are begun or wait for their turn.
        max_bytes: Of these. A read of more bytes than that is admitted when its turn has come.

    Yields:
        What a read returned, or the `OSError` that it raised.
    """
    room = _Room(max_bytes)
    upcoming = enumerate(items)
    answers: SimpleQueue[tuple[int, Answer | OSError | _Failure]] = SimpleQueue()
    early: dict[int, Answer | OSError | _Failure] = {}
    idle = _IDLE_READERS[concurrency]
    readers = idle.pop() if idle else _Readers(concurrency)

    def collect() -> None:
        number, answer = answers.get()
        early[number] = answer

    turn = num_begun = 0
    grown_until = readers.reach
    try:
        while True:
            while not answers.empty():
                collect()
            if turn >= grown_until and turn not in early:
                # It was begun when as many before it were used up since: they were too few.
                readers.reach *= _GROWTH
                grown_until = turn + readers.reach
            stop = turn + min(readers.reach, 2 * concurrency)
            while num_begun < stop and (found := next(upcoming, None)) is not None:
                number, item = found
                num_begun += 1
                readers.begin(_Task(number, read, item, partial(room.take, number), answers), num_begun - turn)
            if turn == num_begun:
                return
            room.reach(turn)
            while turn not in early:
                collect()
            turn += 1  # before the last answer is taken, after which a consumer may not ask again
            yield _said(early.pop(turn - 1))
            room.free(turn - 1)
    finally:
        if turn < num_begun:  # the consumer has stopped, and what is on its way keeps these threads
            readers.end()
            room.close()
        else:
            idle.append(readers)


@dataclass(frozen=True)
class _Failure:
    """What a read raised that is no `OSError`."""

    exc: BaseException


@dataclass(slots=True)
class _Task(Generic[Item, Answer]):
    """A read, and where its answer goes."""

    number: int
    read: Callable[[Item, Admit], Answer]
    item: Item
    admit: Admit
    answers: SimpleQueue[tuple[int, Answer | OSError | _Failure]]

    def do(self) -> None:
        """Read, and answer, whatever happens."""
        answer: Answer | OSError | _Failure
        try:
            answer = _try(self.read, self.item, self.admit)
        except BaseException as exc:  # noqa: BLE001 - raised again where the answer is asked for
            # A panic of the client's Rust is no `Exception`, and who asks would wait for it for ever.
            answer = _Failure(exc)
        self.answers.put((self.number, answer))


class _Readers:
    """Threads that do tasks, started when there are more tasks than threads.

    Attributes:
        reach: From how many on the next one is not begun yet: what the reads before have shown to be enough.

    An executor of the standard library, which makes a future with locks of each task, takes twice as long.
    """

    def __init__(self, most: int) -> None:
        self.reach = _FIRST_REACH
        self._most = most
        self._number = 0
        self._tasks: SimpleQueue[_Task[Any, Any] | None] = SimpleQueue()

    def begin(self, task: _Task[Any, Any], num_begun: int) -> None:
        """Have a task done that is one of so many."""
        if self._number < min(self._most, num_begun):
            self._number += 1
            threading.Thread(target=self._work, daemon=True).start()
        self._tasks.put(task)

    def end(self) -> None:
        """Forget the tasks that nobody has begun, and end the threads when they have done theirs."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in range(self._number):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.do()
            del task  # and all that it holds, while there is none


# Threads that have nothing to read, by their number: a shard of photographs takes as long to start its own as to read
# twenty of them.
_IDLE_READERS: defaultdict[int, list[_Readers]] = defaultdict(list)


def _said(answer: Answer | OSError | _Failure) -> Answer | OSError:
    if isinstance(answer, _Failure):
        raise answer.exc
    return answer


def _try(read: Callable[[Item, Admit], Answer], item: Item, admit: Admit) -> Answer | OSError:
    try:
        return read(item, admit)
    except OSError as exc:
        return exc


def _admit(_: int) -> None:
    """Admit a read at once: there is no other beside it."""


# The turn after all others.
_NOBODY = 2**63


class _Room:
    """Bytes that reads may have together, whoever's turn it is excepted; those that wait go on in their order."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._taken: dict[int, int] = {}
        self._num_bytes = 0
        self._turn = 0
        self._waiting: list[tuple[int, int, threading.Event]] = []  # a heap, by turn
        # Nothing is made while it is held: that can have a generator closed which is garbage, and which takes it too.
        self._lock = threading.Lock()

    def take(self, turn: int, num_bytes: int) -> None:
        """Wait until there is room for the bytes of a read, or it is its turn.

        Raises:
            OSError: If nobody will ask for what is read.
        """
        with self._lock:
            if self._fits(turn, num_bytes):
                return
        waiting = turn, num_bytes, threading.Event()
        with self._lock:
            if self._fits(turn, num_bytes):
                return
            heapq.heappush(self._waiting, waiting)
        waiting[2].wait()
        self._check()

    def reach(self, turn: int) -> None:
        """Say whose turn it is."""
        with self._lock:
            self._turn = turn
            self._admit_waiting()

    def free(self, turn: int) -> None:
        """Say that a read's bytes are used; it may have been one that took none."""
        with self._lock:
            self._num_bytes -= self._taken.pop(turn, 0)
            self._admit_waiting()

    def close(self) -> None:
        """Let nobody wait: nobody will ask for what is read."""
        self.reach(_NOBODY)

    def _fits(self, turn: int, num_bytes: int) -> bool:
        self._check()
        if turn > self._turn and (self._waiting or self._num_bytes + num_bytes > self._max_bytes):
            return False
        self._admit(turn, num_bytes)
        return True

    def _check(self) -> None:
        if self._turn == _NOBODY:
            raise OSError("nobody asks for it")

    def _admit(self, turn: int, num_bytes: int) -> None:
        self._taken[turn] = num_bytes
        self._num_bytes += num_bytes

    def _admit_waiting(self) -> None:
        while self._waiting:
            turn, num_bytes, admitted = self._waiting[0]
            if turn > self._turn and self._num_bytes + num_bytes > self._max_bytes:
                return
            heapq.heappop(self._waiting)
            self._admit(turn, num_bytes)
            admitted.set()
