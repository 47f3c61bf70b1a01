"""The benchmark: this program and what a user would pick instead, on the same images, in turn, in one call.

What enters: a folder of `train/<class>/` and `valid/<class>/` with grey images of one size. What leaves: a table on
standard output and every single run as Parquet. Always: each run is a whole process started anew, and times are
compared only where the answers are the same.

Legend: N images, K classes, H and W an image's height and width, D = H·W.
"""

# A peer runs in this file too and pays for every import here: only light ones, the others inside the functions.
from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

EVALUATE = "evaluate"
# What `read_images` takes when nothing is said, so that all commands read the same files.
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
_BLOCK_IMAGES = 512
_SAMPLE_SECONDS = 0.2
_GRACE_SECONDS = 20.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_LAST_LINES = 8


@dataclass(frozen=True)
class Answer:
    """How many images of `valid` lie nearest, by L1, to the mean of their own class, and of how many."""

    num_correct: int
    num_valid: int


@dataclass(frozen=True)
class Run:
    """One run of one command, and a row of the Parquet file; rounds count from 1, and 0 is the warm-up.

    `wall_s` is from starting the process to its end, as a user waits for it. `cpu_s` and `peak_bytes` come from
    looking at all processes of its session five times a second, because Ray's raylet does not wait for its workers,
    so that `wait4` knows nothing of them. Counted: user and system time of every process seen, Ray's services too.
    Not counted: the last fifth of a second of a process and those that live no longer. Where `wait4` says more, or
    there is no /proc, its figure stands: the command and the descendants that were waited for. `peak_bytes` is the
    resident memory of the largest process, pages of the object store that it touched included.
    """

    command: str
    run: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    num_images: int
    num_correct: int


# Peers: each is called in a process of its own.


def plain_loop(data: Path) -> Answer:
    """Do the work in one process, as one writes it in a notebook.

    The model is chapter 4 of "Deep Learning for Coders with fastai and PyTorch", with any number of classes.
    """
    import numpy as np
    import torch
    from PIL import Image

    def load(paths: Sequence[str]) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).float() / 255

    classes = class_names(data)
    means_KHW = torch.stack([load(image_paths(data, "train", name)).mean(0) for name in classes])
    num_correct = num_valid = 0
    for label, name in enumerate(classes):
        images_NHW = load(image_paths(data, "valid", name))
        for block_NHW in images_NHW.split(_BLOCK_IMAGES):
            # [N, 1, H, W] - [K, H, W] -> [N, K, H, W]
            distances_NK = (block_NHW[:, None] - means_KHW).abs().mean((2, 3))
            num_correct += int((distances_NK.argmin(1) == label).sum())
        num_valid += len(images_NHW)
    return Answer(num_correct, num_valid)


def ray_data_read_images(data: Path) -> Answer:
    """Do the work with Ray Data as its documentation shows it: `read_images`, then `map_batches`, nothing set.

    Source: https://docs.ray.io/en/latest/data/api/doc/ray.data.read_images.html
    """
    return _ray_data(data, is_tuned=False)


def ray_data_tuned(data: Path) -> Answer:
    """Do the same with the settings that were the fastest found on small files.

    `preserve_order` makes a read task read its files one after another instead of in eight threads, and the label
    comes by `partitioning`, which is cheaper than `include_paths`. Other numbers of blocks made no difference, and
    batches of a set size instead of whole blocks took nearly twice as long.
    Source: https://docs.ray.io/en/latest/data/execution-configurations.html
    """
    return _ray_data(data, is_tuned=True)


def _ray_data(data: Path, *, is_tuned: bool) -> Answer:
    import logging

    import numpy as np
    import ray
    import ray.data
    from ray.data.datasource.partitioning import Partitioning, PartitionStyle

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = is_tuned
    classes = class_names(data)
    labels_by_name = {name: label for label, name in enumerate(classes)}
    num_classes = len(classes)

    def read(split: str) -> Any:
        folder = str(data / split)
        if not is_tuned:
            return ray.data.read_images(folder, mode="L", include_paths=True)
        by_class = Partitioning(PartitionStyle.DIRECTORY, field_names=["class"], base_dir=folder)
        return ray.data.read_images(folder, mode="L", partitioning=by_class)

    def labels(batch: dict[str, Any]) -> Any:
        names = batch["class"] if is_tuned else [path.split("/")[-2] for path in batch["path"]]
        return np.array([labels_by_name[name] for name in names])

    def add_up(batch: dict[str, Any]) -> dict[str, Any]:
        images_NHW, labels_N = batch["image"], labels(batch)
        sums_KHW = np.stack([images_NHW[labels_N == label].sum(0, dtype=np.int64) for label in range(num_classes)])
        return {"sums": sums_KHW[None], "counts": np.bincount(labels_N, minlength=num_classes)[None]}

    rows = read("train").map_batches(add_up).take_all()
    sums_KHW, counts_K = sum(row["sums"] for row in rows), sum(row["counts"] for row in rows)
    means_KD = (sums_KHW / (255 * counts_K[:, None, None])).astype(np.float32).reshape(num_classes, -1)

    def score(batch: dict[str, Any]) -> dict[str, Any]:
        images_ND = batch["image"].reshape(len(batch["image"]), -1)
        labels_N = labels(batch)
        num_correct = 0
        for start in range(0, len(images_ND), _BLOCK_IMAGES):
            part = slice(start, start + _BLOCK_IMAGES)
            block_ND = images_ND[part].astype(np.float32) / 255
            # [N, 1, D] - [K, D] -> [N, K, D]
            distances_NK = np.abs(block_ND[:, None] - means_KD).mean(2)
            num_correct += int((distances_NK.argmin(1) == labels_N[part]).sum())
        return {"num_correct": [num_correct], "num_valid": [len(images_ND)]}

    rows = read("valid").map_batches(score).take_all()
    return Answer(sum(row["num_correct"] for row in rows), sum(row["num_valid"] for row in rows))


PEERS: dict[str, Callable[[Path], Answer]] = {
    "plain_loop": plain_loop,
    "ray_data_read_images": ray_data_read_images,
    "ray_data_tuned": ray_data_tuned,
}


def class_names(data: Path) -> list[str]:
    """List the classes as people sort them (2 before 10), which is the order in which a tie is settled."""

    def parts(name: str) -> list[int | str]:
        return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]

    return sorted((entry.name for entry in os.scandir(data / "train") if entry.is_dir()), key=parts)


def image_paths(data: Path, split: str, name: str) -> list[str]:
    """List a class's images in a split, sorted."""
    folder = data / split / name
    entries = os.scandir(folder) if folder.is_dir() else ()
    return sorted(entry.path for entry in entries if entry.name.lower().endswith(_IMAGE_ENDINGS))


# The parent: starts, watches, checks, compares.


def measure(name: str, index: int, data: Path, num_images: int) -> tuple[Run, Answer]:
    """Run a command once, as a process of its own.

    Raises:
        click.ClickException: If it fails; the message ends with the last lines of its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job, options = __file__, ["--peer", name]
        if name == EVALUATE:
            job = str(Path(__file__).with_name("evaluate.py"))
            options = ["--epochs", "0", "--json", "--out", f"{folder}/results"]
        command = [sys.executable, job, "--data", str(data), *options]
        exit_code, wall_s, cpu_s, peak_bytes = _watch(command, out, err)
        if exit_code:
            last = "\n".join(err.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise click.ClickException(
                f"{name}: expected exit status 0, got {exit_code}; its standard error, below, says why (peers "
                f"need the extra `bench`):\n{last}"
            )
        found = json.loads(out.read_text().splitlines()[-1])
    if name == EVALUATE:
        row = next(r for r in found["metrics"] if (r["classifier"], r["scope"]) == ("nearest_mean_l1", "all"))
        found = {"num_correct": row["num_correct"], "num_valid": row["num_images"]}
    answer = Answer(**found)
    return Run(name, index, wall_s, cpu_s, peak_bytes, num_images, answer.num_correct), answer


def _watch(command: Sequence[str], out: Path, err: Path) -> tuple[int, float, float, int]:
    """Run a process to its end in a session of its own; return exit code, wall and CPU seconds, and peak bytes."""
    seen: dict[int, tuple[float, int]] = {}
    has_ended = threading.Event()

    def look() -> None:
        while not has_ended.wait(_SAMPLE_SECONDS):
            seen.update(_read_session(process.pid))

    # A Ray that runs on this machine already would spare a command its start.
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    # An interrupt waits until there is a process to end.
    interrupts: list[int] = []
    handlers = {signum: signal.signal(signum, lambda signum, _: interrupts.append(signum)) for signum in _INTERRUPTS}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, start_new_session=True)
    try:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if interrupts:
            raise KeyboardInterrupt
        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    except KeyboardInterrupt:
        process.terminate()  # lets it end its Ray; what is slower than that is killed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        has_ended.set()
        _end_session(process.pid)
    looker.join()
    unit = 1 if sys.platform == "darwin" else 1024
    cpu_s = max(usage.ru_utime + usage.ru_stime, sum(seconds for seconds, _ in seen.values()))
    peak_bytes = max([usage.ru_maxrss * unit, *(size for _, size in seen.values())])
    return process.returncode, wall_s, cpu_s, peak_bytes


def _read_session(session: int) -> dict[int, tuple[float, int]]:
    """Return CPU seconds and peak resident bytes of a session's processes, by process; nothing without /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name in brackets: state, parent, group, session, ..., user and system time in ticks.
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) != session:
                continue
            peak = re.search(rb"VmHWM:\s+(\d+) kB", (folder / "status").read_bytes())
        except OSError:  # it has ended meanwhile
            continue
        if peak:  # one that has ended but was not waited for has no memory
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(folder.name)] = (cpu_s, int(peak[1]) * 1024)
    return found


def _end_session(session: int) -> None:
    """Kill what a command left behind, its process group and the groups that Ray gives its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    for pid in _read_session(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check_answers(answers: Mapping[str, Answer]) -> None:
    """Hold every command's answer against the first one's.

    Raises:
        click.ClickException: If two differ: then their times say nothing.
    """
    (first, expected), *others = answers.items()
    for name, answer in others:
        if answer != expected:
            raise click.ClickException(
                f"{name}: expected {expected.num_correct:,} of {expected.num_valid:,} correct as {first} found, got "
                f"{answer.num_correct:,} of {answer.num_valid:,}; times are compared for equal answers only"
            )


def table(runs: Sequence[Run]) -> str:
    """Lay out medians and spreads by command; ratios are of wall times within a round, then their median."""
    wall_s = {(run.command, run.run): run.wall_s for run in runs}
    lines = [
        f"{'':<22}{'wall seconds':^24}{'CPU s':>8}{'peak':>8}{'images':>10}{'ratio to evaluate':^25}".rstrip(),
        f"{'command':<22}{'median':>8}{'min':>8}{'max':>8}{'median':>8}{'MiB':>8}{'a second':>10}"
        f"{'median':>9}{'min':>8}{'max':>8}",
    ]
    for name in dict.fromkeys(run.command for run in runs):
        own = [run for run in runs if run.command == name]
        walls = [run.wall_s for run in own]
        ratios = [run.wall_s / wall_s[EVALUATE, run.run] for run in own if (EVALUATE, run.run) in wall_s]
        lines.append(
            f"{name:<22}{median(walls):>8.2f}{min(walls):>8.2f}{max(walls):>8.2f}"
            f"{median(run.cpu_s for run in own):>8.1f}{max(run.peak_bytes for run in own) / 2**20:>8,.0f}"
            f"{own[0].num_images / median(walls):>10,.0f}"
            + (f"{median(ratios):>9.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}" if ratios else "")
        )
    return "\n".join(lines)


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write a row a run, each with what the figures depend on: the machine and the versions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.report import library_versions

    machine = {"platform": platform.platform(), "num_cpus": os.cpu_count(), **library_versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{**asdict(run), **machine} for run in runs]), path)


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    known = (EVALUATE, *PEERS)
    names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if value else known
    for name in names:
        if name not in known:
            raise click.BadParameter(f"expected some of {', '.join(known)}, got {name}; separate them by commas")
    return names


def _data(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    for split in ("train", "valid"):
        if not (value / split).is_dir():
            raise click.BadParameter(f"expected train and valid in {value}, got no {split}; give another folder")
    return value.resolve()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", required=True, callback=_data, type=click.Path(path_type=Path), help="Folder of train, valid.")
@click.option("--runs", "num_runs", type=click.IntRange(min=1), default=5, help="Rounds after one that warms up.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark.parquet", help="All runs.")
@click.option("--only", "names", callback=_names, help=f"Some of {','.join((EVALUATE, *PEERS))}.  [default: all]")
@click.option("--peer", type=click.Choice(tuple(PEERS)), hidden=True)
def main(data: Path, num_runs: int, out: Path, names: tuple[str, ...], peer: str | None) -> None:
    """Compare the times of this program and its peers for nearest class means on a folder of grey images.

    Exit status: 0 done, 1 a command failed or gave another answer, 2 bad usage.
    """
    if peer:
        click.echo(json.dumps(asdict(PEERS[peer](data))))
        return
    for signum in _INTERRUPTS:
        signal.signal(signum, signal.default_int_handler)
    num_images = sum(len(image_paths(data, split, name)) for split in ("train", "valid") for name in class_names(data))
    runs: list[Run] = []
    try:
        for index in range(num_runs + 1):
            answers: dict[str, Answer] = {}
            for name in names:
                run, answers[name] = measure(name, index, data, num_images)
                which = f"round {index} of {num_runs}" if index else "warm-up"
                click.echo(f"{which}: {name} {run.wall_s:.2f} s", err=True)
                runs += [run] if index else []
            check_answers(answers)
    except KeyboardInterrupt:
        click.echo(f"interrupted: {len(runs)} of {num_runs * len(names)} runs were done, none is written", err=True)
        sys.exit(130)
    write_runs(out, runs)
    click.echo(table(runs))


if __name__ == "__main__":
    main()
