"""Two finished runs compared: what is matched, what is told, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import write_finished

from pipeline.errors import DataError, OptionError, OutputError
from pipeline.results.finished import open_run, read_predictions
from pipeline.results.two_runs import compare_runs, write_comparison
from pipeline.results.writing import Output, prepare

KEYS = [f"valid/{number}.png" for number in range(6)]
LABELS = [0, 0, 1, 1, 2, 2]
FIRST = {"knn_1": [0, 0, 1, 1, 2, 2], "sgd_linear": [0, 0, 0, 1, 2, 0]}
SECOND = {"knn_1": [0, 0, 1, 1, 2, 2], "sgd_linear": [0, 1, 1, 1, 0, 0]}
SCORES = [[0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0, 1, 0], [0.8, 0.1, 0.1], [1, 0, 0]]


@pytest.fixture
def write(tmp_path):
    def write(name, keys=KEYS, labels=LABELS, predictions=FIRST, scores=None, is_top=False, **fields):
        output = Output.at(str(tmp_path / name))
        prepare(output, overwrite=False, resume=False)
        return open_run(write_finished(output, keys, labels, predictions, scores, is_top, **fields))

    return write


def changed(pair):
    return [tuple(row.values())[2:] for row in pair.changes.to_pylist()]


def test_a_run_beside_itself_has_no_difference(write):
    comparison = compare_runs(write("a"), write("b"))
    for pair in comparison.pairs:
        total = pair.rows[0]
        assert (total.difference, total.p_value, pair.changes.num_rows) == (0.0, 1.0, 0)
        assert {row.p_value_holm for row in pair.rows[1:]} == {1.0}
    assert comparison.differences == []


@pytest.mark.parametrize("is_top", [False, True])
def test_changes_are_listed_with_what_is_wrong_most_certain_first(write, is_top):
    second = write("b", predictions=SECOND, scores={"sgd_linear": SCORES}, is_top=is_top)
    comparison = compare_runs(write("a"), second)
    [_, pair] = comparison.pairs
    assert (pair.rows[0].num_only_a, pair.rows[0].num_only_b) == (2, 1)
    assert changed(pair) == [
        ("right_to_wrong", "valid/4.png", "ä", "ä", "3", pytest.approx(0.7)),
        ("right_to_wrong", "valid/1.png", "3", "3", "7", pytest.approx(0.2)),
        ("wrong_to_right", "valid/2.png", "7", "3", "7", None),  # A has no scores
    ]


def test_changes_are_in_the_order_of_logits_that_are_far_apart(write):
    logits = 10 * np.array(SCORES)
    logits[1] *= 10
    [_, pair] = compare_runs(write("a"), write("b", predictions=SECOND, scores={"sgd_linear": logits})).pairs
    assert [(row[1], row[-1]) for row in changed(pair)[:2]] == [("valid/1.png", 1.0), ("valid/4.png", 1.0)]


def test_images_are_matched_by_their_keys_where_the_order_is_another_and_some_are_missing(write):
    order = [4, 2, 5, 0]
    moved = write(
        "b", [KEYS[row] for row in order] + ["valid/new.png"], [LABELS[row] for row in order] + [0],
        {name: [own[row] for row in order] + [1] for name, own in SECOND.items()},
        {"sgd_linear": [SCORES[row] for row in order] + [[0, 1, 0]]},
    )  # fmt: skip
    comparison = compare_runs(write("a"), moved)
    assert (comparison.num_images, comparison.num_only_in_a, comparison.num_only_in_b) == (4, 2, 1)
    assert changed(comparison.pairs[1]) == [
        ("right_to_wrong", "valid/4.png", "ä", "ä", "3", pytest.approx(0.7)),
        ("wrong_to_right", "valid/2.png", "7", "3", "7", None),
    ]


def test_classes_are_matched_by_their_names_in_predictions_and_scores(write):
    turned = {"dataset": {"root": "/data", "classes": ["ä", "7", "3"]}}
    mirrored = [row[::-1] for row in SCORES]
    comparison = compare_runs(write("a"), write("b", predictions=SECOND, scores={"sgd_linear": mirrored}, **turned))
    assert changed(comparison.pairs[1])[0] == ("right_to_wrong", "valid/4.png", "ä", "ä", "3", pytest.approx(0.7))


def test_by_default_each_is_compared_with_its_namesake_and_the_best_with_the_best(write):
    others = {"sgd_linear": LABELS, "knn_5": FIRST["sgd_linear"]}
    comparison = compare_runs(write("a"), write("b", predictions=others))
    pairs = [(pair.classifier_a, pair.classifier_b, pair.is_best) for pair in comparison.pairs]
    assert pairs == [("sgd_linear", "sgd_linear", False), ("knn_1", "sgd_linear", True)]


@pytest.mark.parametrize(
    ("asked", "pairs"),
    [(["knn_1"], [("knn_1", "knn_1")]),
     (["knn_1:sgd_linear", "knn_1"], [("knn_1", "sgd_linear"), ("knn_1", "knn_1")])],
)  # fmt: skip
def test_of_two_runs_some_classifiers_are_compared(write, asked, pairs):
    got = compare_runs(write("a"), write("b"), asked).pairs
    assert [(pair.classifier_a, pair.classifier_b) for pair in got] == pairs
    assert not any(pair.is_best for pair in got)


@pytest.mark.parametrize(
    ("asked", "pairs"),
    [(["knn_1", "sgd_linear"], ["knn_1 sgd_linear"]), (["sgd_linear:knn_1"], ["sgd_linear knn_1"]),
     (["sgd_linear", "l1", "knn_1"], ["sgd_linear l1", "sgd_linear knn_1", "l1 knn_1"])],
)  # fmt: skip
def test_classifiers_of_one_run_are_compared(write, asked, pairs):
    run = write("a", predictions={**FIRST, "l1": LABELS})
    got = compare_runs(run, run, asked).pairs
    assert [f"{pair.classifier_a} {pair.classifier_b}" for pair in got] == pairs


@pytest.mark.parametrize("asked", [[], ["knn_1"], ["knn_1", "sgd_linear:knn_1"]])
def test_of_one_run_two_classifiers_are_needed(write, asked):
    run = write("a")
    with pytest.raises(OptionError, match="--classifiers: expected two of one run"):
        compare_runs(run, run, asked)


@pytest.mark.parametrize("asked", ["knn_7", "knn_1:knn_7", "knn_7:knn_1"])
def test_an_unknown_classifier_is_refused_with_those_that_there_are(write, asked):
    with pytest.raises(OptionError, match="got knn_7; it has knn_1, sgd_linear"):
        compare_runs(write("a"), write("b"), [asked])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"keys": [f"other/{key}" for key in KEYS]}, "got none of its 6 keys; compare runs of one dataset"),
     ({"labels": [0, 0, 1, 1, 1, 1]}, r"got valid/4\.png as 7 in place of ä, and 1 more"),
     ({"dataset": {"classes": ["3", "7", "ä", "8"]}}, "expected the 3 classes of .*, got 4, and 8 is in one of them")],
)  # fmt: skip
def test_runs_of_other_datasets_are_refused(write, changes, message):
    with pytest.raises(DataError, match=message):
        compare_runs(write("a"), write("b", **changes))


def test_what_differs_in_options_and_facts_is_listed(write):
    options = {"epochs": 40, "out": "a", "valid_split": "valid", "classes": []}
    facts = {"versions": {"torch": "2.13.0", "ray": "2.60.0"}, "target": {"height": 28, "width": 28, "mode": "L"}}
    first = write("a", options=options, **facts)
    first = replace(first, run={**first.run, "scores": {"sha256": "12ab"}})
    second = write(
        "b", options={**options, "epochs": 5, "out": "b", "mode": "L"}, **{**facts, "versions": {"torch": "2.14.0"}},
        dataset={"root": "/elsewhere", "classes": ["3", "7", "ä"]},
    )  # fmt: skip
    assert compare_runs(first, second).differences == [
        ("--epochs", 40, 5),
        ("dataset.root", "/data", "/elsewhere"),
        ("scores.sha256", "12ab", None),
        ("versions.torch", "2.13.0", "2.14.0"),
        ("versions.ray", "2.60.0", None),
        ("--mode", None, "L"),
    ]


def test_tables_have_a_row_a_figure_and_a_row_a_change(write, tmp_path):
    comparison = compare_runs(write("a"), write("b", predictions=SECOND))
    for _ in range(2):  # the second time over the first
        write_comparison(Output.at(str(tmp_path / "out")), comparison)
    rows = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    assert [(row["classifier_a"], row["scope"], row["class"]) for row in rows] == [
        (name, scope, label) for name in FIRST
        for scope, label in (("all", None), ("class", "3"), ("class", "7"), ("class", "ä"))
    ]  # fmt: skip
    assert rows[4]["difference"] == pytest.approx(-1 / 6)
    assert pq.read_table(tmp_path / "out" / "changes.parquet").num_rows == 3


def test_a_comparison_is_not_written_among_other_files(write, tmp_path):
    comparison = compare_runs(write("a"), write("b"))
    with pytest.raises(OutputError, match="or one with a comparison, got"):
        write_comparison(Output.at(str(tmp_path / "a")), comparison)


def test_runs_are_read_from_any_store(any_output):
    run = open_run(write_finished(any_output, KEYS, LABELS, SECOND, {"sgd_linear": SCORES}))
    [pair] = compare_runs(run, run, ["knn_1", "sgd_linear"]).pairs
    assert pair.changes["certainty"].to_pylist() == pytest.approx([1.0, 0.7, 0.2])


def damage(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("run.json", None, "expected a finished run, got a folder without run.json; finish it by --resume"),
     ("run.json", b"{", "run.json: expected JSON, got .*; run it anew"),
     ("run.json", b"[]", "expected what a run writes, got none of dataset; run it anew"),
     ("run.json", json.dumps({"dataset": {}, "metrics": [], "num_valid": 1}).encode(), "got none of options"),
     ("predictions/part-00000.parquet", None, "expected 6 images, each once, got 3 with 3 keys"),
     ("predictions/part-00000.parquet", b"no Parquet", "part-00000.parquet: expected to read it, got")],
)  # fmt: skip
def test_what_is_no_whole_run_is_one_line(write, tmp_path, name, content, message):
    folder = Path(write("a").given)
    damage(folder, name, content)
    with pytest.raises(OutputError, match=message):
        read_predictions(open_run(str(folder)), ["3", "7", "ä"], ["knn_1"])


def test_images_that_occur_twice_are_refused(write):
    run = write("a", keys=[KEYS[0], *KEYS[:5]])
    with pytest.raises(OutputError, match="expected 6 images, each once, got 6 with 5 keys"):
        read_predictions(run, run.classes, [])


@pytest.mark.parametrize(("name", "what"), [("nowhere", "nothing there"), ("file", "a file")])
def test_what_is_no_folder_is_refused(tmp_path, name, what):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"expected the folder of a finished run, got {what}"):
        open_run(str(tmp_path / name))
