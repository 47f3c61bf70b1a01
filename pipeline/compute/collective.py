"""What the actors of a job exchange while they compute: exact sums, and pieces of gradients and parameters.

Input: a tensor of every actor, all of one shape, or pieces for each other one. Output: at every actor, the same sum, or
the pieces that it was given.
Invariant: an actor that is gone, or silent for too long, is an `ActorLostError` at all others.

Actors with a GPU of their own exchange gradients by NCCL; all else goes by TCP. NCCL takes no two ranks on one GPU.

Axes: A actors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist

from pipeline.compute.exchange import TIMEOUT_SECONDS, Address, Exchange
from pipeline.errors import ActorLostError, counted

T = TypeVar("T")
# Tensors by the rank of another actor.
Pieces: TypeAlias = dict[int, list[torch.Tensor]]


class Collective:
    """One actor's part in what all compute together; alone, it answers at once.

    Args:
        rank: This actor's number, from 0.
        num_actors: A.
    """

    def __init__(self, rank: int, num_actors: int) -> None:
        self.rank = rank
        self.num_actors = num_actors
        self._exchange: Exchange | None = None
        self._has_nccl = False

    def listen(self, host: str) -> Address:
        """Accept connections of the others on `host`, this actor's own address; return where they reach it."""
        self._exchange = Exchange(host)
        return self._exchange.address

    def join(self, token: bytes, addresses: Sequence[Address], *, has_own_gpu: bool) -> None:
        """Connect with all other actors.

        Args:
            token: What only they know.
            addresses: What `listen` returned to all of them, by rank.
            has_own_gpu: Whether this actor, as every other, has a whole GPU.

        Raises:
            ActorLostError: If not all of them connect in time.
        """
        assert self._exchange is not None
        try:
            self._exchange.connect(self.rank, addresses, token)
            if has_own_gpu:
                self._join_nccl(self._exchange, addresses)
        except (OSError, RuntimeError) as exc:
            where = f"actor {self.rank}"
            raise ActorLostError(
                f"{where}: expected {counted(self.num_actors, 'actor')} to connect, got {exc}"
            ) from exc

    def add_up(self, counts: torch.Tensor) -> torch.Tensor:
        """Add up whole numbers, int64 of any shape, over all actors.

        Raises:
            ActorLostError: If another actor is gone.
        """
        if self._exchange is None:
            return counts
        exchange = self._exchange
        total = self._call(lambda: exchange.add_up(counts.cpu().numpy()))
        return torch.from_numpy(total).to(counts.device)

    def gather(self, mine: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the arrays of all actors, of one shape, in the actors' order: [...] -> [A, ...].

        Raises:
            ActorLostError: If another actor is gone.
        """
        if self._exchange is None:
            return mine[None]
        exchange = self._exchange
        return self._call(lambda: exchange.gather(mine))

    def swap(self, sent: Pieces, received: Pieces) -> None:
        """Give every other actor some tensors and take as many values from it, in the order of both sides' lists.

        Args:
            sent: By rank, tensors each in one piece of memory.
            received: By rank, likewise; overwritten.

        Raises:
            ActorLostError: If another actor is gone.
        """
        exchange = self._exchange
        assert exchange is not None
        if self._has_nccl:
            operations = [
                dist.P2POp(operation, tensor, rank)
                for operation, pieces in ((dist.isend, sent), (dist.irecv, received))
                for rank, tensors in pieces.items()
                for tensor in tensors
                if tensor.numel()
            ]
            self._call(lambda: [work.wait() for work in dist.batch_isend_irecv(operations)] if operations else [])
            return
        # Where they are on a GPU, `cpu` copies; else it is the tensor itself.
        given = {rank: [tensor.cpu() for tensor in tensors] for rank, tensors in sent.items()}
        taken = {
            rank: [tensor if tensor.device.type == "cpu" else torch.empty(tensor.shape) for tensor in tensors]
            for rank, tensors in received.items()
        }
        self._call(lambda: exchange.swap(_buffers(given), _buffers(taken)))
        for rank, tensors in received.items():
            for tensor, buffer in zip(tensors, taken[rank], strict=True):
                if buffer is not tensor:
                    tensor.copy_(buffer)

    @property
    def num_bytes_sent(self) -> int:
        """Bytes that have left this actor by TCP."""
        return self._exchange.num_bytes_sent if self._exchange else 0

    def close(self) -> None:
        """Close all connections."""
        if self._exchange is not None:
            self._exchange.close()

    def _join_nccl(self, exchange: Exchange, addresses: Sequence[Address]) -> None:
        """Form the process group by which GPUs exchange; the first actor keeps its store."""
        host = addresses[0][0]
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        port = 0
        if self.rank == 0:
            # By default the store would listen on every address of the machine.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family, backlog=1024)
            port = int(listener.getsockname()[1])
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
            )
        port = int(exchange.gather(np.array([port]))[0, 0])
        if self.rank > 0:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        # By default NCCL takes the interface that the host's name leads to, which may be another or a public one.
        if interface := _interface_of(addresses[self.rank][0]):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        dist.init_process_group("nccl", store=self._store, rank=self.rank, world_size=self.num_actors, timeout=timeout)
        self._has_nccl = True

    def _call(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except (OSError, RuntimeError) as exc:
            raise ActorLostError(f"actor {self.rank}: expected the other actors to answer, got {exc}") from exc


def _buffers(pieces: Pieces) -> dict[int, list[memoryview]]:
    return {
        rank: [tensor.numpy().data.cast("B") for tensor in tensors if tensor.numel()]
        for rank, tensors in pieces.items()
    }


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return str(name)
    return None
