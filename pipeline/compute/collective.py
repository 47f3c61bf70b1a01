"""What the actors of a job compute together: exact sums, and the gradients of all lanes.

Input: a tensor of every actor, all of one shape. Output: at every actor, the same sum, or all lanes in their order.
Invariant: an actor that is gone, or silent for too long, is an `ActorLostError` at all others.

Actors with a GPU of their own exchange gradients by NCCL; all else goes by TCP. NCCL takes no two ranks on one GPU.

Axes: A actors, Z lanes of one actor, L all lanes, P parameters.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.compute.exchange import TIMEOUT_SECONDS, Address, Exchange
from pipeline.errors import ActorLostError
from pipeline.tree import lane_ranges

T = TypeVar("T")


class Collective:
    """One actor's part in what all compute together; alone, it answers at once.

    Args:
        rank: This actor's number, from 0.
        num_actors: A.
        num_lanes: L.
    """

    def __init__(self, rank: int, num_actors: int, num_lanes: int) -> None:
        self._rank = rank
        self._num_actors = num_actors
        self._num_lanes = num_lanes
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
            self._exchange.connect(self._rank, addresses, token)
            if has_own_gpu:
                self._join_nccl(self._exchange, addresses)
        except (OSError, RuntimeError) as exc:
            where = f"actor {self._rank}"
            raise ActorLostError(f"{where}: expected {self._num_actors} actors to connect, got {exc}") from exc

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

    def gather_lanes(self, gradients_ZP: torch.Tensor) -> Sequence[torch.Tensor]:
        """Bring all actors' lanes together, in the lanes' order: float32 [Z, P] on each of A actors -> L times [P].

        Raises:
            ActorLostError: If another actor is gone.
        """
        if self._exchange is None:
            return gradients_ZP.unbind()
        if self._has_nccl:
            sent_ZP = gradients_ZP.contiguous()
            all_AZP = torch.empty(self._num_actors, *sent_ZP.shape, device=sent_ZP.device)
            self._call(lambda: dist.all_gather_single(all_AZP.flatten(0, 1), sent_ZP))
        else:
            exchange = self._exchange
            gathered = self._call(lambda: exchange.gather(gradients_ZP.cpu().numpy()))
            all_AZP = torch.from_numpy(gathered).to(gradients_ZP.device)
        ranges = lane_ranges(self._num_lanes, self._num_actors)
        return [all_AZP[rank, place] for rank, lanes in enumerate(ranges) for place in range(len(lanes))]

    def close(self) -> None:
        """Close all connections."""
        if self._exchange is not None:
            self._exchange.close()

    def _join_nccl(self, exchange: Exchange, addresses: Sequence[Address]) -> None:
        """Form the process group by which GPUs exchange; the first actor keeps its store."""
        host = addresses[0][0]
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        port = 0
        if self._rank == 0:
            # By default the store would listen on every address of the machine.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family, backlog=1024)
            port = int(listener.getsockname()[1])
            self._store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
            )
        port = int(exchange.gather(np.array([port]))[0, 0])
        if self._rank > 0:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        # By default NCCL takes the interface that the host's name leads to, which may be another or a public one.
        if interface := _interface_of(addresses[self._rank][0]):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        dist.init_process_group(
            "nccl", store=self._store, rank=self._rank, world_size=self._num_actors, timeout=timeout
        )
        self._has_nccl = True

    def _call(self, operation: Callable[[], T]) -> T:
        try:
            return operation()
        except (OSError, RuntimeError) as exc:
            raise ActorLostError(f"actor {self._rank}: expected the other actors to answer, got {exc}") from exc


def _interface_of(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address for known in addresses):
            return str(name)
    return None
