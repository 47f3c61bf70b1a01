"""Medians, spreads and ratios of the runs, as Parquet and as text.

Input: runs. Output: figures, a text table, two Parquet files. Invariant: a ratio is computed within a round, where both
commands find the machine in the same state; the median is that of the ratios.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

_MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One run of one command on one case: a row of the Parquet file. Rounds count from 1.

    Times and memory are those of `watch.Watched`, the other fields those of `request.Answer`.
    """

    case: str
    command: str
    run: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    main_peak_bytes: int
    num_images: int
    num_correct: int | None = None
    checksum: float | None = None
    phase_s: float | None = None
    num_units: int | None = None
    quarter_bytes: int | None = None
    num_requests: int | None = None


@dataclass(frozen=True)
class Figure:
    """One measure of one command over all rounds: median, minimum and maximum."""

    case: str
    command: str
    measure: str
    median: float
    minimum: float
    maximum: float
    num_runs: int


def _unit_s(run: Run) -> float | None:
    return run.phase_s / run.num_units if run.phase_s and run.num_units else None


_MEASURES: dict[str, Callable[[Run], float | None]] = {
    "wall_s": lambda run: run.wall_s,
    "phase_s": lambda run: run.phase_s,
    "cpu_s": lambda run: run.cpu_s,
    "peak_bytes": lambda run: run.peak_bytes,
    "main_peak_bytes": lambda run: run.main_peak_bytes,
    "quarter_bytes": lambda run: run.quarter_bytes,
    "requests_per_image": lambda run: run.num_requests / run.num_images if run.num_requests else None,
    "images_per_s": lambda run: run.num_images / run.wall_s,
    "units_per_s": lambda run: 1 / unit_s if (unit_s := _unit_s(run)) else None,
}
# Both relative to the base command: the whole process; and the phase per image (or shard).
_RATIOS: dict[str, Callable[[Run], float | None]] = {"wall_ratio": lambda run: run.wall_s, "phase_ratio": _unit_s}


def summarise(runs: Sequence[Run], bases: Mapping[str, str]) -> list[Figure]:
    """Compute every measure of every command, case by case.

    Args:
        runs: The runs of all rounds.
        bases: By case, the command that the others' times are divided by.
    """
    figures = []
    by_command: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        by_command.setdefault((run.case, run.command), {})[run.run] = run
    for (case, command), own in by_command.items():
        for measure, read in _MEASURES.items():
            figures += _figure(case, command, measure, [read(run) for run in own.values()])
        base = by_command.get((case, bases[case]), {})
        for measure, read in _RATIOS.items():
            figures += _figure(case, command, measure, [*_ratios(own, base, read)])
    return figures


def compare_sizes(runs: Sequence[Run], small: str, large: str) -> list[Figure]:
    """Compare each command's run on a large case with its run on a small one, in the same round.

    Measures: the ratio of the time per image, for the whole process and for the phase; and the growth of the main
    process's memory in bytes per additional image.
    """
    figures = []
    for command in dict.fromkeys(run.command for run in runs):
        by_case = {
            case: {run.run: run for run in runs if (run.case, run.command) == (case, command)}
            for case in (small, large)
        }
        few, many = by_case[small], by_case[large]
        case = f"{large} against {small}"
        wall = [*_ratios(many, few, lambda run: run.wall_s / run.num_images)]
        figures += _figure(case, command, "wall_ratio", wall)
        figures += _figure(case, command, "phase_ratio", [*_ratios(many, few, _unit_s)])
        more = [
            (run.main_peak_bytes - few[index].main_peak_bytes) / (run.num_images - few[index].num_images)
            for index, run in many.items()
            if index in few
        ]
        figures += _figure(case, command, "main_bytes_per_image", more)
    return figures


def _ratios(
    own: Mapping[int, Run], base: Mapping[int, Run], read: Callable[[Run], float | None]
) -> Iterator[float | None]:
    for index, run in own.items():
        if index in base:
            above, below = read(run), read(base[index])
            yield above / below if above and below else None


def _figure(case: str, command: str, measure: str, values: Sequence[float | None]) -> list[Figure]:
    known = [value for value in values if value is not None]
    return [Figure(case, command, measure, median(known), min(known), max(known), len(known))] if known else []


def format_table(figures: Sequence[Figure], bases: Mapping[str, str]) -> str:
    """Format figures as text, one block per case."""
    blocks = []
    for case in dict.fromkeys(figure.case for figure in figures):
        own: dict[str, dict[str, Figure]] = {}
        for figure in figures:
            if figure.case == case:
                own.setdefault(figure.command, {})[figure.measure] = figure
        blocks.append(_case_lines(case, own, bases[case]) if case in bases else _size_lines(case, own))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _case_lines(case: str, own: Mapping[str, Mapping[str, Figure]], base: str) -> list[str]:
    lines = [
        case,
        f"{'':<22}{'wall seconds':^24}{'images':>10}{'phase':>8}{'images,':>10}{'CPU':>8}{'largest':>9}{'own':>8}"
        f"{f'wall, times {base}':^25}{f'phase, times {base}':^25}".rstrip(),
        f"{'command':<22}{'median':>8}{'min':>8}{'max':>8}{'a second':>10}{'s':>8}{'shards/s':>10}{'s':>8}{'MiB':>9}"
        f"{'MiB':>8}{'median':>9}{'min':>8}{'max':>8}{'median':>9}{'min':>8}{'max':>8}",
    ]
    for command, found in own.items():
        walls, memory = found["wall_s"], found["peak_bytes"].maximum / _MIB
        line = (
            f"{command:<22}{walls.median:>8.2f}{walls.minimum:>8.2f}{walls.maximum:>8.2f}"
            f"{found['images_per_s'].median:>10,.0f}{_median(found, 'phase_s', '>8.2f')}"
            f"{_median(found, 'units_per_s', '>10,.0f')}{found['cpu_s'].median:>8.1f}{memory:>9,.0f}"
            f"{found['main_peak_bytes'].maximum / _MIB:>8,.0f}"
            f"{_spread(found, 'wall_ratio')}{_spread(found, 'phase_ratio')}"
        )
        lines.append(line.rstrip())
        if "requests_per_image" in found:
            lines.append(f"{command}: {found['requests_per_image'].median:.4f} requests an image")
        if "quarter_bytes" in found:
            lines.append(f"{command}: own memory {found['quarter_bytes'].median / _MIB:,.0f} MiB after a quarter")
    return lines


def _size_lines(case: str, own: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    lines = [
        case,
        f"{'':<22}{'wall an image, ratio':^25}{'phase an image, ratio':^25}{'own bytes an image more':^25}".rstrip(),
        f"{'command':<22}" + f"{'median':>9}{'min':>8}{'max':>8}" * 3,
    ]
    for command, found in own.items():
        spreads = [_spread(found, measure) for measure in ("wall_ratio", "phase_ratio", "main_bytes_per_image")]
        lines.append(f"{command:<22}{''.join(spreads)}".rstrip())
    return lines


def _median(found: Mapping[str, Figure], measure: str, form: str) -> str:
    return (
        f"{found[measure].median:{form}}" if measure in found else f"{'-':{form.partition(',')[0].partition('.')[0]}}"
    )


def _spread(found: Mapping[str, Figure], measure: str) -> str:
    figure = found.get(measure)
    return (
        f"{figure.median:>9.2f}{figure.minimum:>8.2f}{figure.maximum:>8.2f}" if figure else f"{'-':>9}{'-':>8}{'-':>8}"
    )


def write_runs(path: Path, runs: Sequence[Run], figures: Sequence[Figure]) -> Path:
    """Write one row per run and, in a second file, one row per figure, each with the machine and the versions.

    Returns:
        The path of the figures, `<name>-figures.parquet`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.results.run import library_versions

    machine: dict[str, Any] = {
        "platform": platform.platform(), "num_cpus": os.cpu_count(), **library_versions()
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figures_path = path.with_name(f"{path.stem}-figures{path.suffix}")
    for target, rows in ((path, runs), (figures_path, figures)):
        pq.write_table(pa.Table.from_pylist([{**asdict(row), **machine} for row in rows]), target)
    return figures_path
