"""The whole job inside one Ray: figures that others published, and the promises that hold whatever the cluster."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from builders import pack_archives, pack_tar, write_images
from PIL import Image
from sklearn.metrics import classification_report

from pipeline import plan
from pipeline.compute.classifiers import used_classifiers
from pipeline.config import Config
from pipeline.data import files
from pipeline.driver import cluster, job, train, waiting
from pipeline.errors import (
    ActorLostError,
    CacheError,
    ClusterError,
    DataError,
    OutputError,
    StalledError,
    TrainingError,
)
from pipeline.results import writing

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def evaluate(data, out, on_progress=lambda progress: None, **options):
    """Run the job; with one actor and without the page, unless the options say otherwise."""
    given = {"report": False, "device": "cpu", **options}
    return job.evaluate(Config(data=str(data), out=str(out), **given), on_progress)


def accuracy(run, classifier, scope="all", class_name=None):
    [row] = [
        row
        for row in run["metrics"]
        if (row["classifier"], row["scope"], row["class"]) == (classifier, scope, class_name)
    ]
    return row


def read(out, table):
    return pq.read_table(out / f"{table}.parquet").to_pylist()


@pytest.fixture(scope="module")
def sample_run(local_ray, mnist_sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "out"
    return evaluate(mnist_sample, out), out


@pytest.mark.data
@pytest.mark.parametrize(
    ("classifier", "threes", "sevens", "mean"),
    [("nearest_mean_l1", 0.9168, 0.9854, 0.9511), ("nearest_mean_rms", 0.9584, 0.9737, 0.9661)],
)
def test_mnist_sample_gives_the_published_accuracies(sample_run, classifier, threes, sevens, mean):
    run, _ = sample_run
    assert round(accuracy(run, classifier, "class", "3")["accuracy"], 4) == threes
    assert round(accuracy(run, classifier, "class", "7")["accuracy"], 4) == sevens
    assert round(accuracy(run, classifier, "mean_of_classes")["accuracy"], 4) == mean


@pytest.mark.data
def test_mnist_sample_gives_the_published_counts_and_the_linear_model_passes_the_book(sample_run):
    run, _ = sample_run
    assert accuracy(run, "nearest_mean_l1", "class", "3")["num_correct"] == 926
    assert accuracy(run, "nearest_mean_l1", "class", "7")["num_correct"] == 1013
    assert accuracy(run, "sgd_linear")["accuracy"] >= 0.984
    assert [accuracy(run, name)["num_correct"] for name in ("knn_1", "knn_5")] == [2026, 2025]


@pytest.mark.data
def test_the_distances_of_a_known_image_are_the_published_ones(mnist_sample, tmp_path, sample_run):
    # Validated on one of its own training images, so that it gets a row.
    root = tmp_path / "both"
    root.mkdir()
    (root / "train").symlink_to(mnist_sample / "train")
    for path in (mnist_sample / "train" / "3" / "10000.png", next((mnist_sample / "train" / "7").iterdir())):
        (root / "valid" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, root / "valid" / path.parent.name)
    evaluate(root, tmp_path / "out", epochs=0, neighbors=0)
    rows = pq.read_table(tmp_path / "out" / "predictions", filters=[("key", "==", "valid/3/10000.png")])
    [row] = rows.to_pylist()
    np.testing.assert_allclose(np.round(row["nearest_mean_l1_scores"], 4), [0.1114, 0.1586], atol=1e-7)
    np.testing.assert_allclose(np.round(row["nearest_mean_rms_scores"], 4), [0.2021, 0.3021], atol=1e-7)
    assert row["nearest_mean_l1_prediction"] == "3"


@pytest.mark.data
@pytest.mark.slow
def test_all_of_mnist_gives_the_figures_of_a_plain_loop(mnist_png, tmp_path):
    run = evaluate(mnist_png, tmp_path / "out")
    assert accuracy(run, "nearest_mean_l1")["num_correct"] == 6685
    assert accuracy(run, "majority_class")["num_correct"] == 1135  # all ones, the class of most training images
    assert accuracy(run, "nearest_mean_rms")["num_correct"] == 8203
    assert [accuracy(run, name)["num_correct"] for name in ("knn_1", "knn_5")] == [9691, 9688]
    assert run["neighbors"]["num_twins"] <= 100
    assert accuracy(run, "sgd_linear")["accuracy"] >= 0.923


@pytest.mark.data
@pytest.mark.long
def test_the_mean_of_all_steps_of_fashion_mnist_is_good_and_steady(fashion_mnist, tmp_path):
    run = evaluate(fashion_mnist, tmp_path / "out")
    assert accuracy(run, "sgd_linear")["accuracy"] >= 0.843  # scikit-learn's best logistic regression has 0.8463
    assert [accuracy(run, name)["num_correct"] for name in ("knn_1", "knn_5")] == [8497, 8554]
    assert run["neighbors"]["num_twins"] <= 100
    last = [row["valid_accuracy"] for row in read(tmp_path / "out", "history")[-10:]]
    assert max(last) - min(last) <= 0.001


@pytest.fixture(scope="module")
def digits_run(local_ray, tmp_path_factory):
    return evaluate("digits", tmp_path_factory.mktemp("digits") / "out")


def test_the_bundled_digits_reach_what_is_said_of_them(digits_run):
    run = digits_run
    assert accuracy(run, "nearest_mean_rms")["num_correct"] == 787
    assert accuracy(run, "sgd_linear")["num_correct"] == 834


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_:UserWarning")  # corners that are always white
def test_nearest_mean_of_digits_is_that_of_scikit_learn(digits_run):
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestCentroid

    digits = load_digits()
    pixels = np.rint(digits.data * 255 / 16)
    model = NearestCentroid().fit(pixels[:898], digits.target[:898])
    num_correct = int((model.predict(pixels[898:]) == digits.target[898:]).sum())
    assert accuracy(digits_run, "nearest_mean_rms")["num_correct"] == num_correct


@pytest.fixture
def noisy_run(noisy_dataset, tmp_path):
    return evaluate(noisy_dataset, tmp_path / "out", epochs=2)


@pytest.fixture(scope="module")
def untrained(local_ray, small_dataset, tmp_path_factory):
    return evaluate(small_dataset, tmp_path_factory.mktemp("untrained") / "out", epochs=0)


@pytest.fixture(scope="module")
def reference(local_ray, small_dataset, tmp_path_factory):
    return evaluate(small_dataset, tmp_path_factory.mktemp("reference") / "out", epochs=3)


def test_seconds_are_told_by_phase(reference):
    assert list(reference["seconds"]) == [
        "start",
        "decode",
        "means",
        "train",
        "neighbors",
        "score",
        "duplicates",
        "write",
        "total",
    ]


@pytest.mark.parametrize(
    ("num_actors", "options"),
    [(2, {}), (3, {}), (4, {"shard_images": 5}), pytest.param(8, {}, marks=pytest.mark.long)],
)
def test_the_number_of_actors_does_not_change_a_bit(reference, small_dataset, tmp_path, num_actors, options):
    run = evaluate(small_dataset, tmp_path / "out", epochs=3, actors=num_actors, **options)
    assert run["results_sha256"] == reference["results_sha256"]


def test_pretended_gpus_give_the_same_results_on_the_cpu_and_say_so(reference, small_dataset, tmp_path, caplog):
    run = evaluate(small_dataset, tmp_path / "out", epochs=3, device="auto")
    assert run["results_sha256"] == reference["results_sha256"]
    devices = {"devices": ["cpu", "cpu"], "images_kept_in": ["memory"]}
    assert run["actors"] == {"number": 2, "gpus_each": 1.0, **devices}
    assert [record.message for record in caplog.records if "GPU" in record.message] == [
        "2 actors were given GPUs, but torch finds no CUDA device there; they compute on the CPU"
    ]


@pytest.mark.parametrize("kind", ["class folders", "webdataset", "parquet"])
def test_archives_give_the_figures_of_the_folder(reference, small_dataset, tmp_path, kind):
    pack_archives(small_dataset, tmp_path, kind)
    run = evaluate(tmp_path, tmp_path.parent / f"{kind} out", epochs=3, shard_images=9)
    assert run["metrics"] == reference["metrics"]
    assert run["dataset"]["classes"] == reference["dataset"]["classes"]
    assert run["num_shards"] > 4


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_long_tail_is_held_out_from_and_its_end_left_out(tmp_path, kind, caplog):
    random = np.random.default_rng(3)
    sizes = {"big": 60, "small": 3, "pair": 2, "single": 1}
    images = {
        (name, number): random.integers(0, 256, (6, 6), np.uint8) for name in sizes for number in range(sizes[name])
    }
    members = []
    for (name, number), pixels in images.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        members.append((f"{name}/{number}.png", buffer.getvalue()))
    if kind == "folder":
        for name, data in members:
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(data)
    else:
        (tmp_path / "in").mkdir()
        for part in range(3):
            (tmp_path / "in" / f"{part}.tar").write_bytes(pack_tar(members[part::3]))
    with pytest.raises(DataError, match=r"got none of single in .*; add images, or go on without these classes"):
        evaluate(tmp_path / "in", tmp_path / "no", valid_fraction=0.1, epochs=0)
    caplog.clear()
    run = evaluate(tmp_path / "in", tmp_path / "out", valid_fraction=0.1, epochs=0, incomplete_classes="drop")
    assert (run["dataset"]["classes"], run["dataset"]["dropped_classes"]) == (["big", "pair", "small"], ["single"])
    assert run["num_listed"] == 65
    assert "1 classes are left out for want of images in one split: single" in caplog.text
    by_class = {name: accuracy(run, "nearest_mean_l1", "class", name)["num_images"] for name in ("pair", "small")}
    assert by_class["pair"] == 1
    assert 1 <= by_class["small"] <= 2


def test_more_files_ignored_than_read_are_named_and_warned_of(small_dataset, tmp_path, caplog):
    data = shutil.copytree(small_dataset, tmp_path / "in")
    for number in range(300):
        (data / "train" / f"{number}.tga").write_bytes(b"")
    run = evaluate(data, tmp_path / "out", epochs=0)
    assert run["dataset"]["num_ignored_files"][".tga"] == 300
    assert "300 .tga" in caplog.text
    assert "the README lists the endings" in caplog.text


def test_archives_without_splits_are_held_out_from_by_a_glob(small_dataset, tmp_path):
    pack_archives(small_dataset, tmp_path, "webdataset")
    run = evaluate(f"{tmp_path}/train-{{0..1}}.tar", tmp_path.parent / "glob out", epochs=0, valid_fraction=0.3)
    assert run["num_listed"] == 120
    assert 15 < run["num_valid"] < 60


def test_decoded_images_are_kept_for_the_next_run(reference, small_dataset, tmp_path):
    options = {"cache": str(tmp_path / "cache"), "epochs": 3}
    runs = [evaluate(small_dataset, tmp_path / str(actors), actors=actors, **options) for actors in (1, 2)]
    assert {run["results_sha256"] for run in runs} == {reference["results_sha256"]}
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == runs[0]["num_shards"]
    assert [run["num_shards_from_cache"] for run in runs] == [0, runs[0]["num_shards"]]
    assert list(runs[0]["seconds"])[:3] == ["start", "scan", "decode"]


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_of_a_cache_only_what_changed_is_decoded_again(small_dataset, tmp_path, kind):
    data = tmp_path / "data"
    if kind == "webdataset":
        data.mkdir()
        pack_archives(small_dataset, data, kind)
    else:
        shutil.copytree(small_dataset, data)
    options = {"cache": str(tmp_path / "cache"), "epochs": 0, "shard_images": 7}
    first = evaluate(data, tmp_path / "out 0", **options)
    assert first["num_shards"] > 10
    changed = next(data.rglob("*.tar" if kind == "webdataset" else "*.png"))
    os.utime(changed, (0, 0))
    second = evaluate(data, tmp_path / "out 1", **options)
    num_changed = first["num_shards"] - second["num_shards_from_cache"]
    assert num_changed > 1 if kind == "webdataset" else num_changed == 1
    assert second["results_sha256"] == first["results_sha256"]


@pytest.mark.parametrize("cache", ["data", "data/cache", "out", "out/cache", "."])
def test_a_cache_in_or_around_data_or_results_is_refused(small_dataset, tmp_path, cache):
    (tmp_path / "data").symlink_to(small_dataset)
    with pytest.raises(CacheError, match=r"^--cache .*: expected a folder apart from "):
        evaluate(tmp_path / "data", tmp_path / "out", cache=str(tmp_path / cache))
    assert not (small_dataset / "cache").exists()


def test_images_that_memory_cannot_hold_are_kept_on_disk(reference, small_dataset, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(cluster, "memory_limit", lambda: 10_000.0)  # of 156 images of 64 bytes
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)  # actors have another working folder
    run = evaluate(small_dataset, tmp_path / "out", epochs=3, scratch="scratch")
    assert run["actors"]["images_kept_in"] == ["disk"]
    assert run["results_sha256"] == reference["results_sha256"]
    assert f"they are kept on disk in {tmp_path}/scratch" in caplog.text
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_scratch_that_is_no_folder_is_one_line(small_dataset, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match=f"^--scratch .*/{name}: expected a folder on every node"):
        evaluate(small_dataset, tmp_path / "out", scratch=str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_several_nodes_are_asked_whether_they_see_the_same_files(small_dataset, tmp_path):
    location = files.Location("folder", str(small_dataset))
    names = [b"train/2/0.png", b"valid/10/3.png"]
    nodes = cluster.living_nodes() * 2
    cluster.check_paths(nodes, location, names, writing.Output.at(str(tmp_path / "out")), lambda: False)
    assert list((tmp_path / "out").iterdir()) == []


def test_another_seed_is_another_result(reference, small_dataset, tmp_path):
    run = evaluate(small_dataset, tmp_path / "out", epochs=3, seed=1)
    assert run["results_sha256"] != reference["results_sha256"]


def test_an_actor_killed_while_neighbors_are_searched_does_not_change_a_bit(
    reference, small_dataset, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(plan, "_REQUEST_BYTES", 8 * 64)  # so that there is a middle
    killed, earlier = [], set(actor_pids())

    def on_progress(progress):
        if progress.phase == "neighbors" and progress.done and not killed:
            killed.append(max(set(actor_pids()) - earlier))
            os.kill(killed[0], signal.SIGKILL)

    run = evaluate(small_dataset, tmp_path / "out", on_progress, epochs=3, actors=2)
    assert killed
    assert "restarting all actors, to go on after epoch 3" in caplog.text
    assert run["results_sha256"] == reference["results_sha256"]


def kill_once_in_epoch(epoch, pids):
    """Return a progress function that kills one actor, by its id, while an epoch is trained."""
    killed, earlier = [], set(pids())  # those of a job before this one may still be ending

    def on_progress(progress):
        if progress.phase == "train" and progress.epoch == epoch and not killed:
            killed.append(max(set(pids()) - earlier))
            os.kill(killed[0], signal.SIGKILL)

    return on_progress, killed


def actor_pids():
    return [
        process.info["pid"]
        for process in psutil.process_iter(["pid", "cmdline"])
        if "ray::ActorProcess" in " ".join(process.info["cmdline"] or []) and is_ours(process)
    ]


def is_ours(process):
    try:
        return psutil.Process() in process.parents()
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("num_actors", [1, 2])
def test_a_killed_actor_does_not_change_a_bit(reference, small_dataset, tmp_path, num_actors, caplog):
    on_progress, killed = kill_once_in_epoch(2, actor_pids)
    options = {"epochs": 3, "actors": num_actors}
    run = evaluate(small_dataset, tmp_path / "out", on_progress, **options)
    assert killed
    assert "restarting all actors, to go on after epoch" in caplog.text
    assert run["results_sha256"] == reference["results_sha256"]


def test_parameters_that_go_in_pieces_go_on_after_a_death(small_dataset, tmp_path):
    on_progress, killed = kill_once_in_epoch(2, actor_pids)
    options = {"epochs": 3, "neighbors": 0, "device": "cpu", "size": "256x256", "mode": "RGB"}
    first = evaluate(small_dataset, tmp_path / "1", **options)  # of three classes, whose parameters go in two pieces
    run = evaluate(small_dataset, tmp_path / "2", on_progress, actors=2, **options)
    assert killed
    assert run["results_sha256"] == first["results_sha256"]
    means = pq.read_table(tmp_path / "2" / "means.parquet")["mean"].combine_chunks().flatten().to_numpy()
    assert len(means) == 3 * 3 * 256**2
    assert (np.sort(means.reshape(3, -1).mean(1)) > 0.1).all()


def test_an_actor_killed_with_its_images_on_disk_does_not_change_a_bit(
    reference, small_dataset, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(cluster, "memory_limit", lambda: 10_000.0)
    on_progress, killed = kill_once_in_epoch(2, actor_pids)

    def fill_disk_and_kill(progress):
        on_progress(progress)
        if killed:  # as the actor that lives, and ends now, does
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))

    options = {"epochs": 3, "actors": 2, "scratch": str(tmp_path)}
    run = evaluate(small_dataset, tmp_path / "out", fill_disk_and_kill, **options)
    assert killed
    assert "restarting all actors" in caplog.text
    assert run["actors"]["images_kept_in"] == ["disk"]
    assert run["results_sha256"] == reference["results_sha256"]


def test_an_actor_killed_while_decoding_does_not_change_a_bit(reference, small_dataset, tmp_path, caplog):
    killed, earlier = [], set(actor_pids())

    def on_progress(progress):
        if progress.phase == "decode" and 0 < progress.done < progress.total and not killed:
            while not (pids := set(actor_pids()) - earlier):  # nothing goes on until one is up
                time.sleep(0.01)
            killed.append(pids.pop())
            os.kill(killed[0], signal.SIGKILL)

    # More shards than are in flight at a time, so that there is a middle.
    run = evaluate(small_dataset, tmp_path / "out", on_progress, epochs=3, shard_images=4)
    assert killed
    assert "restarting all actors" in caplog.text
    assert run["results_sha256"] == reference["results_sha256"]


def test_actors_that_always_die_end_the_job(small_dataset, tmp_path):
    def on_progress(progress):
        for pid in actor_pids():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"the actors: expected .*, got 4 deaths"):
        evaluate(small_dataset, tmp_path / "out", on_progress, epochs=3)


def test_an_interrupt_is_one_where_no_checkpoint_can_be_written(small_dataset, tmp_path, caplog):
    def on_progress(progress):
        if progress.phase == "score":
            shutil.rmtree(tmp_path / "out")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(small_dataset, tmp_path / "out", on_progress, epochs=1)
    assert "checkpoint.parquet: expected to write it, got No such file or directory" in caplog.messages[-1]


def interrupt(data, out, phase="train", epoch=None):
    """Interrupt a job, as Ctrl-C does, in a phase, of training in an epoch."""

    def on_progress(progress):
        if progress.phase == phase and epoch in (None, progress.epoch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(data, out, on_progress, epochs=3)


def resume(data, out):
    """Go on to epoch 3; return the run and the epochs that were shown."""
    epochs = []
    run = evaluate(data, out, lambda progress: epochs.append(progress.epoch), epochs=3, resume=True)
    return run, epochs


def test_resuming_gives_what_one_run_gives(reference, small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CHECKPOINT_SECONDS", 0.0)
    interrupt(small_dataset, tmp_path / "out", epoch=3)
    assert not (tmp_path / "out" / "run.json").exists()
    run, epochs = resume(small_dataset, tmp_path / "out")
    assert {epoch for epoch in epochs if epoch} <= {1, 3}  # 1 is shown until the actors have begun
    assert 2 not in epochs
    assert run["results_sha256"] == reference["results_sha256"]
    assert not (tmp_path / "out" / "checkpoint.parquet").exists()


@pytest.fixture(scope="module")
def interrupted(local_ray, small_dataset, tmp_path_factory):
    """The results of a job that was interrupted when all was trained."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    interrupt(small_dataset, out, "score")
    return out


def test_resuming_with_another_seed_is_refused(interrupted, small_dataset):
    with pytest.raises(OutputError, match=r"--resume: expected --seed 0, .* got 5"):
        evaluate(small_dataset, interrupted, epochs=3, resume=True, seed=5)


def test_resuming_what_was_trained_by_other_arithmetic_is_refused(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as before:
        before.setattr(train, "_MODEL", "mean of all steps")
        interrupt(small_dataset, tmp_path / "out", epoch=2)
    with pytest.raises(OutputError, match=r"--resume: expected model mean of all steps, .* got .* as a tree"):
        resume(small_dataset, tmp_path / "out")


def test_fewer_epochs_than_there_were_are_refused_before_an_image_is_decoded(interrupted, small_dataset):
    phases = set()
    with pytest.raises(OutputError, match=r"--epochs: expected at least 3, .*, got 2; .* in place of --resume"):
        evaluate(small_dataset, interrupted, lambda progress: phases.add(progress.phase), epochs=2, resume=True)
    assert phases == {"start"}


def test_classes_of_few_validation_images_are_named_in_one_line(tmp_path, caplog):
    sizes = {"train": 2, "valid": 10}
    data = write_images(tmp_path / "data", sizes, ("3", "7", "9"), lambda label: np.full((2, 2), label, np.uint8))
    for key in ("3/0", "7/0", "7/1"):
        (data / "valid" / f"{key}.png").write_bytes(b"no image")
    evaluate(data, tmp_path / "out", epochs=0)
    said = [text for text in caplog.messages if text.startswith("validation images")]
    few = "2 of 3 classes, whose accuracies say little: 8 of 7, 9 of 3"
    assert said == [f"validation images: expected at least 10 of every class, got fewer of {few}"]


@pytest.mark.parametrize("option", ["label_column", "image_column"])
@pytest.mark.parametrize("kind", ["folder", "tar", "package"])
def test_a_column_is_of_parquet_files_alone(small_dataset, tmp_path, option, kind):
    (tmp_path / "train.tar").write_bytes(pack_tar([("3/a.png", b"x")]))
    data = {"folder": small_dataset, "tar": tmp_path / "train.tar", "package": "digits"}[kind]
    with pytest.raises(
        DataError, match=rf"^--{option.replace('_', '-')}: expected Parquet files in .*, got none; leave"
    ):
        evaluate(data, tmp_path / "out", **{option: "fine"})


def test_classes_that_look_the_same_are_named(tmp_path, caplog):
    sizes = {"train": 2, "valid": 2}
    data = write_images(tmp_path / "data", sizes, ("cat", "cat "), lambda label: np.full((2, 2), label, np.uint8))
    evaluate(data, tmp_path / "out", epochs=0)
    said = [text for text in caplog.messages if text.startswith("classes: expected names that can be told apart")]
    assert ["got 'cat' and 'cat ' look alike" in text for text in said] == [True]


def test_an_interrupt_after_training_keeps_all_of_it(reference, interrupted, small_dataset, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    run, epochs = resume(small_dataset, tmp_path / "out")
    assert not {1, 2, 3} & set(epochs)
    assert run["results_sha256"] == reference["results_sha256"]


def test_resuming_with_other_images_of_the_same_names_is_refused(small_dataset, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(small_dataset, data)
    interrupt(data, out, epoch=2)
    shutil.copy(data / "train" / "2" / "0.png", data / "train" / "2" / "1.png")
    with pytest.raises(OutputError, match=r"/data: expected the images .*, got others"):
        evaluate(data, out, epochs=3, resume=True)


@pytest.mark.parametrize(
    ("data", "out"),
    [("{tmp}/data", "{tmp}/data/out"), ("{tmp}/data", "{tmp}/link/out"), ("s3://bucket/data", "s3://bucket/data/out")],
)
def test_results_inside_the_dataset_are_refused(small_dataset, tmp_path, data, out):
    (tmp_path / "data").symlink_to(small_dataset)
    (tmp_path / "link").symlink_to(small_dataset)
    with pytest.raises(OutputError, match=r"--out .*: expected a folder outside the dataset"):
        evaluate(data.format(tmp=tmp_path), out.format(tmp=tmp_path))


def test_an_actor_that_cannot_start_says_why(local_ray):
    class Broken:
        def __init__(self):
            raise RuntimeError("no room on this device")

        def answer(self):
            return 1

    actor = ray.remote(num_cpus=0)(Broken).remote()
    with pytest.raises(ClusterError, match=r"expected it to start, got .*no room on this device"):
        waiting.get_result(actor.answer.remote())


def test_a_lack_of_memory_is_one_line_that_says_what_to_do(local_ray):
    def fill():
        raise MemoryError("cannot allocate")

    with pytest.raises(ClusterError, match="shard 3: expected enough memory") as caught:
        waiting.get_result(ray.remote(num_cpus=0)(fill).remote(), "shard 3")
    assert not isinstance(caught.value, ActorLostError)


@pytest.mark.parametrize("name", ["digits_run", "reference", "noisy_run"])
@pytest.mark.filterwarnings("ignore:Precision is ill-defined")  # of a class that is never predicted
def test_the_figures_of_classes_are_those_of_scikit_learn(request, name):
    run = request.getfixturevalue(name)
    predictions = pq.read_table(f"{run['out']}/predictions").to_pydict()
    for name in dict.fromkeys(row["classifier"] for row in run["metrics"]):
        expected = classification_report(predictions["class"], predictions[f"{name}_prediction"], output_dict=True)
        means = accuracy(run, name, "mean_of_classes")
        got = {row["class"]: row for row in run["metrics"] if (row["classifier"], row["scope"]) == (name, "class")}
        for label, row in {**got, "macro avg": means}.items():
            figures = [row["precision"], row["accuracy"], row["f1"]]
            assert figures == pytest.approx(list(expected[label].values())[:3], abs=1e-12)
        assert {label: row["num_images"] for label, row in got.items()} == {
            label: expected[label]["support"] for label in got
        }


def test_of_many_classes_the_top_5_are_those_of_the_scores(tmp_path):
    random = np.random.default_rng(1)
    write_images(
        tmp_path / "data", {"train": 6, "valid": 5}, [str(label) for label in range(12)],
        lambda label: random.integers(8 * label, 160 + 8 * label, (4, 4), dtype=np.uint8),
    )  # fmt: skip
    run = evaluate(tmp_path / "data", tmp_path / "out", epochs=2, actors=2, shard_images=7)
    rows = read(tmp_path / "out", "predictions/part-00000")
    for classifier in used_classifiers(run["neighbors"]["number"], has_training=True):
        got = accuracy(run, classifier.name)["top5_accuracy"]
        if not classifier.has_scores:
            assert got is None
            continue
        sign = 1 if classifier.has_distances else -1
        ranked = [np.argsort(sign * np.array(row[f"{classifier.name}_scores"]), kind="stable")[:5] for row in rows]
        labels = [run["dataset"]["classes"].index(row["class"]) for row in rows]
        assert got == np.mean([label in top for label, top in zip(labels, ranked, strict=True)])


def test_every_image_is_in_one_table(reference, small_dataset):
    run = reference
    keys = pq.read_table(f"{run['out']}/predictions")["key"].to_pylist()
    assert sorted(keys) == sorted(
        path.relative_to(small_dataset).as_posix() for path in small_dataset.glob("valid/*/*.png")
    )
    assert run["num_listed"] == run["num_train"] + len(keys) + run["num_skipped"] == 156


def test_without_training_there_are_no_tables_of_it(untrained):
    run = untrained  # nor has it a page, which is not asked for
    assert sorted(path.name for path in Path(run["out"]).iterdir()) == [
        "confusion.parquet", "duplicates.parquet", "means.parquet", "metrics.parquet", "predictions",
        "run.json", "skipped.parquet", "suspects.parquet",
    ]  # fmt: skip
    assert {row["classifier"] for row in run["metrics"]} == {
        "majority_class", "nearest_mean_l1", "nearest_mean_rms", "knn_1", "knn_5",
    }  # fmt: skip
    assert run["stopped_by"] is None


def test_the_written_weights_give_the_predictions_from_plain_pixels(digits_run):
    out = Path(digits_run["out"])
    rows = read(out, "weights")
    weights_KD, bias_K = np.array([row["weights"] for row in rows]), np.array([row["bias"] for row in rows])
    images = {row["key"]: row["image"] for row in pq.read_table(files.DIGITS).to_pylist()}
    for row in pq.read_table(out / "predictions").to_pylist()[:200]:
        pixels_D = np.asarray(Image.open(io.BytesIO(images[row["key"]]))).ravel() / 255
        odds_K = np.exp(weights_KD @ pixels_D + bias_K)
        np.testing.assert_allclose(row["sgd_linear_scores"], odds_K / odds_K.sum(), atol=1e-5)


def test_the_default_step_is_safe_for_images_that_are_much_alike(tmp_path):
    """Photographs share their brightness, which decides the curvature; a step chosen for digits diverges on them."""
    random = np.random.default_rng(3)

    def make_pixels(label):
        pixels = np.full((48, 48, 3), 120 + 20 * random.normal()) + 15 * random.normal(size=(48, 48, 3))
        pixels[:24, :, 0] += 25 * label
        return pixels.clip(0, 255).astype(np.uint8)

    write_images(tmp_path, {"train": 60, "valid": 20}, "ab", make_pixels)
    run = evaluate(tmp_path, tmp_path.parent / "alike", epochs=10)
    losses = [row["train_loss"] for row in read(tmp_path.parent / "alike", "history")]
    assert losses[-1] < losses[0] < np.log(2) * 1.5
    assert accuracy(run, "sgd_linear")["accuracy"] > 0.9


def test_nearest_mean_is_the_same_with_and_without_training(reference, untrained):
    for classifier in ("nearest_mean_l1", "nearest_mean_rms"):
        assert accuracy(untrained, classifier) == accuracy(reference, classifier)


def test_run_json_and_the_tables_say_the_same(small_dataset, tmp_path):
    out = tmp_path / "out"
    run = evaluate(small_dataset, out, epochs=2, classes=("2", "10"))
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(run))
    assert [row["accuracy"] for row in read(out, "metrics")] == [row["accuracy"] for row in run["metrics"]]
    assert [row["epoch"] for row in read(out, "history")] == [1, 2]
    assert [row["class"] for row in read(out, "means")] == ["2", "10"]
    assert run["num_listed"] == 104
    assert sum(row["num_images"] for row in read(out, "confusion")) == len(used_classifiers(5, has_training=True)) * 24


def test_the_counts_of_the_tables_follow_from_the_predictions(reference):
    run = reference
    rows = pq.read_table(f"{run['out']}/predictions").to_pylist()
    for classifier, choose in (
        ("nearest_mean_l1", np.argmin),
        ("nearest_mean_rms", np.argmin),
        ("sgd_linear", np.argmax),
    ):
        predicted = [run["dataset"]["classes"][choose(row[f"{classifier}_scores"])] for row in rows]
        assert predicted == [row[f"{classifier}_prediction"] for row in rows]
        num_correct = sum(name == row["class"] for name, row in zip(predicted, rows, strict=True))
        assert accuracy(run, classifier)["num_correct"] == num_correct


@pytest.mark.parametrize(
    ("options", "reason", "num_epochs"),
    [
        ({"epochs": 50, "target_accuracy": 0.01}, "target_accuracy", 1),
        ({"epochs": 50, "max_seconds": 1e-9}, "max_seconds", 1),
        ({"epochs": 500, "patience": 1}, "patience", None),
    ],
)
def test_training_stops_by_its_four_rules(reference, small_dataset, tmp_path, options, reason, num_epochs):
    assert reference["stopped_by"] == "epochs"
    run = evaluate(small_dataset, tmp_path / "out", **options)
    history = read(tmp_path / "out", "history")
    assert run["stopped_by"] == reason
    assert num_epochs in (None, len(history))
    assert len(history) < 500


def test_training_that_diverges_says_what_to_do(black_and_white, tmp_path):
    with pytest.raises(TrainingError, match="give a smaller --learning-rate than 3e"):
        evaluate(black_and_white, tmp_path / "out", learning_rate=3e38, epochs=30)


def test_a_model_worse_than_guessing_is_warned_of(tmp_path, caplog):
    evaluate("digits", tmp_path / "out", learning_rate=1e6, epochs=1)
    assert "below 2.303, that of guessing, got" in caplog.text


def test_a_class_of_bad_images_only_is_an_error(tmp_path):
    for key in ("train/a/1.png", "train/b/1.png", "valid/a/1.png", "valid/b/1.png"):
        path = tmp_path / "data" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"expected training images of class a, got none .* train/a/1\.png"):
        evaluate(tmp_path / "data", tmp_path / "out", size="8x8", mode="L")


def test_a_finished_run_is_kept_and_replaced_only_when_told(reference, small_dataset, tmp_path):
    shutil.copytree(reference["out"], tmp_path / "out")
    with pytest.raises(OutputError, match="expected a new or empty folder"):
        evaluate(small_dataset, tmp_path / "out", epochs=1)
    second = evaluate(small_dataset, tmp_path / "out", epochs=0, overwrite=True)
    assert second["results_sha256"] != reference["results_sha256"]
    assert not (tmp_path / "out" / "weights.parquet").exists()


def test_more_gpus_than_the_cluster_has_are_refused(small_dataset, tmp_path):
    with pytest.raises(ClusterError, match="expected 3 GPUs within 0 s, got 2"):
        evaluate(small_dataset, tmp_path / "out", device="cuda", actors=3, wait_seconds=0)


def test_work_that_stands_still_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(waiting, "STALL_SECONDS", 0.5)
    never = ray.remote(num_cpus=2)(lambda: __import__("threading").Event().wait()).remote()
    with pytest.raises(StalledError, match="a sleeper: expected a result, got none"):
        waiting.wait_some([never], "a sleeper", lambda: False)
    ray.cancel(never, force=True)


@pytest.mark.usefixtures("reference")
def test_decoding_workers_never_load_torch():
    modules = ray.get([ray.remote(lambda: sorted(__import__("sys").modules)).remote() for _ in range(4)])
    assert all("torch" not in names for names in modules)


def test_a_dead_actor_is_told_from_other_faults():
    class Dying:
        def die(self):
            os._exit(1)

    with pytest.raises(ActorLostError, match="an actor: expected it to live"):
        waiting.get_result(ray.remote(Dying).remote().die.remote())


def test_the_best_scores_alone_are_those_of_all(reference, small_dataset, tmp_path):
    run = evaluate(small_dataset, tmp_path / "out", epochs=3, scores="top")
    assert run["metrics"] == reference["metrics"]
    [part] = (tmp_path / "out" / "predictions").iterdir()
    for row in pq.read_table(part).to_pylist():
        for name in ("nearest_mean_l1", "sgd_linear"):
            assert row[f"{name}_top_classes"][0] == row[f"{name}_prediction"]
            assert row[f"{name}_class_score"] in row[f"{name}_top_scores"]
