"""Reading ahead: answers in order, bounded by number and bytes, whatever comes first."""

import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.data import ahead
from pipeline.data.ahead import read_ahead, read_many


class Reads:
    """Reads of given sizes that note how many, and how many bytes, were admitted and not yet used."""

    def __init__(self, sizes, seconds=0.0):
        self.sizes, self.seconds = sizes, seconds
        self.lock = threading.Lock()
        self.num_bytes = self.most_bytes = self.num_running = self.most_running = self.num_begun = 0

    def rows(self):
        return range(len(self.sizes))

    def read(self, row, admit):
        with self.lock:
            self.num_begun += 1
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        admit(self.sizes[row])
        with self.lock:
            self.num_bytes += self.sizes[row]
            self.most_bytes = max(self.most_bytes, self.num_bytes)
        time.sleep(self.seconds * random.random())
        with self.lock:
            self.num_running -= 1
        if row % 7 == 3:
            raise FileNotFoundError(str(row))
        return row

    def use(self, row):
        with self.lock:
            self.num_bytes -= self.sizes[row]


def rows_of(answers):
    return [int(str(answer)) for answer in answers]


@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_answers_and_errors_come_in_the_order_of_the_reads(concurrency):
    reads = Reads([1] * 200, seconds=0.003)
    answers = list(read_ahead(reads.read, reads.rows(), concurrency))
    assert rows_of(answers) == list(range(200))
    assert [row for row, each in enumerate(answers) if isinstance(each, OSError)] == list(range(3, 200, 7))
    assert reads.most_running <= concurrency


def test_no_more_bytes_are_on_their_way_than_there_is_room_for():
    chance = random.Random(0)
    reads = Reads([chance.randrange(1, 100) for _ in range(300)] + [500, 5, 5, 2000, 1], seconds=0.002)
    for row, answer in enumerate(read_ahead(reads.read, reads.rows(), 16, max_bytes=400)):
        assert rows_of([answer]) == [row]
        time.sleep(0.001 * chance.random())
        reads.use(row)
    # What is being used is counted until the next is asked for; one whose turn it is may be larger than all the room.
    assert 300 < reads.most_bytes <= 400 + 2000


def test_reads_go_on_while_the_consumer_is_busy():
    reads = Reads([1] * 60)
    answers = read_ahead(reads.read, reads.rows(), 4)
    for turn in range(50):
        next(answers)
        deadline = time.monotonic() + 30
        while reads.num_begun < turn + 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert reads.num_begun == turn + 8


def test_a_consumer_that_stops_leaves_no_thread_behind():
    before = set(threading.enumerate())
    reads = Reads([300] * 1000)
    answers = read_ahead(reads.read, reads.rows(), 8, max_bytes=1000)
    assert next(answers) == 0
    answers.close()
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
    assert reads.num_begun <= 16


def test_a_read_that_nobody_asks_for_is_not_begun_and_waits_for_no_room():
    begun, ended = threading.Semaphore(0), threading.Event()
    errors = []

    def read(item, admit):
        if item == 0:
            admit(100)
            return item
        begun.release()
        assert ended.wait(30)
        try:
            admit(100)
        except OSError as exc:
            errors.append(exc)
            raise
        return item

    answers = read_ahead(read, range(50), 2, max_bytes=100)
    assert next(answers) == 0
    for _ in range(2):  # as many as there are threads
        assert begun.acquire(timeout=30)
    answers.close()
    ended.set()
    deadline = time.monotonic() + 30
    while len(errors) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [str(error) for error in errors] == ["nobody asks for it"] * 2


def test_a_thread_that_has_nothing_to_read_holds_nothing():
    class Owner:
        def read(self, item, admit):
            admit(1)
            return bytearray(item)

    owner = Owner()
    is_gone = weakref.ref(owner)
    assert len(list(read_ahead(owner.read, range(9), 3))) == 9
    del owner
    deadline = time.monotonic() + 30
    while is_gone() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert is_gone() is None


def test_what_waits_for_room_that_nobody_will_make_is_an_error():
    room = ahead._Room(10)
    room.take(0, 10)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(room.take, 1, 10)
        deadline = time.monotonic() + 30
        while not room._waiting and time.monotonic() < deadline:
            time.sleep(0.001)
        room.close()
        with pytest.raises(OSError, match="nobody asks for it"):
            waiting.result(30)


def test_a_reader_that_is_garbage_while_it_makes_room_stops_nothing(monkeypatch):
    room = ahead._Room(10)
    room.take(0, 10)

    class Event(threading.Event):
        def __init__(self):
            super().__init__()
            room.close()  # as the collector would, where memory is taken

    monkeypatch.setattr(ahead.threading, "Event", Event)
    with pytest.raises(OSError, match="nobody asks for it"):
        room.take(1, 10)


def test_threads_are_used_again_and_never_by_two_at_a_time():
    def names(number):
        return read_ahead(lambda item, admit: (admit(1), threading.current_thread().name)[1], range(number), 3)

    earlier = set(names(50))
    one, other = (set(column) for column in zip(*zip(names(50), names(50), strict=True), strict=True))
    assert earlier & one
    assert not one & other


def test_a_consumer_that_takes_just_what_there_is_leaves_its_threads_to_the_next():
    def name(item, admit):
        admit(1)
        return threading.current_thread().name

    def take_all():
        answers = read_ahead(name, range(20), 1)
        return {next(answers) for _ in range(20)}

    assert take_all() & take_all()


def test_reads_on_their_way_become_more_when_the_consumer_waits_and_stay_so():
    begun = 0
    behind = threading.Semaphore(0)

    def read(item, admit):
        nonlocal begun
        admit(1)
        if item < ahead._FIRST_REACH:
            return item
        with lock:
            begun += 1
        assert behind.acquire(timeout=30)
        return item

    lock = threading.Lock()
    answers = read_ahead(read, range(200), 100)
    assert [next(answers) for _ in range(ahead._FIRST_REACH)] == list(range(ahead._FIRST_REACH))
    consumer = threading.Thread(target=lambda: list(answers))
    consumer.start()
    deadline = time.monotonic() + 30
    while begun < 64 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert begun == 64
    for _ in range(200):
        behind.release()
    consumer.join()
    assert [readers.reach > ahead._FIRST_REACH for readers in ahead._IDLE_READERS[100]] == [True]


@pytest.mark.parametrize("error", [ZeroDivisionError, GeneratorExit])
def test_what_is_no_os_error_ends_the_reads(error):
    def fail(item, admit):
        raise error

    with pytest.raises(error):
        list(read_ahead(fail, range(5), 2))


@pytest.mark.parametrize("num_reads", [0, 1, 15, 16, 17, 255, 256, 257, 600])
@pytest.mark.parametrize("is_local", [True, False])
def test_every_read_is_done_once(num_reads, is_local):
    reads = Reads([1] * num_reads)
    assert rows_of(read_many(reads.read, reads.rows(), 4, is_local=is_local)) == list(range(num_reads))
    assert reads.num_begun == num_reads


def test_a_disk_that_answers_at_once_is_read_by_one_thread():
    reads = Reads([1] * 600)
    list(read_many(reads.read, reads.rows(), 8, is_local=True))
    assert reads.most_running == 1


def test_a_disk_that_is_far_is_read_ahead():
    reads = Reads([1] * 100, seconds=0.02)
    assert rows_of(read_many(reads.read, reads.rows(), 8, is_local=True)) == list(range(100))
    assert reads.most_running == 8
    assert ahead._TIMED_READS < 100
