import time
from importlib.metadata import version

import numpy as np
import pytest

from pipeline.driver.state import Clock
from pipeline.results.figures import accuracies
from pipeline.results.tables import metrics_table
from pipeline.results.terminal import Progress, library_versions, progress_line, summary

TWO = """\
nearest_mean_l1
  3                0.9168  (0.8982 to 0.9323)  926 of 1,010
  7                0.9854  (0.9761 to 0.9911)  1,013 of 1,028
  all              0.9514  (0.9412 to 0.9599)  1,939 of 2,038
  mean of classes  0.9511

images     14,435 listed: 12,396 to train on, 2,038 to validate on, 1 skipped (1 damaged; see skipped.parquet); 3 resized; other files ignored: 2
decoded    to 28x28 L, 12,345 a second
seconds    4.7 (start 3.2, decode 1.2, train 0.2)
computed   on 2 x cpu
results    /somewhere/results
sha256     0123abc"""  # noqa: E501 - as it is printed
TWELVE = """\
sgd_linear
  class 0          0.0000  (0.0000 to 0.0370)  0 of 100
  class 2          0.0300  (0.0103 to 0.0845)  3 of 100
  class 1          0.1000  (0.0552 to 0.1744)  10 of 100
  class 3          0.3000  (0.2189 to 0.3958)  30 of 100
  class 4          0.4000  (0.3094 to 0.4980)  40 of 100
  ... 2 classes between
  class 7          0.7000  (0.6042 to 0.7811)  70 of 100
  class 8          0.8000  (0.7112 to 0.8666)  80 of 100
  class 9          0.9000  (0.8256 to 0.9448)  90 of 100
  class 10         0.9500  (0.8882 to 0.9785)  95 of 100
  class 11         1.0000  (0.9630 to 1.0000)  100 of 100
  all              0.5233  (0.4950 to 0.5515)  628 of 1,200
  mean of classes  0.5233
"""


def confusion_of(shares):
    """Counts of 100 images a class, so many of them right; None stands for a class without images."""
    counts_KK = np.zeros((len(shares), len(shares)), np.int64)
    for label, share in enumerate(shares):
        if share is not None:
            counts_KK[label, label] = share
            counts_KK[label, (label + 1) % len(shares)] = 100 - share
    return counts_KK


def run_with(confusions, classes=None, **fields):
    rows = []
    for classifier, counts_KK in confusions.items():
        names = classes or [f"class {label}" for label in range(len(counts_KK))]
        rows += metrics_table(accuracies(classifier, names, counts_KK)).to_pylist()
    run = {
        "metrics": rows,
        "target": {"height": 28, "width": 28, "mode": "L"},
        "seconds": {"start": 3.21, "decode": 1.24, "train": 0.2, "total": 4.66},
        "dataset": {"num_ignored_files": {".csv": 1, ".txt": 1}},
        "num_listed": 14_435,
        "num_train": 12_396,
        "num_valid": 2_038,
        "num_skipped": 1,
        "num_skipped_by_reason": {"damaged": 1},
        "num_resized": 3,
        "images_per_s": 12_345.4,
        "options": {"cache": None},
        "num_shards": 1_234,
        "num_shards_from_cache": 0,
        "actors": {"devices": ["cpu", "cpu"]},
        "out": "/somewhere/results",
        "results_sha256": "0123abc",
    }
    return {**run, **fields}


def class_lines(shares):
    lines = summary(run_with({"sgd_linear": confusion_of(shares)})).splitlines()
    return lines[1 : lines.index("") - 2]


def test_the_summary_of_two_classes():
    counts_KK = np.array([[926, 84], [15, 1013]])
    assert summary(run_with({"nearest_mean_l1": counts_KK}, ["3", "7"])) == TWO


def test_the_summary_of_twelve_classes_shows_the_five_worst_and_the_five_best():
    counts_KK = confusion_of([0, 10, 3, 30, 40, 50, 60, 70, 80, 90, 95, 100])
    assert summary(run_with({"sgd_linear": counts_KK})).startswith(TWELVE)


def test_the_summary_of_ten_classes_shows_all_in_their_order():
    lines = class_lines([50, 40, 30, 20, 10, 0, 60, 70, 80, 90])
    assert [line.split()[1] for line in lines] == list("0123456789")


def test_eleven_classes_leave_one_class_between():
    assert class_lines(range(11))[5] == "  ... 1 class between"


@pytest.mark.parametrize("shares", [[50, None], [None, 50], [None] * 9 + [50]])
def test_a_class_without_images_says_so(shares):
    name = f"class {shares.index(None)}"
    assert f"  {name:<15}  no images" in class_lines(shares)


@pytest.mark.parametrize("num_filled", [1, 2, 4, 5, 6, 9, 10])
def test_of_many_classes_those_with_images_are_shown_once_each(num_filled):
    lines = class_lines([*range(num_filled), *[None] * (12 - num_filled)])
    shown = [line for line in lines if " of 100" in line]
    assert len(shown) == len(set(shown)) == num_filled
    assert sum("..." in line for line in lines) <= 1


def test_classifiers_stand_in_their_order_apart_by_a_line():
    confusions = {name: confusion_of([50, 60]) for name in ("nearest_mean_rms", "nearest_mean_l1", "sgd_linear")}
    lines = summary(run_with(confusions)).splitlines()
    assert [line for line in lines if line.startswith(("nearest", "sgd"))] == list(confusions)
    assert [place for place, line in enumerate(lines) if not line] == [5, 11, 17]


def test_columns_fit_the_longest_name():
    first, second, *_ = summary(run_with({"sgd_linear": confusion_of([50, 60])}, ["a", "b" * 40])).splitlines()[1:]
    assert first.index("0.5000") == second.index("0.6000") == 44


def test_what_came_from_a_cache_is_told_where_there_is_one():
    run = run_with({"sgd_linear": confusion_of([50, 60])}, num_shards_from_cache=1_233)
    assert "shards" not in summary(run)
    text = summary({**run, "options": {"cache": "/somewhere"}})
    assert "decoded    to 28x28 L, 12,345 a second, 1,233 of 1,234 shards from the cache\n" in text


def test_devices_are_counted_by_name():
    run = run_with({"sgd_linear": confusion_of([50, 60])}, actors={"devices": ["A 100", "H 200", "A 100"]})
    assert "computed   on 2 x A 100, 1 x H 200\n" in summary(run)


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress("start", 0, 1, 0.0), "starting Ray and listing the images"),
        (Progress("times", 2000, 5000, 1.0), "looked up 2,000 of 5,000 files for the cache"),
        (Progress("decode", 0, 5000, 0.0), "starting to decode 5,000 images"),
        (Progress("decode", 0, 5000, 9.0), "starting to decode 5,000 images"),
        (Progress("decode", 2000, 5000, 1.0), "decoded 2,000 of 5,000 images, 2,000 a second, 2 s left"),
        (Progress("decode", 5000, 5000, 2.0), "decoded 5,000 of 5,000 images, 2,500 a second, 0 s left"),
        (Progress("means", 0, 8, 0.0), "all images are decoded, computing the class means"),
        (Progress("train", 0, 97, 1.0, epoch=1, num_epochs=3), "epoch 1 of 3, step 0 of 97"),
        (Progress("train", 1500, 9700, 1.0, 2, 30, 0.123456), "epoch 2 of 30, step 1,500 of 9,700, loss 0.1235"),
        (Progress("train", 9, 97, 1.0, 2, 30, 0.0), "epoch 2 of 30, step 9 of 97, loss 0.0000"),
        (Progress("score", 1, 8, 1.0), "scored 1 of 8 prediction files"),
    ],
)
def test_progress_is_one_line(progress, line):
    assert progress_line(progress) == line


@pytest.mark.parametrize(
    ("seconds", "left"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7260, "2 h 01 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, left):
    # Half of the images are done, so that as much time is left as was taken.
    assert progress_line(Progress("decode", 500, 1000, seconds)).endswith(f", {left} left")


def test_a_clock_adds_up_its_phases():
    clock = Clock()
    for phase in ("decode", "train", "decode", "write"):
        time.sleep(0.02)
        assert clock.since_entered() >= 0.02
        clock.enter(phase)
    seconds = clock.read()
    assert list(seconds) == ["start", "decode", "train", "write", "total"]
    assert seconds["decode"] >= 0.04
    assert min(seconds["start"], seconds["train"]) >= 0.02
    assert sum(seconds.values()) - seconds["total"] == pytest.approx(seconds["total"], abs=1e-3)


def test_a_clock_that_is_read_goes_on():
    clock = Clock()
    first = clock.read()
    time.sleep(0.01)
    second = clock.read()
    assert second["start"] >= first["start"] + 0.01
    assert clock.began.endswith("+00:00")


def test_versions_are_those_installed():
    versions = library_versions()
    assert list(versions) == ["python", "torch", "ray", "pillow", "pyarrow"]
    assert versions["pyarrow"] == version("pyarrow")
