"""What a caller in Python gets."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from builders import ROOT

import pipeline
from pipeline.results.figures import accuracies
from pipeline.results.notebook import Run, progress
from pipeline.results.progress import Progress
from pipeline.results.tables import metrics_table


def make_run(out="/out"):
    rows = metrics_table(accuracies("sgd_linear", ["3", "7"], np.array([[926, 84], [15, 1013]]))).to_pylist()
    return Run(metrics=rows, num_valid=2038, num_train=12396, dataset={"root": "/data"}, out=out)


def test_a_run_is_a_dictionary_that_json_takes():
    assert json.loads(json.dumps(make_run())) == make_run()
    assert make_run()["num_valid"] == 2038


def test_a_notebook_shows_the_table_of_classifiers():
    shown = make_run()._repr_html_()
    assert "<caption>2,038 validation images of /data, 12,396 to train on; results in /out</caption>" in shown
    assert "<tr><td>sgd_linear</td><td>0.9514</td><td>0.9412 to 0.9599</td>" in shown
    assert shown.count("<th>") == shown.count("<td>")


def test_names_are_no_html():
    assert "&lt;script&gt;" in (shown := make_run("<script>")._repr_html_())
    assert "<script>" not in shown


def test_progress_is_a_line_a_phase_whose_last_state_stays():
    stream = io.StringIO()
    show = progress(stream)
    for done in (0, 500, 1000, 1000):
        show(Progress("decode", done, 1000, done / 500))
    for _ in range(2):
        show(Progress("means", 0, 1, 0.0))
    lines = stream.getvalue().split("\n")
    assert [line.split("\r")[-1].rstrip() for line in lines] == [
        "decoded 1,000 of 1,000 images, 500 a second, 0 s left",
        "all images are decoded, computing the class means",
        "",
    ]


def test_a_shorter_line_covers_a_longer_one(monkeypatch):
    monkeypatch.setattr("pipeline.results.notebook._LINE_SECONDS", 0.0)
    stream = io.StringIO()
    show = progress(stream)
    show(Progress("train", 1500, 9700, 1.0, 2, 30, 0.123456))
    show(Progress("train", 1600, 9700, 1.0, 2, 30))
    _, longer, shorter = stream.getvalue().split("\r")
    assert len(shorter) == len(longer)


def test_the_package_imports_only_what_is_asked_for():
    code = (
        "import sys, pipeline; assert not {'ray', 'pyarrow', 'numpy', 'torch'} & set(sys.modules); "
        "from pipeline import Config; assert 'ray' not in sys.modules; from pipeline import evaluate, progress; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", pipeline.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pipeline, name)


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'train'"):
        _ = pipeline.train
