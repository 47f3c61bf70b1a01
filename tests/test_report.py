"""The page: what is on it equals the tables, it opens anywhere, and it is made whatever became of the images."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import ROOT, command, encode, pack_tar
from pages import check_page, chromium, figure, open_page, read_tables, without_breaks
from PIL import Image
from runs import CLASSIFIERS, NUM_VALID, make_images, make_run
from s3 import CREDENTIALS, client, s3_server

from pipeline.config import Config
from pipeline.driver import job, report
from pipeline.driver.report_pieces import by_processes
from pipeline.errors import ActorLostError, DataError, OptionError, OutputError
from pipeline.results.finished import open_run, read_rows
from pipeline.results.pages import breakable, path, visible
from pipeline.results.sections import headline
from pipeline.results.writing import Output
from pipeline.target import Target

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

SECTIONS = [
    "headline", "accuracies", "confusion", "mistakes", "doubtful", "duplicates", "means", "numbers", "training",
    "skipped", "time", "options",
]  # fmt: skip
NAMES = ("<script>alert(1)<script>", "a\"b'c&", "\u202egpj.exe", "\x07bell")


def page_of(out):
    return without_breaks((out / "report.html").read_text())


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    make_images(folder, ("2", "10", "ä"))
    out = make_run(folder, ("2", "10", "ä"), Target(4, 5, "RGB"))
    report.remake(str(out))
    return out


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "out"
    job.evaluate(Config(out=str(out), device="cpu"))
    return out


def test_the_figures_of_classifiers_and_classes_are_those_of_the_tables(three_classes):
    tables, text = read_tables(page_of(three_classes))
    first, by_class = (rows for place, rows in tables if place == "accuracies")
    metrics = pq.read_table(three_classes / "metrics.parquet").to_pylist()
    rows = {row["classifier"]: row for row in metrics if row["scope"] == "all"}
    means = {row["classifier"]: row["accuracy"] for row in metrics if row["scope"] == "mean_of_classes"}
    assert [[name, figure, interval, mean, right] for name, _, figure, interval, mean, right in first[1:]] == [
        [name, f"{row['accuracy']:.4f}", f"{row['accuracy_low']:.4f} to {row['accuracy_high']:.4f}",
         f"{means[name]:.4f}", str(row["num_correct"])]
        for name, row in rows.items()
    ]  # fmt: skip
    best = max(rows.values(), key=lambda row: row["accuracy"])
    of_best = {row["class"]: row for row in metrics if row["classifier"] == best["classifier"]}
    assert by_class[1:] == [
        [name, str(NUM_VALID), *(f"{row['accuracy']:.4f}" for row in metrics if row["class"] == name),
         f"{of_best[name]['precision']:.4f}", f"{of_best[name]['f1']:.4f}"]
        for name in ("2", "10", "ä")
    ]  # fmt: skip
    assert f"best: {best['classifier']} {best['accuracy']:.4f}" in text


def test_the_confusion_is_that_of_the_table(three_classes):
    tables, _ = read_tables(page_of(three_classes))
    matrices = [rows for place, rows in tables if place == "confusion"]
    counts = read_rows(Output.at(str(three_classes)), "confusion")
    for name, matrix in zip(dict.fromkeys(row["classifier"] for row in counts), matrices, strict=True):
        shown = {
            (row[0], given): int(cell) for row in matrix[1:] for given, cell in zip(matrix[0][1:], row[1:], strict=True)
        }
        own = {
            (row["true_class"], row["predicted_class"]): row["num_images"]
            for row in counts
            if row["classifier"] == name
        }
        assert {pair: number for pair, number in shown.items() if number} == own


def test_distances_pixels_and_epochs_are_those_of_the_tables(three_classes):
    tables, text = read_tables(page_of(three_classes))
    distances, pixels = (rows for place, rows in tables if place == "numbers")
    assert np.shape(pixels) == (4, 5)
    assert sorted(row[0] for row in distances[1:]) == ["10", "2", "ä"]
    history = next(rows for place, rows in tables if place == "training")
    for row, shown in zip(read_rows(Output.at(str(three_classes)), "history"), history[1:], strict=True):
        columns = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")
        assert shown[:5] == [str(row["epoch"]), *(f"{row[column]:.4f}" for column in columns)]
        assert shown[5:] == [f"{row['valid_mean_class_accuracy']:.4f}", f"{row['gradient_norm']:.4f}"]
    last = read_rows(Output.at(str(three_classes)), "history")[-1]
    assert f"loss {last['train_loss']:.4f} on training and {last['valid_loss']:.4f} on validation" in text
    assert f"accuracy {last['train_accuracy']:.4f} and {last['valid_accuracy']:.4f}" in text
    titles = re.findall(r'<figure class="chart">\s*<h3>(.*?)</h3>', page_of(three_classes))
    assert titles == ["Loss", "Accuracy", "Gradient", "Loss along the last gradient"]
    [weights] = re.findall(r"\+([\d.]+), weight of a pixel", text)
    rows = read_rows(Output.at(str(three_classes)), "weights")
    sums = [np.reshape(row["weights"], (-1, row["channels"])).sum(1) for row in rows]
    assert weights == f"{np.abs(sums).max():.4f}"


def test_scores_and_neighbors_of_mistakes_are_those_of_the_predictions(three_classes):
    page = page_of(three_classes)
    rows = {row["key"]: row for row in pq.read_table(three_classes / "predictions").to_pylist()}
    names = [name for name in CLASSIFIERS if name != "majority_class"]
    cards = re.findall(r'<li class="card" id="mistake-(\d)-\d+".*?</li>', page, re.DOTALL)
    assert len(cards) == sum(
        min(12, sum(row["class"] != row[f"{name}_prediction"] for row in rows.values())) for name in names
    )
    for found in re.finditer(r'<li class="card" id="mistake-(\d)-\d+".*?</li>', page, re.DOTALL):
        _, text = read_tables(found[0])
        name, row = names[int(found[1])], rows[text.split()[-1]]
        given, predicted = row["class"], row[f"{name}_prediction"]
        scores = dict(zip(("2", "10", "ä"), row[f"{name}_scores"], strict=True))
        for other, distance in zip(row["neighbor_classes"][:2], row["neighbor_distances"][:2], strict=True):
            assert f"{other} {distance:.4f}" in text
        said = {
            "nearest_mean_l1": f"distance {figure(scores[predicted])} against {figure(scores[given])}",
            "knn_5": f"{round(5 * scores[predicted])} of 5 votes against {round(5 * scores[given])}",
            "sgd_linear": f"probability {figure(scores[predicted])} against {figure(scores[given])}",
        }
        assert f"{given} taken for {predicted} {said[name]}" in text


def test_suspects_duplicates_skipped_images_and_seconds_are_those_of_the_tables(three_classes):
    page, output = page_of(three_classes), Output.at(str(three_classes))
    tables, text = read_tables(page)
    run = json.loads((three_classes / "run.json").read_text())
    for row in read_rows(output, "suspects"):
        said = f"given {row['class']} , suggested {row['suggested_class']} score {row['score']:.4f}, {row['split']}"
        assert f"{said} {row['key']}" in text
    duplicates = read_rows(output, "duplicates")
    for kind, group in sorted({(row["kind"], row["group"]) for row in duplicates}):
        rows = [row for row in duplicates if (row["kind"], row["group"]) == (kind, group)]
        said = f"{len(rows)} images of this kind"
        if kind == "near":
            said = f"distance {rows[-1]['distance']:.4f}, ratio {rows[-1]['ratio']:.4f}"
        assert (
            " ".join([*(f"{row['split']}, {row['class']}" for row in rows), said, *(row["key"] for row in rows)])
            in text
        )
    assert "1 of 1 group, which has 2 images" in text
    counts = run["neighbors"]
    assert f"{counts['num_twins']} validation image has a twin in training ; without it knn_5 gets 0.6250" in text
    assert f"{counts['num_suspects']} images have a doubtful label ; only validation images were searched" in text
    assert f"{run['num_skipped']} image could not be used , of {run['num_listed']} listed" in text
    [skipped] = (rows for place, rows in tables if place == "skipped")
    [row] = read_rows(output, "skipped")
    assert [[" ".join(cell.split()) for cell in own] for own in skipped[1:]] == [
        [row["reason"], str(run["num_skipped_by_reason"][row["reason"]]), f"{row['key']}{row['error']}"]
    ]
    [seconds] = (rows for place, rows in tables if place == "time")
    spent = {name: f"{value:.1f}" for name, value in run["seconds"].items()}
    assert {row[0]: row[2] for row in seconds[1:]} == {name: spent[name] for name in spent if name != "total"}
    assert f"Seconds of each phase, {spent['total']} in all" in text
    assert f"{run['images_per_s']:,.0f} images decoded a second" in text
    assert run["results_sha256"] in text


def test_the_example_has_the_distances_of_its_own_pixels(tmp_path):
    make_images(tmp_path, ("3", "7"), (4, 4), "PNG")
    out = make_run(tmp_path, ("3", "7"))
    report.remake(str(out), example="train/7/0.png")
    tables, text = read_tables(page_of(out))
    distances, pixels = (rows for place, rows in tables if place == "numbers")
    values = np.array(pixels, int).ravel() / 255
    expected = []
    for row in read_rows(Output.at(str(out)), "means"):
        apart = values - np.array(row["mean"])
        expected.append([row["class"], f"{np.abs(apart).mean():.4f}", f"{np.sqrt((apart**2).mean()):.4f}"])
    assert sorted(distances[1:]) == sorted(expected)
    assert "The image was chosen with" in text


def test_the_worst_mistakes_lead_by_most_whatever_the_parts(tmp_path):
    pages = []
    for number, options in enumerate(({"is_top": True}, {"num_parts": 1}, {"num_parts": 3})):
        folder = tmp_path / str(number)
        out = make_run(folder, [str(label) for label in range(30)], **options)
        report.remake(str(out))
        pages.append(re.findall(r'id="mistake-2-\d+".*?<span class="key">(.*?)</span>', page_of(out), re.DOTALL))
    wrong = []
    for name in sorted((out / "predictions").iterdir()):
        for row in pq.read_table(name).to_pylist():
            given, predicted = int(row["class"]), int(row["sgd_linear_prediction"])
            if given != predicted:
                lead = row["sgd_linear_scores"][predicted] - row["sgd_linear_scores"][given]
                wrong.append((-lead, row["key"]))
    assert pages[0] == pages[1] == pages[2] == [key for _, key in sorted(wrong)[:12]]


def test_hostile_names_are_text(tmp_path):
    make_images(tmp_path, NAMES, (4, 4), "PNG")
    out = make_run(tmp_path, NAMES)
    report.remake(str(out))
    page = page_of(out)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    assert "\u202e" not in page
    assert "\x07" not in page
    assert r"\u202egpj.exe" in page
    assert r"\x07bell" in page
    assert "no picture" not in page


def test_a_name_that_is_no_utf_8_has_its_picture(tmp_path):
    folder = os.fsencode(tmp_path / "data" / "train") + b"/\xff"
    Path(os.fsdecode(folder)).mkdir(parents=True)
    out = make_run(tmp_path, (r"\xff", "3"))
    Path(os.fsdecode(folder + b"/0.png")).write_bytes(encode(np.zeros((4, 4), np.uint8)))
    report.remake(str(out), example=r"train/\xff/0.png")
    assert "as decoded" in page_of(out)


def test_without_its_dataset_the_page_names_what_it_cannot_show(tmp_path):
    make_images(tmp_path, ("3", "7"))
    out = make_run(tmp_path, ("3", "7"))
    shutil.rmtree(tmp_path / "data")
    report.remake(str(out))
    _, text = read_tables(page_of(out))
    assert f"None of the images on this page has a picture: unreadable: {tmp_path}/data: expected" in text
    assert "as it could not be decoded when this page was made: unreadable" in text
    assert "valid/3/0.png" in text


def test_a_place_without_the_images_leaves_the_page_as_it_was(tmp_path):
    make_images(tmp_path, ("3", "7"))
    out = make_run(tmp_path, ("3", "7"))
    report.remake(str(out))
    first = page_of(out)
    (tmp_path / "other" / "valid" / "3").mkdir(parents=True)
    for found in ("none", "1"):
        expected = rf"\A--data .*other: expected the images of .*, got {found} of \d+ images .*; .*\Z"
        with pytest.raises(DataError, match=expected):
            report.remake(str(out), data=str(tmp_path / "other"))
        shutil.copy(tmp_path / "data" / "valid" / "3" / "0.png", tmp_path / "other" / "valid" / "3")
    with pytest.raises(
        OptionError, match=r"\A--example train/3/9\.png: expected the key of an image, got .*; give one as"
    ):
        report.remake(str(out), example="train/3/9.png")
    assert page_of(out) == first
    (tmp_path / "data").rename(tmp_path / "moved")
    report.remake(str(out), data=str(tmp_path / "moved"))
    assert "no picture" not in page_of(out)


def test_an_example_that_is_not_there_is_one_line_before_anything_is_decoded(small_dataset, tmp_path):
    with pytest.raises(
        OptionError, match=r"\A--example valid/x\.png: expected the key of an image, got none .*; give one as"
    ):
        job.evaluate(Config(data=str(small_dataset), out=str(tmp_path / "out"), example="valid/x.png"))
    assert not (tmp_path / "out").exists()


def test_what_a_run_left_out_is_said(tmp_path):
    out = make_run(tmp_path, ("3", "7"), num_epochs=0, has_neighbors=False)
    report.remake(str(out))
    _, text = read_tables(page_of(out))
    assert "the run left the linear model out" in text
    assert "There is no linear model" in text
    assert text.count("were not searched") >= 2


def test_a_page_made_anew_is_the_same_but_for_its_date(small_dataset, tmp_path):
    job.evaluate(Config(data=str(small_dataset), out=str(tmp_path / "out"), epochs=2, device="cpu"))
    first = page_of(tmp_path / "out")
    report.remake(str(tmp_path / "out"))
    dates = re.compile("<time>.*?</time>")
    assert dates.sub("", page_of(tmp_path / "out")) == dates.sub("", first)
    assert first.count("data:image/") >= 8


@pytest.mark.slow
def test_a_page_made_anew_from_an_s3_run_is_the_same(small_dataset, tmp_path):
    with s3_server() as (_, query):
        out = f"s3://bucket/out{query}"
        ran = command("--data", small_dataset, "--out", out, "--epochs", 1, **CREDENTIALS)
        _, stderr = ran.communicate(timeout=120)
        assert ran.returncode == 0, stderr
        bucket = client(query.partition("endpoint_override=")[2])
        read = lambda: bucket.get_object(Bucket="bucket", Key="out/report.html")["Body"].read().decode()  # noqa: E731
        first = read()
        again = [sys.executable, str(ROOT / "jobs" / "report.py"), out]
        environment = {**os.environ, **CREDENTIALS}
        remade = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert remade.returncode == 0, remade.stderr
        dates = re.compile("<time>.*?</time>")
        assert dates.sub("", read()) == dates.sub("", first)


def test_images_in_archives_have_their_pictures_at_once_and_anew(small_dataset, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        paths = sorted((small_dataset / split).rglob("*.png"))
        members = [(str(path.relative_to(small_dataset / split)), path.read_bytes()) for path in paths]
        (tmp_path / "data" / f"{split}.tar").write_bytes(pack_tar(members))
    job.evaluate(Config(data=str(tmp_path / "data"), out=str(tmp_path / "out"), epochs=1, device="cpu"))
    first = page_of(tmp_path / "out")
    assert "no picture" not in first
    assert "valid.tar/" in first
    report.remake(str(tmp_path / "out"))
    dates = re.compile("<time>.*?</time>")
    assert dates.sub("", page_of(tmp_path / "out")) == dates.sub("", first)


def test_an_image_too_large_to_show_is_named(tmp_path):
    make_images(tmp_path, ("3", "7"), (4, 4), "PNG")
    (tmp_path / "data" / "train" / "3" / "0.png").write_bytes(encode(Image.new("1", (10_000, 10_001))))
    out = make_run(tmp_path, ("3", "7"))
    report.remake(str(out))
    _, text = read_tables(page_of(out))
    assert "too large too_large: 10000 x 10001 pixels" in text


def test_a_process_that_dies_is_an_error_of_what_waits_and_no_end():
    answers = dict(by_processes([(int, ("3",)), (open_run, ("nothing-there",))], "a test"))
    assert answers[0] == 3
    assert isinstance(answers[1], OutputError)
    [(_, died)] = by_processes([(os._exit, (1,))], "a test")
    assert isinstance(died, ActorLostError)


def test_a_model_of_the_user_is_what_the_headline_asks_about(three_classes):
    run = json.loads((three_classes / "run.json").read_text())
    assert headline(run)["own"] == []
    renamed = [row | {"classifier": row["classifier"].replace("knn_5", "model")} for row in run["metrics"]]
    head = headline({**run, "metrics": renamed})
    assert [(each["name"], each["called"]) for each in head["own"]] == [("model", "your model")]
    assert head["rival"]["classifier"] == "nearest_mean_l1"


def test_an_unfinished_run_is_one_line(tmp_path):
    with pytest.raises(OutputError, match=r"expected a finished run, got a folder without run\.json"):
        report.remake(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("日本", "日本"), ("a\u202eb", r"a\u202eb"), ("\x00", r"\x00"), ("\ud800", r"\ud800"),
     ("a\nb", r"a\x0ab"), ("\u200b", r"\u200b")],
)  # fmt: skip
def test_what_cannot_be_seen_is_spelled(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("way", "name", "shown"),
    [
        (breakable, "knn_5", "knn_5"), (breakable, "nearest_mean_l1", "nearest_<wbr>mean_l1"),
        (breakable, "knn_5:sgd_linear", "knn_5:<wbr>sgd_linear"),
        (path, "valid/3/0001.png", 'valid/<wbr>3/<span class="end">0001.png</span>'),
        (path, "a_b<i>/none", 'a_<wbr>b&lt;i&gt;/<wbr>none<span class="end"></span>'),
        (path, "val_0123456789.JPEG", 'val_<wbr>012345<span class="end">6789.JPEG</span>'),
    ],
)  # fmt: skip
def test_names_break_where_their_parts_end(way, name, shown):
    assert way(name) == shown


# In a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def many_classes(tmp_path_factory, number):
    folder = tmp_path_factory.mktemp(f"classes{number}")
    classes = [f"class {label}" for label in range(number)]
    make_images(folder, classes, (150, 200, 3))
    out = make_run(folder, classes, Target(64, 64, "RGB"))
    report.remake(str(out))
    return out


@pytest.fixture(scope="module")
def colour_120(tmp_path_factory):
    return many_classes(tmp_path_factory, 120)


@pytest.fixture(scope="module")
def colour_1000(tmp_path_factory):
    return many_classes(tmp_path_factory, 1000)


@pytest.fixture(scope="module")
def sample_run(mnist_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "out"
    job.evaluate(Config(data=str(mnist_sample), out=str(out), epochs=5, example="train/3/10000.png"))
    return out


@pytest.fixture(scope="module")
def mnist_run(mnist_png, tmp_path_factory):
    out = tmp_path_factory.mktemp("mnist") / "out"
    job.evaluate(Config(data=str(mnist_png), out=str(out)))
    return out


@pytest.mark.browser
@pytest.mark.parametrize(
    "run",
    [
        "three_classes",
        "digits_run",
        pytest.param("colour_120", marks=pytest.mark.long),
        pytest.param("colour_1000", marks=pytest.mark.long),
        pytest.param("sample_run", marks=(pytest.mark.data, pytest.mark.long)),
        pytest.param("mnist_run", marks=(pytest.mark.data, pytest.mark.long)),
    ],
)
def test_the_page_opens(request, browser, tmp_path_factory, run):
    out = request.getfixturevalue(run)
    check_page(browser, out / "report.html", SECTIONS, 20, tmp_path_factory.mktemp(run, numbered=False))


@pytest.mark.browser
def test_the_readme_s_picture_is_of_the_page(browser, digits_run, tmp_path):
    page, _ = open_page(browser, digits_run / "report.html", 1280)
    path = os.environ.get("README_PICTURE", tmp_path / "report.png")
    page.set_viewport_size({"width": 1280, "height": 1280})
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'; location.hash = 'confusion'")
    page.screenshot(path=path)
    page.close()
    assert Path(path).stat().st_size < 300_000
    assert (ROOT / ".github" / "report.png").stat().st_size < 300_000


@pytest.mark.browser
def test_everything_is_reached_by_keyboard(browser, three_classes):
    page, _ = open_page(browser, three_classes / "report.html", 1280)
    reached = set()
    describe = "document.activeElement.id || document.activeElement.textContent.trim().slice(0, 30)"
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(describe))
    # Of each group of radio buttons, the one that is chosen: knn_5 is the best here.
    assert {"Skip to the results", "Headline", "Options and versions", "class", "c2", "m1", "All options"} <= reached
    page.locator("#c0").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.querySelector('.panel.c1')).display") == "block"
    page.locator("table.sortable button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('table.sortable th[aria-sort]').textContent") == "images"
    page.close()


@pytest.mark.browser
def test_a_column_sorts_by_its_numbers(browser, colour_120):
    page, _ = open_page(browser, colour_120 / "report.html", 1280)
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[0].textContent)"
    page.locator("table.sortable button").first.click()
    assert page.evaluate(column) == [f"class {label}" for label in range(120)]
    page.locator("table.sortable button").first.click()
    assert page.evaluate(column)[0] == "class 119"
    page.close()


@pytest.mark.browser
def test_without_scripts_the_page_is_whole(browser, three_classes):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{three_classes}/report.html")
    assert page.locator("table.sortable button").count() == 0
    assert page.locator(".panel.c0").is_visible() is False
    page.locator("label[for=c0]").click()
    assert page.locator(".panel.c0").is_visible()
    context.close()


def test_run_json_has_what_the_page_needs(digits_run):
    run = json.loads((digits_run / "run.json").read_text())
    assert run["last_epoch"]["epoch"] == 40
