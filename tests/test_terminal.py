import io
import re

import numpy as np
import pytest

from pipeline.results.figures import accuracies
from pipeline.results.progress import Progress, StatusLine, progress_line, progress_parts
from pipeline.results.summary import print_summary, summary
from pipeline.results.tables import metrics_table

TWO = """\
best: nearest_mean_l1 0.9514 (0.9412 to 0.9599)

classifier       accuracy     95 % interval  mean of classes  mean F1           right
nearest_mean_l1    0.9514  0.9412 to 0.9599           0.9511   0.9513  1,939 of 2,038

accuracy by class
class  images  nearest_mean_l1
3       1,010           0.9168
7       1,028           0.9854

images     14,435 listed: 12,396 to train on, 2,038 to validate on, 1 skipped (1 damaged; see skipped.parquet); 3
           resized; other files ignored: 1 .csv, 1 .txt
decoded    to 28x28 L, 12,345 a second
twins      no images with the same pixels; 0 validation images have a twin in training
seconds    4.7 (start 3.2, decode 1.2, train 0.2)
computed   on 2 x cpu
results    /somewhere/results
sha256     0123abc"""
TWELVE = """\
accuracy by class, the 5 worst and the 5 best of 12 for sgd_linear
class     images  sgd_linear
class 0      100      0.0000
class 2      100      0.0300
class 1      100      0.1000
class 3      100      0.3000
class 4      100      0.4000
...
class 7      100      0.7000
class 8      100      0.8000
class 9      100      0.9000
class 10     100      0.9500
class 11     100      1.0000
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
        "duplicates": {"num_exact_groups": 0, "num_exact_images": 0, "num_exact_twins": 0, "num_conflicts": 0},
        "neighbors": None,
        "images_per_s": 12_345.4,
        "options": {"cache": None, "report": False},
        "stopped_by": None,
        "last_epoch": None,
        "num_shards": 1_234,
        "num_shards_from_cache": 0,
        "actors": {"devices": ["cpu", "cpu"]},
        "out": "/somewhere/results",
        "results_sha256": "0123abc",
    }
    return {**run, **fields}


def test_the_top_5_are_shown_where_they_are_counted():
    names = [f"class {label}" for label in range(12)]
    counts_KK = confusion_of([50] * 12)
    rows = accuracies("majority_class", names, counts_KK) + accuracies("sgd_linear", names, counts_KK, 900)
    header, *lines = summary(run_with({}, metrics=metrics_table(rows).to_pylist())).splitlines()[2:5]
    assert re.split("  +", header)[3] == "top 5"
    assert [re.split("  +", line)[3] for line in lines] == ["-", "0.7500"]


def class_lines(shares):
    lines = summary(run_with({"sgd_linear": confusion_of(shares)})).splitlines()
    return lines[7 : lines.index("", 5)]


def on_terminal(run, monkeypatch, columns, encoding="utf-8"):
    """Show a run on a terminal of so many columns; return its lines without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    print_summary(run, stream)
    stream.seek(0)
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in stream.read().splitlines()]


def test_the_summary_of_two_classes():
    counts_KK = np.array([[926, 84], [15, 1013]])
    assert summary(run_with({"nearest_mean_l1": counts_KK}, ["3", "7"])) == TWO


def test_the_summary_says_how_many_images_have_twins():
    counts = {"num_exact_groups": 5, "num_exact_images": 1_012, "num_exact_twins": 3, "num_conflicts": 4}
    text = summary(run_with({"sgd_linear": confusion_of([50, 60])}, duplicates=counts))
    assert (
        "twins      1,012 images in 5 groups with the same pixels (duplicates.parquet); 4 of several classes "
        "(suspects.parquet);\n           3 validation images have a twin in training\n"
    ) in text


@pytest.mark.parametrize(
    ("num_twins", "of", "twins", "labels"),
    [
        (
            1,
            "valid",
            "1 validation image has a twin in training, 8 of them changed a little; accuracy without it: "
            "sgd_linear 0.5000",
            "7 validation images look more like another class",
        ),
        (0, "valid", "0 validation images have a twin in training", "7 validation images look more like another class"),
        (
            9,
            "all",
            "9 validation images have a twin in training, 8 of them changed a little; accuracy without them: "
            "sgd_linear 0.5000",
            "7 images look more like another class",
        ),
    ],
)
def test_the_summary_says_what_neighbors_tell(num_twins, of, twins, labels):
    found = {"num_twins": num_twins, "num_near_twins": 8, "of": of, "num_suspects": 7}
    neighbors = {**found, "accuracy_without_twins": {"sgd_linear": 0.5}}
    text = " ".join(summary(run_with({"sgd_linear": confusion_of([50, 60])}, neighbors=neighbors)).split())
    assert f"twins no images with the same pixels; {twins} labels {labels} (suspects.parquet) seconds" in text


def test_the_summary_counts_an_image_with_a_doubtful_label_once():
    found = {"num_twins": 0, "num_near_twins": 0, "of": "valid", "num_suspects": 7, "accuracy_without_twins": {}}
    run = run_with({"sgd_linear": confusion_of([50, 60])}, neighbors=found)
    run["duplicates"] = {**run["duplicates"], "num_conflicts": 2}
    text = " ".join(summary(run).split())
    assert "2 of several classes (suspects.parquet)" in text
    assert "labels 5 validation images look more like another class (suspects.parquet)" in text


def test_the_summary_of_twelve_classes_shows_the_five_worst_and_the_five_best():
    counts_KK = confusion_of([0, 10, 3, 30, 40, 50, 60, 70, 80, 90, 95, 100])
    assert TWELVE in summary(run_with({"sgd_linear": counts_KK}))


def test_the_summary_of_ten_classes_shows_all_in_their_order():
    lines = class_lines([50, 40, 30, 20, 10, 0, 60, 70, 80, 90])
    assert [line.split()[1] for line in lines] == list("0123456789")


@pytest.mark.parametrize("shares", [[50, None], [None, 50]])
def test_a_class_without_images_has_no_figure(shares):
    assert class_lines(shares)[shares.index(None)].split()[2:] == ["0", "-"]


@pytest.mark.parametrize("num_filled", [1, 2, 5, 10, 11])
def test_of_many_classes_those_with_images_are_shown_once_each(num_filled):
    lines = class_lines([*range(num_filled), *[None] * (12 - num_filled)])
    shown = {line for line in lines if line != "..."}
    assert len(shown) == min(num_filled, 10)
    assert (len(lines) - len(shown)) == (num_filled > 10)


def test_classifiers_are_compared_in_their_order():
    shares = {"majority_class": [100, 0], "nearest_mean_l1": [60, 80], "sgd_linear": [50, 60]}
    lines = summary(run_with({name: confusion_of(own) for name, own in shares.items()})).splitlines()
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["majority_class", "0.5000"], ["nearest_mean_l1", "0.7000"], ["sgd_linear", "0.5500"]
    ]  # fmt: skip
    assert lines[9].split()[2:] == ["100", "1.0000", "0.6000", "0.5000"]


@pytest.mark.parametrize("columns", [120, 80, 50, 30])
def test_a_terminal_shows_the_figures_of_the_log_as_far_as_they_fit(monkeypatch, columns):
    names = ("majority_class", "nearest_mean_l1", "nearest_mean_rms", "knn_1", "knn_5", "sgd_linear")
    run = run_with(dict.fromkeys(names, confusion_of([*range(0, 95, 5), 99])), [f"a long name {n}" for n in range(20)])
    lines = on_terminal({**run, "out": "/tmp/" + "x" * 90}, monkeypatch, columns)
    assert max(map(len, lines[:-2])) <= columns
    assert lines[-2] == f"results    /tmp/{'x' * 90}"
    figures = re.compile(r"\d\.\d{4}")
    assert set(figures.findall("".join(lines))) <= set(figures.findall(summary(run)))
    assert [line.split()[:2] for line in lines[2:14] if line.startswith(names)] == [[name, "0.4770"] for name in names]


def test_a_class_name_is_text_in_any_encoding(monkeypatch):
    run = run_with({"sgd_linear": confusion_of([50, 60])}, ["[red]类", ":dog:"])
    lines = on_terminal(run, monkeypatch, 80, "latin-1")
    assert any(line.startswith(r"[red]\u7c7b") for line in lines)
    assert any(line.startswith(":dog:") for line in lines)


def test_what_came_from_a_cache_is_told_where_there_is_one():
    run = run_with({"sgd_linear": confusion_of([50, 60])}, num_shards_from_cache=1_233)
    assert "shards" not in summary(run)
    text = summary({**run, "options": {"cache": "/somewhere", "report": False}})
    assert "decoded    to 28x28 L, 12,345 a second, 1,233 of 1,234 shards from the cache\n" in text


@pytest.mark.parametrize("name", ["a\nb", "t\tb", "\u202eevil", "\x1b[31mred", "\x00"])
def test_a_class_of_any_name_is_one_row(name):
    run = run_with({"sgd_linear": confusion_of([50, 60])}, classes=["dog", name])
    stream = io.StringIO()
    print_summary(run, stream)
    shown = f"{name!a}"[1:-1]
    for text in (summary(run), stream.getvalue()):
        assert re.search(rf"^ *{re.escape(shown)} +100 +0.6000", text, re.M)
        assert name not in text


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
        (Progress("score", 0, 8, 1.0), "scored 0 of 8 prediction files"),
        (Progress("score", 2, 8, 1.0), "scored 2 of 8 prediction files, 2.0 a second, 3 s left"),
        (Progress("duplicates", 0, 1, 1.0), "all images are scored, grouping those with the same pixels"),
    ],
)
def test_progress_is_one_line(progress, line):
    assert progress_line(progress) == line


def test_a_resumed_training_counts_its_own_epochs_alone():
    first, progress = Progress("train", 0, 100, 5.0, 21, 30), Progress("train", 0, 100, 15.0, 26, 30)
    assert progress_line(progress, first) == "epoch 26 of 30, step 0 of 100, 50 a second, 10 s left"
    assert progress.share == 2500 / 3000


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (120, "━" * 15 + "╺" + "━" * 14 + " epoch 2 of 4, step 1 of 2, loss 0.1235, 3.0 a second, 2 s left"),
        (80, "━" * 5 + "╺" + "━" * 4 + " epoch 2 of 4, step 1 of 2, loss 0.1235, 3.0 a second, 2 s left"),
        (50, "epoch 2 of 4, step 1 of 2, loss 0.1235, 2 s left"),
        (30, "epoch 2 of 4, 2 s left"),
        (16, "epoch 2 of 4"),
        (8, "epoch …"),
    ],
)
def test_a_status_line_is_never_wider_than_the_terminal(monkeypatch, columns, expected):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    parts = progress_parts(Progress("train", 1, 2, 1.0, 2, 4, 0.12345), Progress("train", 0, 2, 0.0, 1, 4))
    StatusLine(stream).draw(parts, 0.5)
    assert "\n" not in stream.getvalue()
    assert re.sub(r"\x1b\[[\d;]*[mK]|\r", "", stream.getvalue()) == expected


def test_a_status_line_is_erased_once(monkeypatch):
    stream = io.StringIO()
    line = StatusLine(stream)
    line.clear()
    assert stream.getvalue() == ""
    line.draw(["starting"])
    line.clear()
    line.clear()
    assert stream.getvalue() == "\r\x1b[2Kstarting\r\x1b[2K"


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
def test_durations_have_at_most_two_units(seconds, left):
    # Half of the images are done, so that as much time is left as was taken.
    assert progress_line(Progress("decode", 500, 1000, seconds)).endswith(f", {left} left")
