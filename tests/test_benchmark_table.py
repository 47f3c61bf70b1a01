from itertools import product

import pytest

from benchmarks.table import Run, compare_sizes, format_table, summarise

WALLS = {"evaluate": (1.0, 2.0, 4.0), "plain_loop": (2.0, 2.0, 2.0)}


def _run(name, index, wall_s, case="mnist", **others):
    return Run(case, name, index, wall_s, 3.0, 2**21, 2**20, **{"num_images": 100, **others})


def _runs():
    return [_run(name, index, wall_s) for name, walls in WALLS.items() for index, wall_s in enumerate(walls, 1)]


def _spread(figures, **wanted):
    (figure,) = [f for f in figures if all(getattr(f, key) == value for key, value in wanted.items())]
    return figure.median, figure.minimum, figure.maximum


def test_ratios_are_taken_within_rounds():
    figures = summarise(_runs(), {"mnist": "evaluate"})
    assert _spread(figures, command="evaluate", measure="wall_s") == (2, 1, 4)
    assert _spread(figures, command="evaluate", measure="wall_ratio") == (1, 1, 1)
    assert _spread(figures, command="plain_loop", measure="wall_ratio") == (1, 0.5, 2)
    assert _spread(figures, command="plain_loop", measure="images_per_s") == (50, 50, 50)


def test_a_phase_is_compared_by_what_it_handled():
    runs = [_run("a", 1, 9.0, phase_s=2.0, num_units=100), _run("b", 1, 9.0, phase_s=2.0, num_units=50)]
    figures = summarise(runs, {"mnist": "a"})
    assert _spread(figures, command="b", measure="phase_ratio") == (2, 2, 2)
    assert _spread(figures, command="b", measure="units_per_s") == (25, 25, 25)


def test_without_the_base_or_a_phase_there_is_no_ratio():
    figures = summarise([_run("plain_loop", 1, 2.0)], {"mnist": "evaluate"})
    assert not {figure.measure for figure in figures} & {"wall_ratio", "phase_ratio", "phase_s", "quarter_bytes"}


def test_sizes_are_compared_by_the_image():
    sizes = {"small": (100, 1000), "large": (400, 1600)}
    runs = [
        Run(case, "evaluate", index, num_images / 50 * (1 if case == "small" else 2), 1.0, 5000, own, num_images)
        for (case, (num_images, own)), index in product(sizes.items(), (1, 2))
    ]
    figures = compare_sizes(runs, "small", "large")
    assert _spread(figures, measure="wall_ratio") == pytest.approx((2, 2, 2))
    assert _spread(figures, measure="main_bytes_per_image") == (2, 2, 2)


def test_a_table_shows_each_command_on_a_line():
    lines = format_table(summarise(_runs(), {"mnist": "evaluate"}), {"mnist": "evaluate"}).splitlines()
    assert lines[0] == "mnist"
    assert lines[3].split()[:9] == ["evaluate", "2.00", "1.00", "4.00", "50", "-", "-", "3.0", "2"]
    assert lines[4].split()[9:13] == ["1", "1.00", "0.50", "2.00"]
