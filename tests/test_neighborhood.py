"""Neighbors, near-duplicates and doubtful labels of whole jobs, against scikit-learn and plain loops."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_search import nearest_in_a_loop
from test_twins import add_noise, as_jpeg, drawings, move

from pipeline import plan
from pipeline.compute import lanes, neighborhood
from pipeline.compute.threads import Threads
from pipeline.config import Config
from pipeline.driver import job
from pipeline.target import Target

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

CPU = torch.device("cpu")
COLUMNS = ["key", "class", "neighbor_keys", "neighbor_classes", "neighbor_distances"]


def evaluate(data, out, on_progress=lambda progress: None, **options):
    given = {"device": "cpu", "epochs": 0, "report": False, **options}
    return job.evaluate(Config(data=str(data), out=str(out), **given), on_progress)


def read(out, table):
    return pq.read_table(out / table).to_pylist()


def accuracy(run, classifier):
    [row] = [row for row in run["metrics"] if (row["classifier"], row["scope"]) == (classifier, "all")]
    return row["num_correct"]


def read_images(root, split):
    """Keys, classes and pixels of a dataset of class folders, in the order of the listing."""
    paths = sorted((root / split).glob("*/*.png"), key=lambda path: (path.parent.name, str(path)))
    pixels = np.stack([np.asarray(Image.open(path)).reshape(-1) for path in paths])
    return [str(path.relative_to(root)) for path in paths], [path.parent.name for path in paths], pixels


def write_pictures(folder, images, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, first):
        Image.fromarray(image.squeeze()).save(folder / f"{number:03}.png")


@pytest.mark.parametrize("num_neighbors", [1, 3, 5])
def test_votes_are_those_of_scikit_learn(tmp_path, num_neighbors):
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    digits = load_digits()
    pixels = np.rint(digits.data * 255 / 16)
    model = KNeighborsClassifier(num_neighbors, algorithm="brute").fit(pixels[:898], digits.target[:898])
    run = evaluate("digits", tmp_path / "out", neighbors=num_neighbors)
    rows = read(tmp_path / "out", "predictions")
    assert accuracy(run, f"knn_{num_neighbors}") == (model.predict(pixels[898:]) == digits.target[898:]).sum()
    shares = np.array([row[f"knn_{num_neighbors}_scores"] for row in rows])
    images = [int(row["key"].removesuffix(".png")[-4:]) for row in rows]  # counted through both splits
    np.testing.assert_allclose(shares, model.predict_proba(pixels[images]), atol=1e-6)
    listed = sorted(range(898), key=lambda image: (digits.target[image], image))
    nearest = nearest_in_a_loop(pixels[images], pixels[listed], range(898), digits.target[listed], num_neighbors)
    found = [[int(key.removesuffix(".png")[-4:]) for key in row["neighbor_keys"]] for row in rows]
    assert found == [[listed[row] for _, row, _ in order] for order in nearest]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two classes of drawings, of which five to validate on are training images once more; and two labels changed."""
    root, shape = tmp_path_factory.mktemp("drawn"), (28, 28, 1)
    soft, hard = drawings(60, shape), 255 - drawings(60, shape, seed=3)
    write_pictures(root / "train/soft", soft[:40])
    write_pictures(root / "train/hard", hard[:39])
    write_pictures(root / "train/hard", soft[40:41], first=90)
    write_pictures(root / "valid/soft", soft[45:])
    write_pictures(root / "valid/hard", hard[45:])
    write_pictures(root / "valid/hard", soft[41:42], first=91)
    changed = [move(soft[:1], 1, 0), add_noise(soft[1:2]), as_jpeg(soft[2:3]), move(soft[3:4], -1, -1)]
    write_pictures(root / "valid/soft", np.concatenate([*changed, soft[4:5]]), first=80)
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"actors": 2},
        pytest.param({"actors": 4, "lanes": 4}, marks=pytest.mark.long),
        {"epochs": 2},
        {"shard_images": 7},
    ],
    ids=str,
)
def test_neighbors_are_those_of_a_plain_loop_whatever_the_job(drawn, tmp_path, options):
    keys, classes, pixels = read_images(drawn, "train")
    valid_keys, valid_classes, valid_pixels = read_images(drawn, "valid")
    evaluate(drawn, tmp_path / "out", **options)
    expected = []
    nearest = nearest_in_a_loop(valid_pixels, pixels, range(len(keys)), [0] * len(keys), 5)
    for key, name, found in zip(valid_keys, valid_classes, nearest, strict=True):
        rows = [row for _, row, _ in found]
        distances = [np.float32(np.sqrt(distance / 784) / 255).item() for distance, _, _ in found]
        expected.append((key, name, [keys[row] for row in rows], [classes[row] for row in rows], distances))
    assert [tuple(row[name] for name in COLUMNS) for row in read(tmp_path / "out", "predictions")] == expected


@pytest.mark.parametrize("num_train", [3, 20])  # fewer than neighbors, and more
def test_requests_all_images_of_which_are_skipped_change_nothing(tmp_path, monkeypatch, num_train):
    monkeypatch.setattr(plan, "_REQUEST_BYTES", 3 * 784)
    images = drawings(30, (28, 28, 1))
    for name in ("a", "b"):
        write_pictures(tmp_path / "data/train" / name, images[:num_train] if name == "a" else 255 - images[:1])
        write_pictures(tmp_path / "data/valid" / name, images[20:27] if name == "a" else 255 - images[27:])
    evaluate(tmp_path / "data", tmp_path / "whole")
    for number in range(8):
        (tmp_path / f"data/valid/a/-{number}.png").write_bytes(b"no image")
        (tmp_path / f"data/valid/b/x{number}.png").write_bytes(b"no image")
    run = evaluate(tmp_path / "data", tmp_path / "out", neighbors_of="all")
    assert run["num_skipped"] == 16
    assert read(tmp_path / "out", "predictions") == read(tmp_path / "whole", "predictions")
    # No other training image is of its class.
    scores = {row["key"]: row["score"] for row in read(tmp_path / "out", "suspects.parquet")}
    assert scores["train/b/000.png"] == 1


@pytest.mark.parametrize("neighbors", [1, 5])
def test_twins_are_found_and_left_out_of_the_accuracy(drawn, tmp_path, neighbors):
    run = evaluate(drawn, tmp_path / "out", neighbors=neighbors)
    rows = read(tmp_path / "out", "duplicates.parquet")
    pairs = {}
    for row in rows:
        pairs.setdefault((row["kind"], row["group"]), []).append(row["key"])
    assert sorted(pairs.values()) == [[f"train/soft/00{n}.png", f"valid/soft/08{n}.png"] for n in range(5)]
    assert [row["kind"] for row in rows] == ["exact"] * 2 + ["near"] * 8
    assert all(row["ratio"] < 0.9 for row in rows[2:])  # to the fifth neighbor
    assert (run["neighbors"]["num_twins"], run["neighbors"]["num_near_twins"]) == (5, 4)
    num_right = accuracy(run, "knn_1") - 5
    assert run["neighbors"]["accuracy_without_twins"]["knn_1"] == num_right / (run["num_valid"] - 5)


@pytest.mark.parametrize("most", [0, 1000])
def test_twins_are_the_same_whether_signatures_are_kept(monkeypatch, most):
    monkeypatch.setattr(neighborhood, "_MAX_SIGNED", most)
    others = drawings(60, (28, 28, 1)).reshape(60, -1)
    images = move(others.reshape(60, 28, 28), 1, 0).reshape(60, -1)
    plan_of_one = plan.Plan(
        target=Target(28, 28, "L"), num_classes=2, assignment=plan.LaneAssignment(60, 8), part_sizes=(60,),
        has_training=False, batch_size=1, learning_rate=None, seed=0, gpus_per_actor=0.0, num_neighbors=5,
    )  # fmt: skip
    rows = np.arange(60)
    train = lanes.Lanes(plan_of_one, range(8), CPU, CPU, None)
    train.put(rows, torch.from_numpy(others), torch.zeros(60, dtype=torch.int64), pa.chunked_array([rows.astype(str)]))
    own = neighborhood.Neighborhood(plan_of_one, train, {}, CPU, Threads())
    queries = [neighborhood.Queries(images[part], None, None, 5, has_twins=True) for part in (slice(30), slice(30, 60))]
    found = [own.search(each).candidates for each in queries]
    nearest = np.concatenate([each.near.rows_NJ[:, 0] for each in found])
    assert (nearest == rows).mean() > 0.9
    assert own.num_blocks_done == (3 if most else 4)  # two searches by pixels, and one or two by signatures


def test_changed_labels_are_the_most_doubtful_of_their_split(drawn, tmp_path):
    run = evaluate(drawn, tmp_path / "out")
    suspects = read(tmp_path / "out", "suspects.parquet")
    assert run["neighbors"]["num_suspects"] == len(suspects)
    scores = [row["score"] for row in suspects]
    assert scores == sorted(scores, reverse=True)
    first = {row["split"]: row for row in reversed(suspects)}
    assert (first["train"]["key"], first["train"]["suggested_class"]) == ("train/hard/090.png", "soft")
    assert (first["valid"]["key"], first["valid"]["suggested_class"]) == ("valid/hard/091.png", "soft")


@pytest.mark.parametrize(("neighbors_of", "splits"), [("valid", {"valid"}), ("all", {"train", "valid"})])
def test_training_labels_are_doubted_where_that_is_asked_for(drawn, tmp_path, neighbors_of, splits):
    run = evaluate(drawn, tmp_path / "out", neighbors_of=neighbors_of)
    assert {row["split"] for row in read(tmp_path / "out", "suspects.parquet")} == splits
    assert run["neighbors"]["of"] == neighbors_of


def test_progress_counts_images(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_REQUEST_BYTES", 8 * 784)  # so that there is a middle
    shown = set()
    options = {"lanes": 7, "batch_size": 63}  # some lanes hold fewer images than others
    run = evaluate(drawn, tmp_path / "out", shown.add, neighbors_of="all", **options)
    searched = [progress for progress in shown if progress.phase == "neighbors" and progress.total > 1]
    assert run["num_listed"] in {progress.total for progress in searched}
    assert all(progress.done <= progress.total <= run["num_listed"] for progress in searched)


def test_without_neighbors_nothing_is_said_of_them(drawn, tmp_path):
    run = evaluate(drawn, tmp_path / "out", neighbors=0)
    assert run["neighbors"] is None
    assert "neighbors" not in run["seconds"]
    assert {row["classifier"] for row in run["metrics"]} == {"majority_class", "nearest_mean_l1", "nearest_mean_rms"}
    assert not [name for name in read(tmp_path / "out", "predictions")[0] if "neighbor" in name or "knn" in name]
    assert [row["kind"] for row in read(tmp_path / "out", "duplicates.parquet")] == ["exact", "exact"]
    assert read(tmp_path / "out", "suspects.parquet") == []


def test_with_more_neighbors_than_images_all_are_neighbors(drawn, tmp_path):
    run = evaluate(drawn, tmp_path / "out", neighbors=100)
    assert {len(row["neighbor_keys"]) for row in read(tmp_path / "out", "predictions")} == {80}
    assert accuracy(run, "knn_100") == accuracy(run, "majority_class")


def test_what_takes_long_is_left_out_and_said(drawn, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(plan, "_MAX_PRODUCTS", 80 * 36 * 784 - 1)
    run = evaluate(drawn, tmp_path / "out")
    assert run["neighbors"] is None
    assert "80 x 36 images of 784 values take some 0.0 hours of a core; --neighbors 5 asks for it" in caplog.text


@pytest.mark.data
@pytest.mark.long
@pytest.mark.parametrize("dataset", ["mnist_sample", "mnist_png", "fashion_mnist"])
def test_neighbors_of_real_images_are_those_of_a_plain_loop(request, tmp_path, dataset):
    root = request.getfixturevalue(dataset)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train").symlink_to(root / "train")
    chosen = sorted((root / "valid").glob("*/*.png"))
    for path in chosen[:: len(chosen) // 500]:
        (data / "valid" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / "valid" / path.parent.name / path.name).symlink_to(path)
    evaluate(data, tmp_path / "out")
    _, _, pixels = read_images(data, "valid")
    paths = sorted((root / "train").glob("*/*.png"))
    others = np.stack([np.asarray(Image.open(path)).reshape(-1) for path in paths]).astype(np.int64)
    for image, row in zip(pixels, read(tmp_path / "out", "predictions"), strict=True):
        distances = ((others - image) ** 2).sum(1)
        order = np.argsort(distances, kind="stable")[:5]
        expected = np.sqrt(distances[order] / 784) / 255
        np.testing.assert_allclose(row["neighbor_distances"], expected, rtol=1e-6)
        assert row["neighbor_keys"] == [str(paths[index].relative_to(root)) for index in order]
