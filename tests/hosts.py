"""Hosts that share nothing, on one machine: each with a network, processes, home, /tmp, /run and /dev/shm of its own.

A host is a process in network, mount, PID, IPC and UTS namespaces of its own. The first host is the switch too: its
bridge joins the others. Nothing has a name outside of them, so all of it, mounts, links and processes, ends with these
processes, and they end with the process that made them, however that ends.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
NETWORK = "10.77.0"
_TOOLS = ("unshare", "nsenter", "setpriv", "mount", "ip", "sshd", "ssh", "ssh-keygen", "rsync")
_NAMESPACES = ("net", "mnt", "pid", "ipc", "uts")
_SEARCH_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What is below a folder that a host has of its own, and is needed there: the project and its environment.
_OWN_FOLDERS = ("/tmp", "/run", str(Path.home()))
_NEEDED = dict.fromkeys((str(ROOT), sys.prefix, sys.base_prefix))
_KEPT = [
    path
    for path in _NEEDED
    if any(Path(path).is_relative_to(folder) for folder in _OWN_FOLDERS)
    and not any(Path(path).is_relative_to(other) for other in _NEEDED if other != path)
]

_BOOT = """
set -eu
ip link set lo up
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
number=0
for path in {kept}; do
    mkdir -p /dev/shm/kept/$number
    mount --bind "$path" /dev/shm/kept/$number
    number=$((number + 1))
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=700 tmpfs "$HOME"
number=0
for path in {kept}; do
    mkdir -p "$path"
    mount --move /dev/shm/kept/$number "$path"
    mount -o remount,bind,ro "$path"
    number=$((number + 1))
done
hostname {name}
# As Debian has it: a host's own name is an address that no other host can reach.
printf '127.0.0.1 localhost\n127.0.1.1 {name}\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
# Nobody answers questions for names here; without a server they fail at once instead of after many seconds.
touch /run/resolv.conf
[ ! -e /etc/resolv.conf ] || mount --bind /run/resolv.conf /etc/resolv.conf
mount -o remount,bind,ro /
mkdir -p /run/sshd "$HOME/.ssh"
touch "$HOME/.bashrc"
{then}
echo ready
while :; do sleep 1000 & wait $!; done
"""
_SWITCH = """
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
ip link add name switch type bridge
ip address add {address}/24 dev switch
ip link set switch up
"""
_SSHD = """
ssh-keygen -q -t ed25519 -N '' -f /run/host_key
echo {public_key} > "$HOME/.ssh/authorized_keys"
until ip address show dev eth0 2>/dev/null | grep -q 'inet '; do sleep 0.05; done
"$(command -v sshd)" -D -e -f /dev/null -o ListenAddress={address} -o HostKey=/run/host_key -o StrictModes=no \\
    -o PasswordAuthentication=no -o UsePAM=no -o PidFile=none 2> /run/sshd.log &
"""


@dataclass(frozen=True)
class Host:
    """A host: its address, the process that all others on it descend from, and its link's name on the switch."""

    address: str
    pid: int
    link: str = ""

    def command(self, *args, **environment):
        """Return the command that runs another on this host, in the project's folder, as a fresh login would."""
        given = {"HOME": str(Path.home()), "PATH": _SEARCH_PATH, "LANG": "C.UTF-8", "TERM": "dumb", **environment}
        settings = [f"{name}={value}" for name, value in given.items()]
        inside = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(map(str, args))}"
        return [
            "nsenter",
            "-t",
            str(self.pid),
            "-m",
            "-n",
            "-p",
            "-i",
            "-u",
            "env",
            "-i",
            *settings,
            "bash",
            "-c",
            inside,
        ]

    def namespace(self, kind):
        """Name a namespace of this host."""
        return os.readlink(f"/proc/{self.pid}/ns/{kind}")  # noqa: PTH115 - no path, a name

    def path(self, name):
        """Return where a path of this host is found from outside."""
        return Path(f"/proc/{self.pid}/root{name}")

    def run(self, *args, stdin=None, timeout=600, **environment):
        """Run a command on this host to its end and return it; its output is text."""
        return subprocess.run(
            self.command(*args, **environment),
            input=stdin, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def output(self, *args, stdin=None, **environment):
        """Run a command on this host that has to succeed and return what it prints."""
        done = self.run(*args, stdin=stdin, **environment)
        assert done.returncode == 0, f"{shlex.join(map(str, args))}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def service(host, *args, log):
    """Run a command on a host for as long as the context lasts."""
    with log.open("w") as file:
        process = subprocess.Popen(host.command(*args), stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def own_machines():
    """Make from cluster.yaml the file for machines of one's own, as the README says it."""
    readme = (ROOT / "pipeline" / "driver" / "README.md").read_text()
    text = re.search(r"On machines of your own(.*?)```yaml\n(.*?)```", readme, re.DOTALL)
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    without = re.search(r"without (.*?), and with this", text[1], re.DOTALL)[1]
    for key in re.findall(r"`(\w+)`", without):
        del config[key]
    assert set(re.findall(r"`(\w+)`", text[1].partition("in the place of")[2])) == {"provider", "auth"}
    return config | yaml.safe_load(text[2])


def why_not():
    """Say why there can be no hosts on this machine, or return None."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    if missing := [tool for tool in _TOOLS if not shutil.which(tool, path=_SEARCH_PATH)]:
        return f"hosts of their own need {', '.join(missing)}; .ci/run installs them"
    trial = "mount -t tmpfs tmpfs /dev/shm && ip link add bridge type bridge && ip link add left type veth peer right"
    words = ["unshare", "-n", "-m", "-p", "-i", "-u", "-f", "--mount-proc", "bash", "-c", trial]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"hosts of their own need namespaces: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def isolated_hosts(num_hosts):
    """Make a switch and hosts with sshd on it; on leaving, end them and see that nothing of them is left.

    Yields:
        The switch, from which the hosts can be reached by `ssh` without a password, and the list of hosts.
    """
    before = _machine_state()
    namespaces = set()
    try:
        with ExitStack() as stack:
            switch = stack.enter_context(_host(f"{NETWORK}.1", _SWITCH.format(address=f"{NETWORK}.1")))
            namespaces |= _namespaces(switch.pid)
            public_key = shlex.quote(switch.output("cat", Path.home() / ".ssh" / "id_ed25519.pub").strip())
            hosts = []
            for number in range(num_hosts):
                address, link = f"{NETWORK}.{11 + number}", f"host{number}"
                boot = _SSHD.format(address=address, public_key=public_key)
                host = stack.enter_context(_host(address, boot, switch, link))
                namespaces |= _namespaces(host.pid)
                hosts.append(host)
            yield switch, hosts
    finally:
        _wait_until(lambda: not processes_in(namespaces), "the hosts' processes to end")
        assert _machine_state() == before


def cut_off(switch, host):
    """Take a host's link down: it hears nothing and is not heard, and nobody is told."""
    _on_network(switch, "link", "set", host.link, "down")


def reconnect(switch, host):
    """Take a host's link up again."""
    _on_network(switch, "link", "set", host.link, "up")


def bytes_crossed(switch, hosts):
    """Return the bytes that went to and came from each host so far."""
    statistics = [
        json.loads(_on_network(switch, "-j", "-s", "link", "show", host.link))[0]["stats64"] for host in hosts
    ]
    return [row["rx"]["bytes"] + row["tx"]["bytes"] for row in statistics]


def listening(host):
    """Return the addresses with ports on which TCP is listened for on a host, with the program's name."""
    lines = host.output("ss", "-H", "-l", "-t", "-n", "-p").splitlines()
    return sorted((line.split()[3], line.partition('(("')[2].partition('"')[0]) for line in lines)


def processes_in(namespaces):
    """Return the ids of all processes of the machine that are in one of the namespaces."""
    return [pid for pid in psutil.pids() if _namespaces(pid) & namespaces]


@contextmanager
def _host(address, boot, switch=None, link=""):
    # setpriv: a maker that is killed takes the host with it; --kill-child: and so does unshare.
    words = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "-n",
        "-m",
        "-p",
        "-i",
        "-u",
        "-f",
        "--kill-child",
        "--mount-proc",
    ]
    script = _BOOT.format(kept=shlex.join(_KEPT), name=link or "switch", then=boot)
    environment = {"HOME": str(Path.home()), "PATH": _SEARCH_PATH}
    maker = subprocess.Popen(
        [*words, "bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        _wait_until(lambda: psutil.Process(maker.pid).children(), f"host {address} to start")
        pid = psutil.Process(maker.pid).children()[0].pid
        _wait_until(lambda: _namespaces(pid).isdisjoint(_namespaces(os.getpid())), "a host's namespaces")
        host = Host(address, pid, link)
        if switch:
            _on_network(switch, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            _on_network(switch, "link", "set", link, "master", "switch", "up")
            _on_network(host, "link", "set", "eth0", "up")
            _on_network(host, "address", "add", f"{address}/24", "dev", "eth0")
            # The switch forwards nothing; but a route out is how Ray, and others, find out their own address.
            _on_network(host, "route", "add", "default", "via", switch.address)
        line = maker.stdout.readline()
        assert line == "ready\n", f"host {address}: expected it to boot, got {line!r}"
        yield host
    finally:
        maker.kill()
        maker.wait()
        maker.stdout.close()


def _on_network(host, *args):
    # In the host's network alone: a process id means there what it means here.
    words = ["nsenter", "-t", str(host.pid), "-n", "ip", *args]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _namespaces(pid):
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in _NAMESPACES}  # noqa: PTH115 - no path, a name
    except OSError:
        return set()


def _machine_state():
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return {link["ifname"] for link in links}, set(Path("/proc/self/mountinfo").read_text().splitlines())


def _wait_until(is_done, what, timeout_s=200):
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"expected {what}, got nothing for {timeout_s} s"
        time.sleep(0.05)
