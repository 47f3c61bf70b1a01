import json
import os
import subprocess
import sys

import pytest
from builders import ROOT

import benchmark
from benchmarks import data as datasets
from benchmarks.request import Answer


@pytest.fixture(scope="module")
def arrays(noisy_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays")
    datasets.write_arrays(noisy_dataset, folder)
    return folder


def _ask(name, **request):
    command = [sys.executable, "-m", "benchmarks.parts", name, json.dumps(request)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "jobs",
        env={**os.environ, "RAY_ADDRESS": "local"},
    )
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_plain_loop_and_one_or_two_actors_train_the_same_model(arrays):
    names = ("actor", "actors_2", "torch_loop")
    answers = {name: _ask(name, arrays=str(arrays), batch_size=16, num_epochs=2) for name in names}
    benchmark.check_answers(answers, frozenset(("torch_loop",)))
    assert answers["actor"].checksum == answers["actors_2"].checksum
    assert answers["torch_loop"].checksum == pytest.approx(answers["actor"].checksum, rel=1e-5)
    assert {answer.num_units for answer in answers.values()} == {2 * 24}
    assert all(answer.phase_s > 0 for answer in answers.values())


def test_scikit_learn_trains_as_many_epochs(arrays):
    answer = _ask("sklearn_sgd", arrays=str(arrays), num_epochs=2)
    assert (answer.num_images, answer.num_valid, answer.num_units) == (42, 18, 48)
    assert 0 <= answer.num_correct <= 18


@pytest.mark.ray
@pytest.mark.slow
def test_the_driver_hands_out_every_shard():
    answer = _ask("driver", num_shards=20)
    assert (answer.num_images, answer.num_units) == (20 * 2048, 20)
    assert answer.phase_s > 0
    assert answer.quarter_bytes > 2**20
