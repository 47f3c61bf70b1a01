import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from builders import ROOT, naive_num_correct
from click.testing import CliRunner

import benchmark
from benchmarks.request import Answer


@pytest.fixture(autouse=True)
def handlers():
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _invoke(*arguments):
    return CliRunner().invoke(benchmark.main, [str(argument) for argument in arguments])


@pytest.mark.ray
def test_this_program_and_a_plain_loop_are_compared(noisy_dataset, tmp_path):
    names, out = ["plain_loop", "limit", "evaluate"], tmp_path / "runs.parquet"
    result = _invoke("--data", noisy_dataset, "--runs", 1, "--warm-ups", 0, "--only", ",".join(names), "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[3:]] == names
    rows = pq.read_table(out).to_pylist()
    assert [(row["command"], row["run"], row["num_images"]) for row in rows] == [(name, 1, 42) for name in names]
    assert [row["num_correct"] for row in rows] == [naive_num_correct(noisy_dataset), None, rows[0]["num_correct"]]
    assert all(row["wall_s"] > 0 and row["cpu_s"] > 0 and row["main_peak_bytes"] > 2**20 for row in rows)
    assert rows[1]["phase_s"] > 0
    assert rows[2]["phase_s"] > 0
    assert rows[0].keys() >= {"num_cpus", "python", "torch", "ray", "pillow"}
    figures = pq.read_table(tmp_path / "runs-figures.parquet").to_pylist()
    assert {figure["measure"] for figure in figures if figure["command"] == "limit"} >= {"wall_ratio", "phase_ratio"}


def test_sizes_are_held_against_each_other(noisy_dataset, tmp_path):
    arguments = ["--data", noisy_dataset, "--images", "42,84", "--runs", 1, "--warm-ups", 0, "--only", "limit"]
    result = _invoke("--workload", "many", *arguments, "--work", tmp_path / "work", "--out", tmp_path / "runs.parquet")
    assert result.exit_code == 0, result.output
    assert "many, 84 images against many, 42 images" in result.stdout
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"many-42", "many-84"}


@pytest.mark.long
def test_a_second_run_is_held_against_the_first(noisy_dataset, tmp_path):
    arguments = ["--data", noisy_dataset, "--runs", 1, "--warm-ups", 0, "--out", tmp_path / "runs.parquet"]
    result = _invoke("--workload", "cache", *arguments)
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    assert [row["command"] for row in rows] == ["evaluate_first", "evaluate_again"]


@pytest.mark.parametrize(
    "other",
    [Answer(10, 6, 7, 0.5), Answer(10, 5, 8, 0.5), Answer(11, 5, 7, 0.5), Answer(10, 5, 7, 0.51), Answer(11)],
)
def test_another_answer_is_an_error(other):
    answers = {"a": Answer(10, 5, 7, 0.5), "b": Answer(10, 5, 7, 0.500001), "limit": Answer(10)}
    benchmark.check_answers(answers)
    with pytest.raises(click.ClickException, match=r"c: expected 10 images, 5 of 7 correct, checksum 0.5 as a found"):
        benchmark.check_answers({**answers, "c": other})


def test_another_resizer_may_differ_a_little_but_is_no_reference():
    exact = {"evaluate": Answer(1000, 102, 200, 0.5), "plain_loop": Answer(1000, 100, 200, 0.504)}
    loose = frozenset(("evaluate",))
    benchmark.check_answers(exact, loose)
    with pytest.raises(click.ClickException, match=r"dataloader: expected .* as plain_loop found"):
        benchmark.check_answers({**exact, "dataloader": Answer(1000, 102, 200, 0.504)}, loose)
    with pytest.raises(click.ClickException, match="evaluate: expected"):
        benchmark.check_answers({**exact, "evaluate": Answer(1000, 105, 200, 0.504)}, loose)


def test_a_failed_command_is_an_error_with_its_last_words(tmp_path, black_and_white):
    bad = tmp_path / "images"
    for split in ("train", "valid"):
        (bad / split / "a").mkdir(parents=True)
        (bad / split / "a" / "0.png").write_bytes(next((black_and_white / split / "black").iterdir()).read_bytes())
    (bad / "valid" / "a" / "0.png").write_text("no image")
    result = _invoke("--data", bad, "--only", "plain_loop", "--out", tmp_path / "runs.parquet")
    assert result.exit_code == 1
    assert "plain_loop: expected exit status 0, got 1" in result.stderr
    assert "cannot identify image file" in result.stderr
    assert not (tmp_path / "runs.parquet").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_command_that_runs(tmp_path, signum):
    image, out = tmp_path / "data" / "train" / "a" / "0.png", tmp_path / "runs.parquet"
    for folder in (image.parent, tmp_path / "data" / "valid" / "a"):
        folder.mkdir(parents=True)
    os.mkfifo(image)  # whoever opens it waits for an end that never comes
    options = ["--data", tmp_path / "data", "--out", out, "--only", "plain_loop"]
    command = [sys.executable, ROOT / "jobs" / "benchmark.py", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while (writer := open_if_read(image)) is None:
            assert process.poll() is None, process.stderr.read()
        words = None
        while words is None:
            process.send_signal(signum)
            # One that comes right before the read is seen when the read returns, which is never: then again.
            with suppress(subprocess.TimeoutExpired):
                _, words = process.communicate(timeout=20)
        os.close(writer)
    assert process.returncode == 130
    assert "interrupted: 0 runs were done" in words
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [line for line in commands if os.fsencode(tmp_path / "data") in line]
    assert not out.exists()


def open_if_read(fifo):
    """Open a FIFO to write to it once somebody reads it; None before."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads it yet
        time.sleep(0.01)
        return None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing"], "expected some of evaluate, plain_loop, dataloader, ray_data_read_images, "),
        (["--workload", "cache", "--only", "limit"], "expected some of evaluate_first, evaluate_again, got limit"),
        (["--runs", "0"], "0 is not in the range"),
        (["--workload", "many", "--images", "1e6"], "expected whole numbers, got 1e6"),
        (["--data", "/"], "got no train"),
        ([], "expected a folder for --workload mnist, got none"),
    ],
)
def test_bad_usage(arguments, words):
    result = _invoke(*arguments)
    assert result.exit_code == 2
    *_, last = result.stderr.splitlines()  # before it stand the peers that are not installed
    assert re.fullmatch(f"error: .*{re.escape(words)}.*; try --help", last)


def test_what_is_not_installed_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    names = benchmark.choose("mnist", None, sys.executable)
    assert names == ("evaluate", "plain_loop", "dataloader", "limit")
    assert "left out: daft: expected daft, got no such package" in capsys.readouterr().err
    with pytest.raises(click.UsageError, match="ray_data_tuned: expected pandas, got no such package"):
        benchmark.choose("mnist", "ray_data_tuned", sys.executable)
    assert benchmark.choose("mnist", "daft", "another/python") == ("daft",)
