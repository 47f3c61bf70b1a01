import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

JOBS = Path(__file__).parents[1] / "jobs"
CLASSES = ("2", "10", "b")


@pytest.fixture(scope="module")
def benchmark():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(JOBS)
        yield importlib.import_module("benchmark")
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Classes of noise that overlap, so that some images are nearest to another class."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, num_images in (("train", 8), ("valid", 6)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num_images):
                pixels = rng.integers(4 * label, 256 - 4 * (2 - label), (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def _naive_num_correct(root):
    def pixels(split, name):
        return [np.array(Image.open(path)) / 255 for path in sorted((root / split / name).iterdir())]

    means = [np.mean(pixels("train", name), axis=0) for name in CLASSES]
    return sum(
        int(np.argmin([np.abs(image - mean).mean() for mean in means]) == label)
        for label, name in enumerate(CLASSES)
        for image in pixels("valid", name)
    )


def _invoke(benchmark, *arguments):
    return CliRunner().invoke(benchmark.main, [str(argument) for argument in arguments])


@pytest.mark.ray
def test_this_program_and_a_plain_loop_are_compared(benchmark, data, tmp_path):
    names, out = ["plain_loop", "evaluate"], tmp_path / "runs.parquet"
    result = _invoke(benchmark, "--data", data, "--runs", 1, "--only", ",".join(names), "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == names
    rows = pq.read_table(out).to_pylist()
    assert [(row["command"], row["run"], row["num_images"]) for row in rows] == [(name, 1, 42) for name in names]
    assert {row["num_correct"] for row in rows} == {_naive_num_correct(data)}
    assert all(row["wall_s"] > 0 and row["cpu_s"] > 0 and row["peak_bytes"] > 2**20 for row in rows)
    assert rows[0].keys() >= {"num_cpus", "python", "torch", "ray", "pillow"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="Ray Data needs pandas, of the extra bench")
def test_ray_data_gives_the_same_answer(benchmark, data):
    answers = {name: benchmark.measure(name, 1, data, 42)[1] for name in ("plain_loop", "ray_data_read_images")}
    benchmark.check_answers(answers)
    assert answers["plain_loop"] == benchmark.Answer(_naive_num_correct(data), 18)


def test_another_answer_is_an_error(benchmark):
    answers = {"a": benchmark.Answer(7, 10), "b": benchmark.Answer(7, 10)}
    benchmark.check_answers(answers)
    with pytest.raises(click.ClickException, match="c: expected 7 of 10 correct as a found, got 6 of 10;"):
        benchmark.check_answers({**answers, "c": benchmark.Answer(6, 10)})


def test_ratios_are_taken_within_rounds(benchmark):
    walls = {"evaluate": (1.0, 2.0, 4.0), "plain_loop": (2.0, 2.0, 2.0)}
    runs = [
        benchmark.Run(name, index, wall_s, 3.0, 2**20, 100, 7)
        for name, seconds in walls.items()
        for index, wall_s in enumerate(seconds, 1)
    ]
    first, second = (line.split() for line in benchmark.table(runs).splitlines()[2:])
    assert first == ["evaluate", "2.00", "1.00", "4.00", "3.0", "1", "50", "1.00", "1.00", "1.00"]
    assert second == ["plain_loop", "2.00", "2.00", "2.00", "3.0", "1", "50", "1.00", "0.50", "2.00"]


def test_without_this_program_there_is_no_ratio(benchmark):
    line = benchmark.table([benchmark.Run("plain_loop", 1, 2.0, 3.0, 2**20, 100, 7)]).splitlines()[-1]
    assert line.split() == ["plain_loop", "2.00", "2.00", "2.00", "3.0", "1", "50"]


def test_a_failed_command_is_an_error_with_its_last_words(benchmark, data, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_text("no image")
    result = _invoke(benchmark, "--data", tmp_path, "--only", "plain_loop", "--out", tmp_path / "runs.parquet")
    assert result.exit_code == 1
    assert "plain_loop: expected exit status 0, got 1" in result.stderr
    assert "cannot identify image file" in result.stderr
    assert not (tmp_path / "runs.parquet").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_that_runs(data, tmp_path, signum):
    out = tmp_path / "runs.parquet"
    command = [sys.executable, JOBS / "benchmark.py", "--data", data, "--out", out, "--only", "plain_loop"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("warm-up: ")
        process.send_signal(signum)
        words = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted: 0 of 5 runs were done" in words
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [line for line in commands if os.fsencode(data) in line]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--only", "nothing"],
            "expected some of evaluate, plain_loop, ray_data_read_images, ray_data_tuned, got nothing",
        ),
        (["--runs", "0"], "0 is not in the range"),
        (["--data", "/"], "got no train"),
    ],
)
def test_bad_usage(benchmark, data, arguments, words):
    result = _invoke(benchmark, "--data", data, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_session_is_read_and_ended(benchmark):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert list(benchmark._read_session(process.pid)) == [process.pid]
        benchmark._end_session(process.pid)
        assert process.wait() == -signal.SIGKILL
    assert benchmark._read_session(process.pid) == {}
