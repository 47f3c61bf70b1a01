"""The hosts that tests make for themselves: apart from each other, and gone afterwards, whatever happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import cut_off, isolated_hosts, listening, processes_in, reconnect, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 22), 1)"
# Prints the names of the namespaces, and waits to be killed.
MAKER = """
import sys, time
from hosts import isolated_hosts
with isolated_hosts(2) as (switch, hosts):
    kinds = ("net", "mnt", "pid", "ipc", "uts")
    print(*(host.namespace(kind) for host in (switch, *hosts) for kind in kinds), flush=True)
    time.sleep(600)
"""


def test_hosts_see_each_other_by_the_network_alone():
    with isolated_hosts(2) as (switch, (first, second)):
        for host in (first, second):
            host.output("bash", "-c", "echo $0 > /tmp/mark; echo $0 > ~/mark; echo $0 > /dev/shm/mark", host.address)
        told = ("ssh", "-o", "StrictHostKeyChecking=no", first.address, "cat /tmp/mark ~/mark /dev/shm/mark")
        assert switch.output(*told).split() == [first.address] * 3
        assert "Read-only" in first.run("touch", "/usr/mark").stderr
        assert listening(first) == [(f"{first.address}:22", "sshd")]
    assert not Path("/tmp/mark").exists()


def test_a_host_that_is_cut_off_is_not_heard_until_it_is_connected_again():
    with isolated_hosts(1) as (switch, [host]):
        assert switch.run("python", "-c", CONNECT, host.address).returncode == 0
        cut_off(switch, host)
        assert "timed out" in switch.run("python", "-c", CONNECT, host.address).stderr
        reconnect(switch, host)
        assert switch.run("python", "-c", CONNECT, host.address).returncode == 0


def test_a_test_that_fails_leaves_nothing():
    def fail():
        with isolated_hosts(1) as (_, [host]):  # asserts at its end that nothing is left
            host.output("bash", "-c", "sleep 600 > /dev/null 2>&1 &")
            raise LookupError("a fault")

    with pytest.raises(LookupError, match="a fault"):
        fail()


def test_a_maker_that_is_killed_leaves_nothing():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True, env=environment) as maker:
        namespaces = set(maker.stdout.readline().split())
        assert len(processes_in(namespaces)) > 5
        maker.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 100
    while processes_in(namespaces):
        assert time.monotonic() < deadline
        time.sleep(0.1)
