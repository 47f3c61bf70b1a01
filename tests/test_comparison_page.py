"""The page of a comparison: what is on it equals the tables, and it is made whatever became of the images."""

import pyarrow.parquet as pq
import pytest
from builders import write_finished
from pages import check_page, chromium, figure, read_tables, signed, without_breaks
from runs import make_images

from pipeline.results.comparison_page import write_page
from pipeline.results.finished import open_run
from pipeline.results.texts import chance
from pipeline.results.two_runs import compare_runs, write_comparison
from pipeline.results.writing import Output, prepare

LABELS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
FIRST = {"knn_1": [0, 0, 0, 1, 1, 0, 2, 2, 2], "sgd_linear": [0, 0, 1, 1, 1, 1, 2, 0, 0]}
SECOND = {"knn_1": [0, 0, 0, 1, 1, 0, 2, 2, 2], "sgd_linear": [0, 1, 1, 1, 0, 1, 2, 2, 0]}
NAMES = ("<script>alert(1)<script>", "a\"b'c&", "\u202egpj.exe")


@pytest.fixture
def compare(tmp_path):
    """Compare two runs of three classes, or one with itself, and write the page; return its folder and text."""

    def make(classes=("3", "7", "ä"), asked=(), has_images=True):
        if has_images:
            make_images(tmp_path, classes, (150, 200, 3))
        keys = [f"valid/{classes[label]}/{row % 3}.png" for row, label in enumerate(LABELS)]
        runs = []
        for name, predictions in [("a", FIRST), ("b", SECOND)]:
            output = Output.at(str(tmp_path / name))
            prepare(output, overwrite=False, resume=False)
            scores = {"sgd_linear": [[0.5 + (label == own) * row / 10 for own in range(3)]
                                     for row, label in enumerate(predictions["sgd_linear"])]}  # fmt: skip
            fields = {"dataset": {"root": str(tmp_path / "data"), "classes": classes}, "options": {"seed": len(runs)}}
            runs.append(open_run(write_finished(output, keys, LABELS, predictions, scores, classes=classes, **fields)))
        comparison = compare_runs(runs[0], runs[0] if asked else runs[1], asked)
        output = Output.at(str(tmp_path / "out"))
        write_comparison(output, comparison)
        write_page(output, comparison)
        return tmp_path / "out", without_breaks((tmp_path / "out" / "compare.html").read_text())

    return make


def test_every_figure_is_that_of_the_tables(compare):
    folder, page = compare()
    tables, text = read_tables(page)
    rows = pq.read_table(folder / "comparison.parquet").to_pylist()

    def interval(row):
        return f"{signed(row['difference_low'])} to {signed(row['difference_high'])}"

    [pairs] = (shown[1:] for place, shown in tables if place == "pairs")
    totals = [row for row in rows if row["scope"] == "all"]
    assert [[*own[2:], own[0].removesuffix(" (best)")] for own in pairs] == [
        [signed(row["difference"]), interval(row), figure(row["accuracy_a"]), figure(row["accuracy_b"]),
         str(row["num_only_a"]), str(row["num_only_b"]), chance(row["p_value"]), row["classifier_a"]]
        for row in totals
    ]  # fmt: skip
    by_class = [own for place, shown in tables if place == "classes" for own in shown[1:]]
    assert by_class == [
        [row["class"], str(row["num_images"]), figure(row["accuracy_a"]), figure(row["accuracy_b"]),
         signed(row["difference"]), interval(row), str(row["num_only_a"]), str(row["num_only_b"]),
         chance(row["p_value_holm"])]
        for row in rows if row["scope"] == "class"
    ]  # fmt: skip
    changes = pq.read_table(folder / "changes.parquet").to_pylist()
    assert [row["change"] for row in changes] == ["right_to_wrong"] * 2 + ["wrong_to_right"]
    for row in changes:
        said = f"A says {row['prediction_a']}, B says {row['prediction_b']}; certainty {figure(row['certainty'])}"
        assert f"{row['class']} {said} {row['key']}" in text
    assert "2 images right in A and wrong in B" in text
    assert [shown[1:] for place, shown in tables if place == "options"] == [[["--seed", "0", "1"]]]
    best = max(totals, key=lambda row: row["accuracy_a"])
    assert f"B less A: {best['classifier_a']} (best) {signed(best['difference'])}" in text
    assert page.count("data:image/") == len(changes)
    assert "By knn_1, both get the same images right. By the other pair: no difference can be told from chance" in text


def test_hostile_names_are_text_and_have_their_pictures(compare):
    _, page = compare(NAMES)
    assert "<script>alert" not in page
    assert "\u202e" not in page
    assert r"\u202egpj.exe" in page
    assert "no picture" not in page


def test_without_the_images_the_page_names_them(compare):
    _, page = compare(has_images=False)
    _, text = read_tables(page)
    assert text.count("no picture unreadable") == 3
    assert "None of the images on this page has a picture: unreadable" in text
    assert "valid/7/1.png" in text


def test_two_classifiers_of_one_run_have_a_page(compare):
    _, text = read_tables(compare(asked=("knn_1", "sgd_linear"))[1])
    assert "knn_1:sgd_linear" in text
    assert "Both classifiers are of one run" in text


@pytest.mark.browser
def test_the_page_opens(compare, tmp_path):
    folder, _ = compare()
    with chromium() as browser:
        check_page(
            browser, folder / "compare.html", ["headline", "pairs", "classes", "changes", "options"], 3, tmp_path
        )
