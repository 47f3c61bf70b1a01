import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.results.charts import BOTTOM, LEFT, RIGHT, TOP, diverging_png, grey_or_colour_png, level, line_chart


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_lines_lie_between_their_ticks():
    chart = line_chart([1, 2, 3], [("training", [3.0, 1.0, 0.5]), ("validation", [2.0, 1.5, 1.25])])
    points = [tuple(map(float, point.split(","))) for point in chart["lines"][0]["points"].split()]
    assert [x for x, _ in points] == [LEFT, (LEFT + RIGHT) / 2, RIGHT]
    labels = {label: y for y, label in chart["y_ticks"]}
    assert labels["0.5"] == BOTTOM
    assert labels["3.0"] == TOP
    assert points[0][1] == TOP
    assert chart["lines"][0]["last"] == points[-1]


def test_a_line_may_end_before_the_others_and_labels_be_chosen():
    chart = line_chart([0, 0.5, 2], [("loss", [2.0, 1.0, 2.0]), ("slope", [2.0, 1.0])], labels=(0, 1, 2))
    middle = LEFT + (RIGHT - LEFT) / 4
    assert chart["lines"][1]["last"][0] == middle
    assert chart["x_ticks"] == [(LEFT, "0"), ((LEFT + RIGHT) / 2, "1"), (RIGHT, "2")]


def test_ticks_of_two_and_a_half_are_written_whole():
    chart = line_chart([1, 2], [("training", [0.0, 12.0])])
    assert [label for _, label in chart["y_ticks"]] == ["0.0", "2.5", "5.0", "7.5", "10.0", "12.5"]


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1.0, 1.0 + 1e-9], [1e-300, 1e17], [-3.0, 5.0]])
def test_any_values_have_ticks(values):
    chart = line_chart(list(range(1, len(values) + 1)), [("training", values)])
    assert 2 <= len(chart["y_ticks"]) <= 8
    assert all(np.isfinite(y) for y, _ in chart["y_ticks"])


@pytest.mark.parametrize(("share", "step"), [(0, 0), (1e-9, 1), (0.1, 1), (0.11, 2), (1, 10)])
def test_only_nothing_is_unshaded(share, step):
    assert level(share) == step


def test_zero_is_in_the_middle_of_the_scale():
    pixels = np.asarray(opened(diverging_png(np.array([[-2.0, 0.0, 2.0]], np.float32), 2.0)))
    assert pixels.tolist() == [[[33, 102, 172], [247, 247, 247], [178, 60, 23]]]


def test_a_mean_image_is_drawn_as_it_is_and_a_large_one_by_its_blocks():
    image_HWC = np.linspace(0, 1, 48, dtype=np.float32).reshape(4, 4, 3)
    assert np.array_equal(np.asarray(opened(grey_or_colour_png(image_HWC))), np.rint(image_HWC * 255))
    large = opened(grey_or_colour_png(np.full((300, 200, 1), 0.5, np.float32)))
    assert large.size == (40, 60)
    assert set(np.asarray(large).ravel().tolist()) == {128}
