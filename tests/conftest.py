"""What several test files need: one local Ray a session, small datasets, the command, and MNIST where it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.data import storage

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
# No test joins a Ray that somebody else runs on this machine.
os.environ.setdefault("RAY_ADDRESS", "local")


@pytest.fixture(autouse=True)
def _forget_clients():
    """A client is kept for a process, which is a whole job; here it would outlast its test."""
    yield
    storage._connect.cache_clear()


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
def small_dataset(tmp_path_factory):
    """Three classes of 8x8 grey images, 40 to train on and 12 to validate on each, with one file that is no image."""
    root = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(7)
    for split, num_images in (("train", 40), ("valid", 12)):
        for label, name in enumerate(("2", "10", "ä")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num_images):
                pixels = random.integers(0, 120, (8, 8)) + 60 * (np.arange(8) % 3 == label)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    (root / "labels.csv").write_text("name,label\n")
    return root


@pytest.fixture(scope="session")
def black_and_white(tmp_path_factory):
    """Two classes of 16 images each, all black and all white: the largest gradients that there are."""
    root = tmp_path_factory.mktemp("contrast")
    for split in ("train", "valid"):
        for name, value in (("black", 0), ("white", 255)):
            (root / split / name).mkdir(parents=True)
            for number in range(16):
                Image.new("L", (8, 8), value).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def noisy_dataset(tmp_path_factory):
    """Three classes of noise that overlap, so that some images are nearest to another class."""
    root, random = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    for split, num_images in (("train", 8), ("valid", 6)):
        for label, name in enumerate(("2", "10", "b")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num_images):
                pixels = random.integers(4 * label, 256 - 4 * (2 - label), (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def naive_pixels(root, split, name):
    """Decode a class of `noisy_dataset`, one image after another, to 0 to 1."""
    return [np.array(Image.open(path)) / 255 for path in sorted((root / split / name).iterdir())]


def naive_num_correct(root):
    """Count the images of `noisy_dataset` that are nearest to their own class's mean."""
    classes = ("2", "10", "b")
    means = [np.mean(naive_pixels(root, "train", name), axis=0) for name in classes]
    return sum(
        int(np.argmin([np.abs(image - mean).mean() for mean in means]) == label)
        for label, name in enumerate(classes)
        for image in naive_pixels(root, "valid", name)
    )


def unpack(name, tmp_path_factory):
    archive = DATA / f"{name}.tgz"
    if not archive.exists():
        pytest.skip(f"needs {archive.name} in ../shared/data")
    folder = tmp_path_factory.mktemp(name)
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)  # ten times as fast as tarfile
    return folder / name


def command(*args, stderr=subprocess.PIPE, **environment):
    """Start the command as a user does, in a process group of its own, marked so that its processes can be found."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def processes_with(name, value):
    """Find the living processes in whose environment a variable has a value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def end_processes(processes):
    """End processes by their ids."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
