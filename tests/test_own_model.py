"""A model of one's own in whole jobs: beside the baselines, and with its features in the place of pixels."""

import hashlib
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import command, pack_tar, write_images
from models import DIGITS, digits, save, to_inputs, train_digits
from sklearn.linear_model import LogisticRegression
from test_job import accuracy, actor_pids, evaluate
from torch import nn

from pipeline.config import Config
from pipeline.driver.own_model import read_model
from pipeline.errors import ModelError, OptionError, OutputError
from pipeline.results.comparison_text import comparison_text
from pipeline.results.finished import open_run
from pipeline.results.two_runs import compare_runs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
QUICK = {"epochs": 0, "neighbors": 0}


@pytest.fixture(scope="module")
def trained():
    return train_digits()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The files of the body and of the whole network."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(save(net, folder / f"{name}.pt2") for name, net in zip(("body", "net"), trained, strict=True))


@pytest.fixture(scope="module")
def run_of_digits(exported, tmp_path_factory):
    """A run of the digits with the model beside the baselines, and its folder."""
    out = tmp_path_factory.mktemp("own") / "out"
    return evaluate("digits", out, model=exported[1], epochs=1, report=True), out


def predictions(out, *columns):
    return pq.read_table(out / "predictions", columns=["key", "class", *columns]).sort_by("key")


def test_a_model_counts_and_answers_as_a_plain_loop(trained, run_of_digits):
    run, out = run_of_digits
    images_NHW, labels_N, keys = digits("valid")
    with torch.inference_mode():
        logits_NK = trained[1](to_inputs(images_NHW))
    assert accuracy(run, "model")["num_correct"] == int((logits_NK.argmax(1) == labels_N).sum())
    table = predictions(out, "model_prediction", "model_scores")
    order = np.argsort(keys)
    assert table["key"].to_pylist() == [keys[place] for place in order]
    assert table["model_prediction"].to_pylist() == [str(label) for label in logits_NK.argmax(1)[order].tolist()]
    scores_NK = table["model_scores"].combine_chunks().flatten().to_numpy().reshape(-1, 10)
    # Logits but for what they all share, which no probability tells.
    got_NK, expected_NK = (
        values - values.mean(1, keepdims=True) for values in (np.log(scores_NK), logits_NK[order].numpy())
    )
    np.testing.assert_allclose(got_NK, expected_NK, atol=1e-4, rtol=1e-5)


def test_what_was_done_is_in_the_run_and_on_the_page(exported, run_of_digits):
    run, out = run_of_digits
    model = run["model"]
    assert model["sha256"] == hashlib.sha256(exported[1].read_bytes()).hexdigest()
    assert model["input"] == {
        "height": 8, "width": 8, "mode": "L", "resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear",
    }  # fmt: skip
    assert (model["batch_size"], model["num_outputs"], model["num_images"]) == (32, 10, 899)
    assert model["limit"] in ("model", "decoding")
    assert model["images_per_s"] > 0
    assert json.loads((out / "run.json").read_text())["model"]["file"] == str(exported[1])
    page = (out / "report.html").read_text()
    assert model["sha256"] in page
    assert "<code>model</code>" in page


@pytest.mark.long
@pytest.mark.parametrize("num_actors", [2, 4])
def test_the_number_of_actors_changes_no_bit(exported, run_of_digits, tmp_path, num_actors):
    run = evaluate("digits", tmp_path / "out", model=exported[1], epochs=1, actors=num_actors, shard_images=100)
    assert run["results_sha256"] == run_of_digits[0]["results_sha256"]


def write_digits(form, root):
    """Lay the digits out in a folder, as class folders, or a tar or a Parquet file for each split."""
    rows = pq.read_table(DIGITS).to_pylist()
    root.mkdir()
    for split in ("train", "valid"):
        own = [row for row in rows if row["key"].startswith(split)]
        if form == "folder":
            for row in own:
                (root / row["key"]).parent.mkdir(parents=True, exist_ok=True)
                (root / row["key"]).write_bytes(row["image"])
        elif form == "tar":
            members = [(row["key"].partition("/")[2], row["image"]) for row in own]
            (root / f"{split}.tar").write_bytes(pack_tar(members))
        else:
            labels = pa.array([row["key"].split("/")[1] for row in own])
            images = pa.array([{"bytes": row["image"], "path": row["key"]} for row in own])
            pq.write_table(pa.table({"image": images, "label": labels}), root / f"{split}.parquet")
    return root


def sorted_answers(out):
    """What a run answers, whatever its images are called."""
    rows = predictions(out, "model_prediction", "model_scores").drop_columns("key").to_pylist()
    return sorted(map(repr, rows))


@pytest.mark.parametrize(
    "form", ["folder", *(pytest.param(form, marks=pytest.mark.long) for form in ("tar", "parquet"))]
)
def test_every_form_of_the_dataset_gives_the_same_answers(exported, run_of_digits, tmp_path, form):
    root = write_digits(form, tmp_path / "in")
    run = evaluate(root, tmp_path / "out", model=exported[1], **QUICK)
    assert accuracy(run, "model") == accuracy(run_of_digits[0], "model")
    assert sorted_answers(tmp_path / "out") == sorted_answers(run_of_digits[1])


def kill_an_actor_while(phase, share):
    """Return a progress function that kills one actor once so much of a phase is done."""
    killed, earlier = [], set(actor_pids())

    def on_progress(progress):
        if progress.phase == phase and progress.done > share * progress.total and not killed:
            killed.append(max(set(actor_pids()) - earlier))
            os.kill(killed[0], signal.SIGKILL)

    return on_progress, killed


def test_an_actor_killed_while_the_model_runs_changes_no_bit(exported, tmp_path, caplog):
    slow = save(_Slow(), tmp_path / "slow.pt2")
    first = evaluate("digits", tmp_path / "a", model=slow, shard_images=64, **QUICK)
    on_progress, killed = kill_an_actor_while("decode", 0.2)
    second = evaluate("digits", tmp_path / "b", on_progress, model=slow, shard_images=64, actors=2, **QUICK)
    assert killed
    assert "restarting all actors" in caplog.text
    assert second["results_sha256"] == first["results_sha256"]


class _Slow(nn.Module):
    """A model that takes a while: the actor is in it when it is killed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 2048), nn.Linear(2048, 10)
        self.middle = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(2))

    def forward(self, images_N1HW):
        values = self.first(images_N1HW.flatten(1))
        for layer in self.middle:
            values = layer(values).relu()
        return self.last(values)


@pytest.fixture(scope="module")
def embedded(exported, tmp_path_factory):
    """A run of the digits on the features of the body, and its folder."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    options = {"model": exported[0], "model_output": "embedding", "report": True}
    return evaluate("digits", out, **options), out, options


def test_features_take_the_place_of_pixels(embedded):
    run, out, _ = embedded
    names = list(dict.fromkeys(row["classifier"] for row in run["metrics"]))
    assert names == [
        "majority_class", "nearest_mean_euclidean", "nearest_mean_cosine", "knn_1", "knn_5", "knn_20", "sgd_linear",
    ]  # fmt: skip
    assert accuracy(run, "knn_20")["accuracy"] > 0.9
    [first, *_] = pq.read_table(out / "means.parquet").to_pylist()
    assert (first["height"], first["width"], first["channels"], len(first["mean"])) == (1, 64, 1, 64)
    distances = predictions(out, "neighbor_distances")["neighbor_distances"].to_pylist()
    assert {len(each) for each in distances} == {5}
    assert all(0 <= each[0] <= each[-1] <= 2 for each in distances)
    page = (out / "report.html").read_text()
    assert "compare features of the model" in page
    assert "by the features of the model are more like" in page


def test_a_comparison_of_pixels_with_features_says_so(embedded, run_of_digits):
    text = comparison_text(compare_runs(open_run(str(run_of_digits[1])), open_run(str(embedded[1]))))
    assert "knn_1, knn_5, sgd_linear compare pixels in A and features of a model in B: two classifiers of one" in text


def test_the_linear_probe_counts_as_scikit_learn(embedded, trained):
    (train_ND, train_N), (valid_ND, valid_N) = (
        (trained[0](to_inputs(digits(split)[0])).detach().numpy(), digits(split)[1].numpy())
        for split in ("train", "valid")
    )
    right_N = LogisticRegression(C=np.inf, max_iter=1000).fit(train_ND, train_N).predict(valid_ND) == valid_N
    assert abs(accuracy(embedded[0], "sgd_linear")["num_correct"] - int(right_N.sum())) <= 2


def evaluate_features(out, options, num_actors, dtype):
    changed = {**options, "actors": num_actors, "feature_dtype": dtype, "shard_images": 150, "report": False}
    return evaluate("digits", out, **changed)["results_sha256"]


def test_two_actors_change_no_bit_of_features(embedded, tmp_path):
    run, _, options = embedded
    assert evaluate_features(tmp_path / "out", options, 2, "float32") == run["results_sha256"]


@pytest.mark.long
def test_four_actors_change_no_bit_of_features_of_half_precision(embedded, tmp_path):
    run, _, options = embedded
    digests = [evaluate_features(tmp_path / str(number), options, number, "float16") for number in (1, 4)]
    assert digests[0] == digests[1] != run["results_sha256"]


def test_pixels_as_features_count_as_pixels(tmp_path):
    random = np.random.default_rng(3)
    values = random.integers(0, 256, 64, np.uint8)

    def make_pixels(label):  # the same values in other places, so that the cosine orders images as the distance does
        moved = random.permutation(64)
        moved[: 8 * label] = np.sort(moved[: 8 * label])
        return values[moved].reshape(8, 8)

    root = write_images(tmp_path / "in", {"train": 60, "valid": 40}, ("a", "b", "c", "d"), make_pixels)
    same = save(nn.Flatten(), tmp_path / "same.pt2")
    by_pixels = evaluate(root, tmp_path / "pixels", epochs=0)
    by_features = evaluate(root, tmp_path / "features", model=same, model_output="embedding", epochs=0)
    pairs = {"nearest_mean_rms": "nearest_mean_euclidean", "knn_1": "knn_1", "knn_5": "knn_5"}
    for name, other in pairs.items():
        assert accuracy(by_pixels, name)["num_correct"] == accuracy(by_features, other)["num_correct"]


def test_a_model_has_its_own_size_and_changes_nothing_for_the_baselines(tmp_path, run_of_digits, caplog):
    class Pooled(nn.Module):
        def forward(self, images_N3HW):
            return images_N3HW.mean((2, 3)).repeat(1, 4)[:, :10]

    model = save(Pooled(), tmp_path / "large.pt2", (3, 12, 20), batch=2)
    options = {"model_mean": "imagenet", "model_std": "imagenet", "model_resize": "crop", "model_crop_pct": 0.5}
    run = evaluate("digits", tmp_path / "out", model=model, epochs=1, **options)
    for name in ("nearest_mean_l1", "knn_5", "sgd_linear"):
        assert accuracy(run, name) == accuracy(run_of_digits[0], name)
    assert "--model: expected a batch of any size, got a program for 2 images at a time, which is slow" in caplog.text
    wanted = run["model"]["input"]
    assert (wanted["height"], wanted["width"], wanted["mode"], wanted["crop_pct"]) == (12, 20, "RGB", 0.5)


def test_further_classes_are_counted_and_missing_ones_are_named(trained, exported, tmp_path, caplog):
    names = [str(label) for label in range(10)]
    names[3], names[7] = "three", "sept"
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    images_NHW, labels_N, keys = digits("valid")
    given = dict(zip(keys, ["three", "tench", *map(str, labels_N.tolist()[2:])], strict=True))
    rows = "".join(f"{key},{name}\n" for key, name in given.items())
    (tmp_path / "scores.csv").write_text(f"key,prediction\n{rows}")
    options = {"model_classes": str(tmp_path / "names.txt"), "scores_file": str(tmp_path / "scores.csv")}
    run = evaluate("digits", tmp_path / "out", model=exported[1], report=True, **options, **QUICK)
    assert "got others in 2 of 899 rows, which count as wrong: tench, three" in caplog.text
    # What the model knows besides has a name wherever it is predicted.
    answers = dict.fromkeys(keys) | {key: name for key, name in given.items() if name != "tench"}
    got = predictions(tmp_path / "out", "scores_prediction").to_pylist()
    assert {row["key"]: row["scores_prediction"] for row in got} == answers
    assert "none of 2 of them, whose images are never right: 3, 7" in caplog.text
    assert run["model"]["missing_classes"] == ["3", "7"]
    assert run["model"]["extra_classes"] == ["three", "sept"]
    with torch.inference_mode():
        predicted_N = trained[1](to_inputs(images_NHW)).argmax(1)
    is_known_N = (labels_N != 3) & (labels_N != 7)
    assert accuracy(run, "model")["num_correct"] == int(((predicted_N == labels_N) & is_known_N).sum())
    rows = pq.read_table(tmp_path / "out" / "confusion.parquet").to_pylist()
    [cell] = [row for row in rows if (row["classifier"], row["true_class"], row["predicted_class"]) ==
              ("model", "3", "three")]  # fmt: skip
    assert cell["num_images"] == int(((predicted_N == 3) & (labels_N == 3)).sum())
    assert "three" in (tmp_path / "out" / "report.html").read_text()
    [pair] = compare_runs(*[open_run(str(tmp_path / "out"))] * 2, ["nearest_mean_rms", "model"]).pairs
    assert "three" in pair.changes["prediction_b"].to_pylist()


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"--model .*: expected a file, got nothing there; check the name"):
        evaluate("digits", tmp_path / "out", model=tmp_path / "gone.pt2")


def test_a_model_of_other_outputs_leaves_nothing(tmp_path):
    path = save(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), tmp_path / "model.pt2")
    with pytest.raises(ModelError, match="expected an output for each of 10 classes of the dataset, got 7"):
        evaluate("digits", tmp_path / "out", model=path)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_with_another_model(exported, trained, tmp_path):
    def interrupt(progress):
        if progress.phase == "train" and progress.epoch == 3:
            raise KeyboardInterrupt

    other = save(nn.Sequential(*trained[0], nn.Identity()), tmp_path / "other.pt2")
    options = {"model_output": "embedding", "epochs": 4}
    with pytest.raises(KeyboardInterrupt):
        evaluate("digits", tmp_path / "out", interrupt, model=exported[0], **options)
    with pytest.raises(OutputError, match="--model"):
        evaluate("digits", tmp_path / "out", model=other, resume=True, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model_size": "8"}, "--model-size: expected --model beside it"),
        ({"feature_dtype": "float16"}, "--feature-dtype: expected --model beside it"),
        ({"model": "m", "feature_dtype": "float16"}, "--feature-dtype: expected --model-output embedding"),
        ({"model": "m", "model_output": "rows"}, "--model-output: expected one of logits, embedding"),
        ({"model": "m", "model_mean": "1,2"}, "--model-mean: expected imagenet, or one number or three"),
        ({"model": "m", "model_std": "0"}, "--model-std: expected imagenet, or one number or three, of std above 0"),
        ({"model": "m", "model_crop_pct": 1.5}, "--model-crop-pct: expected 0.1 to 1"),
        ({"model": "m", "model_batch_size": 0}, "--model-batch-size: expected 1 to"),
        ({"model": "m", "model_classes": "c", "model_output": "embedding"}, "--model-classes: expected --model-output"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(OptionError, match=match):
        Config(**options)


def test_a_model_that_cannot_be_used_exits_with_1_and_one_line(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no model")
    process = command("--model", tmp_path / "model.pt2", "--out", tmp_path / "out")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    [error] = [line for line in stderr.splitlines() if "starting Ray" not in line]  # which a slow machine shows
    assert error.startswith("error: --model: expected a program that torch ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("content", "names"),
    [("\ufeffa\r\nb c\r\n", ("a", "b c")), ("a\rb", ("a", "b")), ("a\u2028\x0c\nb\n\n\n", ("a\u2028\x0c", "b"))],
)
def test_a_line_of_the_model_s_classes_is_a_name(tmp_path, content, names):
    (tmp_path / "model.pt2").touch()
    (tmp_path / "names").write_bytes(content.encode())
    assert read_model(Config(model=tmp_path / "model.pt2", model_classes=tmp_path / "names")).names == names


@pytest.mark.parametrize(("content", "line"), [("", 1), ("\n\n", 1), ("a\n\nb\n", 2)])
def test_an_output_without_a_name_is_refused(tmp_path, content, line):
    (tmp_path / "model.pt2").touch()
    (tmp_path / "names").write_text(content)
    with pytest.raises(ModelError, match=f"names: expected a name in each line, got none in line {line}; give"):
        read_model(Config(model=tmp_path / "model.pt2", model_classes=tmp_path / "names"))
