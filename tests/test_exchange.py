"""Exchanges between threads, each with sockets of its own, as between processes."""

import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from pipeline.compute import exchange
from pipeline.compute.exchange import TOKEN_BYTES, Exchange

HOST = "127.0.0.1"
TOKEN = bytes(range(TOKEN_BYTES))


@pytest.fixture
def meet():
    """A function that connects so many with each other; they are closed afterwards."""
    met = []

    def connect(number, host=HOST):
        new = [Exchange(host) for _ in range(number)]
        met.extend(new)
        addresses = [each.address for each in new]
        at_once(lambda rank: new[rank].connect(rank, addresses, TOKEN), number)
        return new

    yield connect
    for each in met:
        each.close()


def at_once(function, number):
    """Call a function with every rank at the same time; return the answers in the ranks' order."""
    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(function, range(number)))


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("num_values", [1, 7850, 1_000_000])  # the last is more than sockets hold
def test_everyone_has_all_in_the_ranks_order(meet, number, num_values):
    group = meet(number)
    mine = np.random.default_rng(0).random((number, 2, num_values)).astype(np.float32)
    for everyones in at_once(lambda rank: group[rank].gather(mine[rank]), number):
        assert everyones.dtype == np.float32
        assert np.array_equal(everyones, mine)


def test_one_exchange_does_not_run_into_the_next(meet):
    group = meet(3)

    def exchange_often(rank):
        rng = np.random.default_rng(rank)
        seen = []
        for number in range(200):
            time.sleep(rng.random() / 1000)
            seen.append(group[rank].gather(np.full(1 + number % 7, 1000 * rank + number)))
        return seen

    for seen in at_once(exchange_often, 3):
        for number, everyones in enumerate(seen):
            assert everyones.tolist() == [[1000 * rank + number] * (1 + number % 7) for rank in range(3)]


def test_rows_with_gaps_between_them_arrive_without(meet):
    group = meet(2)
    wide = np.arange(2 * 3 * 10, dtype=np.float32).reshape(2, 3, 10)
    for everyones in at_once(lambda rank: group[rank].gather(wide[rank, :, :7]), 2):
        assert np.array_equal(everyones, wide[:, :, :7])


@pytest.mark.parametrize("shape", [(), (5,), (10, 784)])
@pytest.mark.parametrize("piece_bytes", [8, 1000, 2**24])
def test_sums_are_those_of_python(meet, monkeypatch, shape, piece_bytes):
    monkeypatch.setattr(exchange, "_PIECE_BYTES", piece_bytes if shape != (10, 784) else max(piece_bytes, 1000))
    group = meet(3)
    counts = np.random.default_rng(0).integers(0, 2**61, (3, *shape), dtype=np.int64)
    expected = [sum(column) for column in zip(*(each.ravel().tolist() for each in counts), strict=True)]
    for total in at_once(lambda rank: group[rank].add_up(counts[rank]), 3):
        assert total.shape == shape
        assert total.ravel().tolist() == expected


def test_it_listens_on_its_own_address_alone_and_only_until_all_are_there(meet):
    alone = Exchange(HOST)
    listening = [open_.laddr for open_ in psutil.Process().net_connections() if open_.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == alone.address[1]] == [HOST]
    alone.close()
    first, second = Exchange(HOST), Exchange(HOST)
    addresses = [first.address, second.address]
    at_once(lambda rank: (first, second)[rank].connect(rank, addresses, TOKEN), 2)
    for address in addresses:
        with pytest.raises(ConnectionRefusedError, match="refused"):
            socket.create_connection(address, 5)
    first.close()
    second.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(TOKEN_BYTES) + b"\1\0\0\0", TOKEN[:5]])
def test_a_caller_without_the_token_is_disconnected(said):
    first, second = Exchange(HOST), Exchange(HOST)
    addresses = [first.address, second.address]
    outsider = socket.create_connection(first.address, 5)
    outsider.sendall(said)
    outsider.shutdown(socket.SHUT_WR)
    at_once(lambda rank: (first, second)[rank].connect(rank, addresses, TOKEN), 2)
    answers = at_once(lambda rank: (first, second)[rank].gather(np.array([rank])), 2)
    assert [answer.tolist() for answer in answers] == [[[0], [1]]] * 2
    assert select.select([outsider], [], [], 5)[0]
    for each in (outsider, first, second):
        each.close()


def test_a_silent_caller_delays_nobody_for_long(monkeypatch):
    monkeypatch.setattr(exchange, "_HELLO_SECONDS", 0.2)
    monkeypatch.setattr(exchange, "TIMEOUT_SECONDS", 30)
    first, second = Exchange(HOST), Exchange(HOST)
    addresses = [first.address, second.address]
    outsiders = [socket.create_connection(first.address, 5) for _ in range(20)]
    at_once(lambda rank: (first, second)[rank].connect(rank, addresses, TOKEN), 2)
    for each in (*outsiders, first, second):
        each.close()


@pytest.mark.parametrize("rank", [0, 1, 7, 2**32 - 1])
def test_a_caller_of_an_impossible_rank_is_disconnected(rank):
    group = [Exchange(HOST) for _ in range(3)]
    addresses = [each.address for each in group]
    outsider = socket.create_connection(group[1].address, 5)
    outsider.sendall(TOKEN + rank.to_bytes(4, "little"))
    at_once(lambda rank: group[rank].connect(rank, addresses, TOKEN), 3)
    answers = at_once(lambda rank: group[rank].gather(np.array([rank])), 3)
    assert [answer.ravel().tolist() for answer in answers] == [[0, 1, 2]] * 3
    for each in (outsider, *group):
        each.close()


@pytest.mark.parametrize("num_values", [1, 1_000_000])
def test_a_peer_that_disconnects_is_an_error_at_once(meet, num_values):
    first, second = meet(2)
    second.close()
    began = time.monotonic()
    with pytest.raises(OSError, match=r"closed|reset|[Bb]roken"):
        first.gather(np.zeros(num_values))
    assert time.monotonic() - began < 10


def test_a_silent_peer_is_an_error_in_time(meet, monkeypatch):
    first, _ = meet(2)
    monkeypatch.setattr(exchange, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match=r"for 0\.2 s$"):
        first.gather(np.zeros(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_peers_that_do_not_come_are_an_error_in_time(monkeypatch, rank):
    monkeypatch.setattr(exchange, "TIMEOUT_SECONDS", 0.5)
    one = Exchange(HOST)
    addresses = [one.address, (HOST, 1)] if rank == 0 else [(HOST, 1), one.address]
    with pytest.raises(OSError, match=r"timed out|refused|not all"):
        one.connect(rank, addresses, TOKEN)
    one.close()


def test_addresses_may_be_of_ip_version_6(meet):
    group = meet(2, "::1")
    answers = at_once(lambda rank: group[rank].gather(np.array([rank])), 2)
    assert [answer.tolist() for answer in answers] == [[[0], [1]]] * 2
