import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from builders import ROOT, naive_num_correct, naive_pixels
from PIL import Image

import benchmark
from benchmarks import data as datasets
from benchmarks.request import Answer, class_names

DAFT_PYTHON = os.environ.get("DAFT_PYTHON", sys.executable)


def _ask(name, images):
    command = [sys.executable, "-m", "benchmarks.peers", name, json.dumps(asdict(images))]
    if name.startswith("daft"):
        command[0] = DAFT_PYTHON
    if reason := benchmark.missing_package(name, DAFT_PYTHON):
        pytest.skip(reason)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT / "jobs", env={**os.environ, "RAY_ADDRESS": "local"}
    )
    try:
        done.check_returncode()
    except subprocess.CalledProcessError as exc:
        exc.add_note(done.stderr)
        raise
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        "dataloader",
        "daft",
        pytest.param("ray_data_read_images", marks=(pytest.mark.ray, pytest.mark.long)),
        pytest.param("ray_data_tuned", marks=(pytest.mark.ray, pytest.mark.long)),
        pytest.param("ray_data_map_batches", marks=(pytest.mark.ray, pytest.mark.long)),
    ],
)
def test_a_peer_finds_what_numpy_finds(noisy_dataset, name):
    answer = _ask(name, datasets.images_request(noisy_dataset))
    assert (answer.num_images, answer.num_correct, answer.num_valid) == (42, naive_num_correct(noisy_dataset), 18)
    means = [np.mean(naive_pixels(noisy_dataset, "train", label)) for label in class_names(noisy_dataset)]
    assert answer.checksum == pytest.approx(np.mean(means), abs=1e-6)


@pytest.mark.parametrize("name", ["limit", "daft_decode"])
def test_what_only_decodes_says_how_many(noisy_dataset, name):
    assert _ask(name, datasets.images_request(noisy_dataset)).num_images == 42


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_loop", "dataloader", "daft"])
def test_photographs_become_one_size_and_colour(tmp_path, name):
    for split in ("train", "valid"):
        for label, colour in enumerate(("red", "blue")):
            (tmp_path / split / colour).mkdir(parents=True)
            for number in range(3):
                size = (100 + 40 * number, 90)
                Image.new("RGB", size, colour).save(tmp_path / split / colour / f"{label}.{number}.jpg")
    answer = _ask(name, datasets.images_request(tmp_path, (16, 24)))
    assert (answer.num_images, answer.num_correct, answer.num_valid) == (12, 6, 6)
    assert answer.checksum == pytest.approx(1 / 3, abs=0.01)


def test_the_limit_does_not_pass_over_what_it_cannot_decode(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / split / "a" / "0.png")
    (tmp_path / "valid" / "a" / "1.png").write_text("no image")
    with pytest.raises(subprocess.CalledProcessError):
        _ask("limit", datasets.images_request(tmp_path))


def test_peers_need_no_library_to_begin():
    heavy = ("torch", "ray", "numpy", "PIL", "daft", "pyarrow", "pandas")
    code = f"import benchmarks.peers, sys; assert not sys.modules.keys() & set({heavy})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "jobs", check=True)


def test_classes_are_in_natural_order(noisy_dataset):
    assert class_names(noisy_dataset) == ["2", "10", "b"]
