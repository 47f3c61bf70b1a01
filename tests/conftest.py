"""Fixtures of several test files: one local Ray a session, small datasets, and MNIST where it is."""

import os
import subprocess
from collections import Counter

import numpy as np
import psutil
import pytest
from builders import DATA, end_processes, write_images
from obstore.store import MemoryStore

from pipeline.data import clients
from pipeline.results.writing import Output, prepare

# A bucket in memory: for the process, and until a test ends.
clients._CLIENTS["memory"] = lambda uri, options: MemoryStore()
# How long a test takes, roughly; without any marker it is quick.
MARKER_WEIGHTS = {"ray": 1, "browser": 1, "slow": 3, "cluster": 10}
# No test joins a Ray that somebody else runs on this machine.
os.environ.setdefault("RAY_ADDRESS", "local")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin the files that take longest first, or one worker would be at one of them when all others have ended."""
    weights = Counter()
    for item in items:
        weights[item.path] += sum(weight for name, weight in MARKER_WEIGHTS.items() if item.get_closest_marker(name))
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(autouse=True)
def _forget_clients():
    """A client is kept for a process, which is a whole job; here it would outlast its test."""
    yield
    clients.connect.cache_clear()


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that share it, with two pretended GPUs; this machine needs none."""
    import ray

    others = set(psutil.Process().children())
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=2, num_gpus=2, **options)  # of its own, whatever else runs on this machine
    yield
    started = [child for child in psutil.Process().children() if child not in others]
    started += [grandchild for child in started for grandchild in child.children(recursive=True)]
    ray.shutdown()
    end_processes(started)


@pytest.fixture(scope="session")
def mnist_sample(tmp_path_factory):
    """MNIST's threes and sevens, unpacked."""
    return unpack("mnist_sample", tmp_path_factory)


@pytest.fixture(scope="session")
def mnist_png(tmp_path_factory):
    """All of MNIST, unpacked."""
    return unpack("mnist_png", tmp_path_factory)


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory):
    """All of Fashion-MNIST, unpacked."""
    return unpack("fashion_mnist", tmp_path_factory)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """Three classes of 8x8 grey images, 40 to train on and 12 to validate on each, with one file that is no image."""
    root, random = tmp_path_factory.mktemp("small"), np.random.default_rng(7)

    def make_pixels(label):
        return (random.integers(0, 120, (8, 8)) + 60 * (np.arange(8) % 3 == label)).astype(np.uint8)

    (root / "labels.csv").write_text("name,label\n")
    return write_images(root, {"train": 40, "valid": 12}, ("2", "10", "ä"), make_pixels)


@pytest.fixture(scope="session")
def black_and_white(tmp_path_factory):
    """Two classes of 16 images each, all black and all white: the largest gradients that there are."""
    root = tmp_path_factory.mktemp("contrast")
    sizes = {"train": 16, "valid": 16}
    return write_images(root, sizes, ("black", "white"), lambda label: np.full((8, 8), 255 * label, np.uint8))


@pytest.fixture(scope="session")
def noisy_dataset(tmp_path_factory):
    """Three classes of noise that overlap, so that some images are nearest to another class."""
    root, random = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)

    def make_pixels(label):
        return random.integers(4 * label, 256 - 4 * (2 - label), (8, 8), dtype=np.uint8)

    return write_images(root, {"train": 8, "valid": 6}, ("2", "10", "b"), make_pixels)


@pytest.fixture
def output(tmp_path):
    """A folder for results, prepared."""
    made = Output.at(str(tmp_path / "out"))
    prepare(made, overwrite=False, resume=False)
    return made


@pytest.fixture
def memory_output():
    """The same in a file system in memory, which like an object store is no local one."""
    made = Output.at("memory://bucket/out")
    prepare(made, overwrite=False, resume=False)
    return made


@pytest.fixture(params=["output", "memory_output"])
def any_output(request):
    """Both, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def one_thread():
    """As in an actor: torch adds up one large image in other orders on several threads."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def unpack(name, tmp_path_factory):
    archive = DATA / f"{name}.tgz"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in ../shared/data")
    folder = tmp_path_factory.mktemp(name)
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)  # ten times as fast as tarfile
    return folder / name
