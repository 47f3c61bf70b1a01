"""A job with predictions made elsewhere: figures are scikit-learn's, and what does not match is told before work."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from builders import ROOT, pack_archives, write_images
from sklearn.metrics import accuracy_score, classification_report

from pipeline import cuts
from pipeline.config import Config
from pipeline.data import score_files
from pipeline.driver import job, scores, train
from pipeline.errors import DataError, OutputError
from pipeline.results.finished import open_run
from pipeline.results.two_runs import compare_runs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

CLASSES = ("2", "10", "ä")
FORMS = ("folder", "webdataset", "parquet")


def evaluate(data, out, file=None, on_progress=lambda progress: None, **options):
    given = {
        "epochs": 0,
        "neighbors": 0,
        "report": False,
        "scores_file": file and str(file),
        "device": "cpu",
        **options,
    }
    return job.evaluate(Config(data=str(data), out=str(out), **given), on_progress)


def read(out):
    return pq.read_table(out / "predictions")


def accuracy(run):
    [row] = [row for row in run["metrics"] if (row["classifier"], row["scope"]) == ("scores", "all")]
    return row


@pytest.fixture(scope="module")
def forms(small_dataset, tmp_path_factory):
    """The same images as a folder and in archives, each with the keys and classes of all that are validated on."""
    names = [name for name in CLASSES for _ in range(12)]
    keys = {
        "folder": [f"valid/{name}/{number}.png" for name in CLASSES for number in sorted(map(str, range(12)))],
        "webdataset": [f"valid-{row // 18}.tar/{row % 18}.png" for row in range(36)],
        "parquet": [f"valid-{row // 18}.parquet/{row % 18}" for row in range(36)],
    }
    found = {}
    for form in FORMS:
        data = small_dataset if form == "folder" else tmp_path_factory.mktemp("data")
        if form != "folder":
            pack_archives(small_dataset, data, form)
        found[form] = data, pa.table({"key": keys[form], "class": names})
    return found


def write(path, table):
    """Write a table in the form that the file's name says."""
    (pq.write_table if path.suffix == ".parquet" else pa.csv.write_csv)(table, path)
    return path


def shuffled(table, seed=0):
    return table.take(pa.array(np.random.default_rng(seed).permutation(len(table))))


def with_scores(keys, names=CLASSES, seed=0):
    """Give every key a score for each name, many of them equal."""
    values = np.random.default_rng(seed).integers(-3, 3, (len(names), len(keys))).astype(np.float32) / 4
    return shuffled(pa.table({"key": keys, **dict(zip(names, values, strict=True))}), seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Recall is ill-defined")  # of a class that the dataset lacks
def test_the_figures_of_class_columns_are_those_of_scikit_learn(forms, tmp_path, form):
    data, truth = forms[form]
    table = with_scores(truth["key"].to_pylist(), ("ä", "tench", "2", "10"))
    name = "p.parquet" if form == "parquet" else "p.csv"
    run = evaluate(data, tmp_path / "out", write(tmp_path / name, table))
    if form == "folder":
        other = evaluate(data, tmp_path / "other", write(tmp_path / "p.parquet", shuffled(table, 1)), actors=2)
        assert other["results_sha256"] == run["results_sha256"]
    ordered = [*CLASSES, "tench"]  # a tie goes to the first class of the dataset
    answers = np.array(ordered)[np.stack([table[name].to_numpy() for name in ordered], 1).argmax(1)]
    predicted = dict(zip(table["key"].to_pylist(), answers.tolist(), strict=True))
    classes, answers = truth["class"].to_pylist(), [predicted[key] for key in truth["key"].to_pylist()]
    assert accuracy(run)["accuracy"] == accuracy_score(classes, answers)
    expected = classification_report(classes, answers, labels=CLASSES, output_dict=True, zero_division=0)
    for row in run["metrics"]:
        if row["classifier"] == "scores" and row["scope"] != "all":
            figures = expected[row["class"] or "macro avg"]
            assert [row["precision"], row["accuracy"], row["f1"]] == pytest.approx(
                list(figures.values())[:3], abs=1e-12
            )
    got = read(tmp_path / "out")
    assert got["key"].to_pylist() == truth["key"].to_pylist()
    assert got["scores_prediction"].to_pylist() == [name if name in CLASSES else None for name in answers]
    rows = {row["key"]: [row[name] for name in CLASSES] for row in table.to_pylist()}
    assert got["scores_scores"].to_pylist() == [rows[key] for key in truth["key"].to_pylist()]
    pairs = list(zip(classes, got["scores_prediction"].to_pylist(), strict=True))
    assert {
        (row["true_class"], row["predicted_class"]): row["num_images"]
        for row in pq.read_table(tmp_path / "out" / "confusion.parquet").to_pylist()
        if row["classifier"] == "scores"
    } == {pair: pairs.count(pair) for pair in pairs}
    sha256 = subprocess.run(["sha256sum", tmp_path / name], capture_output=True, check=True, text=True).stdout[:64]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["scores"] == {
        "kind": "scores", "size_bytes": (tmp_path / name).stat().st_size, "sha256": sha256, "num_rows": 36,
        "classes_without_scores": [], "other_classes": ["tench"], "num_other_predicted": answers.count("tench"),
    }  # fmt: skip


def test_predictions_alone_are_counted_as_they_are_and_a_skipped_image_may_have_a_row(tmp_path, caplog):
    random = np.random.default_rng(0)
    data = write_images(
        tmp_path / "data", {"train": 3, "valid": 4}, ("a", "b"), lambda _: random.integers(0, 200, (4, 4), np.uint8)
    )
    (data / "valid" / "a" / "1.png").write_bytes(b"no image")
    table = pa.table({"key": [f"valid/{name}/{number}.png" for name in "ab" for number in range(4)],
                      "prediction": ["b", "a", "tench", "a", "b", "a", "tench", "b"]})  # fmt: skip
    run = evaluate(data, tmp_path / "out", write(tmp_path / "p.csv", shuffled(table)))
    rows = [row for row in table.to_pylist() if "a/1" not in row["key"]]
    got = read(tmp_path / "out")
    assert got["key"].to_pylist() == [row["key"] for row in rows]
    answers = [row["prediction"] for row in rows]
    assert got["scores_prediction"].to_pylist() == [name if name in "ab" else None for name in answers]
    assert accuracy(run)["accuracy"] == accuracy_score(list("aaabbbb"), answers)
    assert "scores_scores" not in got.column_names
    assert "got others in 2 of 8 rows, which count as wrong: tench" in caplog.text
    assert (run["scores"]["other_classes"], run["scores"]["num_rows"], run["num_skipped"]) == (["tench"], 8, 1)


def test_buckets_pieces_and_actors_do_not_change_a_bit(forms, tmp_path, monkeypatch):
    data, truth = forms["webdataset"]
    file = write(tmp_path / "p.csv", with_scores(truth["key"].to_pylist()))
    monkeypatch.setattr(cuts, "_MIN_PART_IMAGES", 4)
    runs = [evaluate(data, tmp_path / "1", file, actors=1, scores="top")]
    monkeypatch.setattr(scores, "_BUCKET_BYTES", 256)
    monkeypatch.setattr(scores, "_BLOCK_IMAGES", 10)
    monkeypatch.setattr(score_files, "PIECE_BYTES", 100)
    runs.append(evaluate(data, tmp_path / "2", file, actors=4, scores="top", shard_images=3))
    assert runs[0]["results_sha256"] == runs[1]["results_sha256"]
    assert len(list((tmp_path / "2" / "predictions").iterdir())) == 8
    for row in read(tmp_path / "2").to_pylist():
        assert row["scores_top_classes"][0] == row["scores_prediction"]
        assert row["scores_class_score"] == row["scores_top_scores"][row["scores_top_classes"].index(row["class"])]


def test_a_class_without_a_column_is_named_and_never_right_and_the_page_says_so(forms, tmp_path, caplog):
    data, truth = forms["folder"]
    file = write(tmp_path / "p.parquet", with_scores(truth["key"].to_pylist(), ("2", "10", "tench")))
    run = evaluate(data, tmp_path / "a", file, report=True)
    assert "got none for 1, which are never predicted: ä" in caplog.text
    assert run["options"]["report"] is True  # it could be made
    assert run["scores"]["classes_without_scores"] == ["ä"]
    got = read(tmp_path / "a").to_pylist()
    assert {row["scores_scores"][2] for row in got} == {-np.inf}
    assert not any(row["scores_prediction"] == "ä" for row in got)
    assert "(another class)" in (tmp_path / "a" / "report.html").read_text()
    evaluate(data, tmp_path / "b", write(tmp_path / "q.csv", with_scores(truth["key"].to_pylist(), CLASSES, seed=1)))
    pairs = compare_runs(open_run(str(tmp_path / "a")), open_run(str(tmp_path / "b"))).pairs
    [pair] = [pair for pair in pairs if pair.classifier_a == pair.classifier_b == "scores"]
    right = [[row["class"] == row["scores_prediction"] for row in read(tmp_path / out).to_pylist()] for out in "ab"]
    assert (pair.rows[0].num_correct_a, pair.rows[0].num_correct_b) == (sum(right[0]), sum(right[1]))
    changes = pair.changes.to_pylist()
    assert any(row["prediction_a"] is None and row["certainty"] is None for row in changes)


WRONG = {
    "a row too few": (lambda rows: rows[1:], r"each of 36 validation images, got 1 without a row \(v"),
    "a row twice": (lambda rows: [*rows, rows[3]], r"got 1 with several \(valid/2/"),
    "another key": (lambda rows: [*rows, ("train/2/1.png", "2")], r"1 row of another key \(train/2/1.png\); keys are"),
    "none of the keys": (
        lambda rows: [(f"./{key}", name) for key, name in rows],
        r"got 36 without .*, 36 rows of other",
    ),
    "a ragged row": (lambda rows: [*rows, ("x",)], r"rows of 2 columns in UTF-8, got .*: Expected 2 columns, got 1"),
    "no class": (lambda rows: [*rows[:5], (rows[5][0], ""), *rows[6:]], r"expected a class, got none for key valid/"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_match_is_one_line_before_an_image_is_decoded(forms, tmp_path, name):
    data, truth = forms["folder"]
    change, message = WRONG[name]
    rows = change(list(zip(truth["key"].to_pylist(), truth["class"].to_pylist(), strict=True)))
    (tmp_path / "p.csv").write_text("key,prediction\n" + "".join(",".join(row) + "\n" for row in rows))
    phases = set()
    with pytest.raises(DataError, match=rf"\A--scores [^\n]*p.csv: [^\n]*{message}[^\n]*\Z"):
        evaluate(data, tmp_path / "out", tmp_path / "p.csv", lambda progress: phases.add(progress.phase))
    assert phases <= {"start", "scores"}
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_resuming_with_other_scores_is_refused(forms, tmp_path, monkeypatch):
    data, truth = forms["folder"]
    monkeypatch.setattr(train, "_CHECKPOINT_SECONDS", 0.0)
    first, other = (
        write(tmp_path / f"{seed}.csv", with_scores(truth["key"].to_pylist(), seed=seed)) for seed in range(2)
    )

    def interrupt(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(data, tmp_path / "out", first, interrupt, epochs=3)
    for file in (other, None):
        with pytest.raises(OutputError, match=r"--resume: expected the --scores, with which .* was begun, got others"):
            evaluate(data, tmp_path / "out", file, epochs=3, resume=True)


def test_a_broken_file_ends_the_command_with_1_and_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "p.csv").write_text("name,prediction\na,3\n")
    command = [sys.executable, ROOT / "jobs" / "evaluate.py", "--scores", "top", "--scores", "p.csv", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: --scores p.csv: expected a column key, got name, prediction; name the images' column so\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
