"""The command that compares finished runs of digits."""

import json
import os
import re
import shutil
import subprocess
import sys

import click.testing
import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import KEYS, ROOT, write_finished
from statsmodels.stats.contingency_tables import mcnemar

from jobs.compare import main
from pipeline.config import Config
from pipeline.driver import job
from pipeline.results.writing import Output, prepare


@pytest.fixture(scope="module")
def runs(local_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"a": {}, "small": {"size": "4"}}.items():
        job.evaluate(Config(out=str(folder / name), epochs=3, report=False, device="cpu", **options))
    shutil.copytree(folder / "a", folder / "again")
    return folder


@pytest.fixture
def finished(tmp_path):
    """A finished run of another dataset."""
    output = Output.at(str(tmp_path / "other"))
    prepare(output, overwrite=False, resume=False)
    return write_finished(output, KEYS[6:], [0, 0, 0, 1, 1, 1], {"knn_1": [0] * 6})


def invoke(*args):
    return click.testing.CliRunner().invoke(main, [str(arg) for arg in args])


def compare_json(*args):
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def is_right(folder, classifier):
    rows = pq.read_table(folder / "predictions").sort_by("key").to_pydict()
    return np.array(rows["class"]) == np.array(rows[f"{classifier}_prediction"])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("names", "classifier_a", "classifier_b"),
    [(("a", "small"), "nearest_mean_l1", "nearest_mean_l1"), (("a",), "knn_5", "sgd_linear"),
     (("a", "small"), "nearest_mean_rms", "knn_1")],
)  # fmt: skip
def test_figures_are_those_of_statsmodels_and_a_bootstrap(runs, names, classifier_a, classifier_b):
    folders = [runs / name for name in names]
    [pair] = compare_json(*folders, "--classifiers", f"{classifier_a}:{classifier_b}")["pairs"]
    a_N, b_N = is_right(folders[0], classifier_a), is_right(folders[-1], classifier_b)
    table = [[np.sum(a_N & b_N), np.sum(a_N & ~b_N)], [np.sum(~a_N & b_N), np.sum(~a_N & ~b_N)]]
    assert pair["all"]["p_value"] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
    assert pair["all"]["difference"] == pytest.approx(b_N.mean() - a_N.mean(), abs=1e-15)
    rows_DN = np.random.default_rng(0).integers(0, len(a_N), (10_000, len(a_N)))
    ends = np.quantile((b_N.astype(np.int8) - a_N.astype(np.int8))[rows_DN].mean(1), [0.025, 0.975])
    low, high = pair["all"]["difference_low"], pair["all"]["difference_high"]
    np.testing.assert_allclose([low, high], ends, atol=0.05 * (high - low))


@pytest.mark.ray
def test_two_runs_of_the_same_options_differ_in_nothing(runs):
    compared = compare_json(runs / "a", runs / "again")
    assert (compared["num_images"], compared["num_only_in_a"], compared["differences"]) == (899, 0, [])
    assert len(compared["pairs"]) == 6
    for pair in compared["pairs"]:
        assert (pair["all"]["difference"], pair["all"]["p_value"]) == (0.0, 1.0)
        assert pair["right_to_wrong"] == pair["wrong_to_right"] == []
    assert compared["a"]["results_sha256"] == compared["b"]["results_sha256"]


@pytest.mark.ray
def test_the_text_shows_pairs_classes_changes_and_what_differs(runs, tmp_path):
    result = invoke(runs / "a", runs / "small", "--out", tmp_path / "out")
    compared = compare_json(runs / "a", runs / "small")
    lines = result.stdout.splitlines()
    assert "899 validation images in both, 0 only in A, 0 only in B" in lines
    for pair in compared["pairs"]:
        difference = re.escape(f"{pair['all']['difference']:+.4f}")
        assert re.search(rf"^{pair['classifier_a']}.* {difference} ", result.stdout, re.M)
    assert "knn_1 (best) by class, p corrected for 10 classes by Holm's method" in lines
    assert (
        f"{len(compared['pairs'][3]['right_to_wrong']):,} images right in A and wrong in B, the 5 most certain" in lines
    )
    assert re.search(r"^--size +auto +4x4$", result.stdout, re.M)
    rows = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pylist()
    assert [row["p_value"] for row in rows if row["scope"] == "all"] == [
        pair["all"]["p_value"] for pair in compared["pairs"]
    ]
    changes = pq.read_table(tmp_path / "out" / "changes.parquet").to_pylist()
    assert len(changes) == sum(pair["all"]["num_only_a"] + pair["all"]["num_only_b"] for pair in compared["pairs"])


@pytest.mark.ray
def test_another_dataset_is_one_line_and_status_1(runs, finished):
    result = invoke(runs / "a", finished)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch("error: .*: expected the 10 classes of .*, got 3, and .*\n", result.stderr)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [([], 2, "Missing argument 'A'"), (["--no-such"], 2, "No such option"),
     (["RUN"], 2, "--classifiers: expected two of one run, got none"),
     (["RUN", "RUN", "--classifiers", "knn_3"], 2, "got knn_3; it has knn_1"),
     (["RUN", "/nowhere"], 1, "/nowhere: expected the folder of a finished run, got nothing there"),
     (["RUN", "RUN/predictions"], 1, "got a folder without run.json"),
     (["RUN", "s3:///x"], 1, "expected a URI that can be opened"),
     (["RUN", "RUN", "--out", "RUN"], 1, "expected a new or empty folder, or one with a comparison")],
)  # fmt: skip
def test_bad_input_is_one_line(finished, args, status, message):
    result = invoke(*(arg.replace("RUN", finished) for arg in args))
    assert (result.exit_code, result.stdout) == (status, "")
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", result.stderr)


def test_names_are_shown_in_any_encoding_and_pages_made_without_ray_or_torch(finished, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'jobs'); sys.argv = ['compare', *sys.argv[1:]]; from compare import main; "
        "main(standalone_mode=False); sys.exit(bool({'ray', 'torch', 'pandas'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, finished, finished, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True, text=True,
    )  # fmt: skip
    assert "only in B" in process.stdout
    assert process.stderr == ""
    assert (tmp_path / "out" / "compare.html").exists()
