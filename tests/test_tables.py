"""The result tables as another reader finds them: columns, types and values."""

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import RESULT_CLASSES, RESULT_CLASSIFIERS, RESULT_TARGET, make_tables

from pipeline.decoding.images import Fault
from pipeline.results.tables import (
    SKIPPED_SCHEMA,
    NeighborColumns,
    choose_top,
    means_table,
    predictions_table,
    skipped_table,
    weights_table,
)
from pipeline.results.writing import Output, write_table

SCHEMAS = {
    "metrics": {
        "classifier": "string", "scope": "string", "class": "string", "num_images": "int64", "num_correct": "int64",
        "accuracy": "double", "accuracy_low": "double", "accuracy_high": "double", "precision": "double",
        "f1": "double", "top5_accuracy": "double",
    },
    "confusion": {
        "classifier": "string", "true_class": "string", "predicted_class": "string", "num_images": "int64",
    },
    "predictions/part-00000": {
        "key": "string", "class": "string",
        "nearest_mean_l1_prediction": "string", "nearest_mean_l1_scores": "fixed_size_list<element: float>[3]",
        "nearest_mean_rms_prediction": "string", "nearest_mean_rms_scores": "fixed_size_list<element: float>[3]",
        "sgd_linear_prediction": "string", "sgd_linear_scores": "fixed_size_list<element: float>[3]",
    },
    "means": {
        "class": "string", "num_images": "int64", "height": "int32", "width": "int32", "channels": "int32",
        "mean": "list<element: float>",
    },
    "weights": {
        "class": "string", "height": "int32", "width": "int32", "channels": "int32",
        "weights": "list<element: float>", "bias": "float",
    },
    "history": {
        "epoch": "int64", "num_steps": "int64", "train_loss": "double", "train_accuracy": "double",
        "valid_loss": "double", "valid_accuracy": "double", "valid_mean_class_accuracy": "double",
        "gradient_norm": "double", "seconds": "double", "step_losses": "list<element: double>",
        "step_slope": "double",
    },
    "skipped": {"key": "string", "split": "string", "class": "string", "reason": "string", "error": "string"},
    "duplicates": {
        "kind": "string", "group": "int64", "key": "string", "split": "string", "class": "string", "distance": "float",
        "ratio": "float",
    },
    "suspects": {
        "key": "string", "split": "string", "class": "string", "suggested_class": "string", "score": "float",
    },
}  # fmt: skip
QUERIES = {
    "metrics": ("SELECT num_correct FROM t WHERE classifier = 'sgd_linear' AND scope = 'all'", [(8,)]),
    "confusion": ("SELECT num_images FROM t WHERE true_class = '7' AND predicted_class = '3' LIMIT 1", [(2,)]),
    "predictions/part-00000": (
        'SELECT key, sgd_linear_prediction, round(nearest_mean_l1_scores[3], 3) FROM t WHERE "class" = \'ä\'',
        [("valid/ä/0.png", "ä", 0.75), ("valid/ä/1.png", "7", 1)],
    ),
    "means": ('SELECT "class", len(mean), mean[18] FROM t WHERE num_images > 1', [("7", 18, 35), ("ä", 18, 53)]),
    "weights": ('SELECT "class", len(weights), weights[1], bias FROM t', [("3", 18, 0, 54), ("7", 18, 18, 55),
                                                                        ("ä", 18, 36, 56)]),
    "history": ("SELECT epoch, seconds FROM t ORDER BY valid_accuracy DESC LIMIT 1", [(2, 2.5)]),
    "skipped": ("SELECT count(*), count(DISTINCT reason) FROM t", [(2, 1)]),
    "duplicates": ('SELECT "group", count(*), max(distance), count(ratio) FROM t GROUP BY 1', [(0, 2, 0, 0)]),
    "suspects": ("SELECT key, suggested_class FROM t WHERE score = 1 ORDER BY key", [("k", "7"), ("l", "3")]),
}  # fmt: skip


def path_of(output, name):
    return f"{output.root}/{name}.parquet"


@pytest.mark.parametrize("name", SCHEMAS)
def test_tables_have_the_columns_of_the_design(output, name):
    table = make_tables()[name]
    write_table(output, name, table)
    got = pq.read_table(path_of(output, name))
    types = {field.name: str(field.type).replace("item:", "element:") for field in got.schema}
    assert types == SCHEMAS[name]
    assert got.to_pylist() == table.to_pylist()


@pytest.mark.parametrize("name", SCHEMAS)
def test_duckdb_reads_tables(output, name):
    write_table(output, name, make_tables()[name])
    query, answer = QUERIES[name]
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW t AS FROM '{path_of(output, name)}'")
        assert connection.execute(query).fetchall() == answer


def test_the_mean_of_classes_has_no_class_counts_or_interval():
    rows = make_tables()["metrics"].to_pylist()
    assert [row["scope"] for row in rows] == ["class", "class", "class", "all", "mean_of_classes"] * 3
    nulls = {name for name, value in rows[4].items() if value is None}
    assert nulls == {"class", "num_images", "num_correct", "accuracy_low", "accuracy_high", "top5_accuracy"}


def test_confusion_has_the_pairs_that_occur():
    rows = make_tables()["confusion"].to_pylist()
    assert [(row["true_class"], row["predicted_class"], row["num_images"]) for row in rows[:6]] == [
        ("3", "3", 4), ("3", "ä", 1), ("7", "3", 2), ("7", "7", 3), ("ä", "7", 1), ("ä", "ä", 1),
    ]  # fmt: skip
    assert [row["classifier"] for row in rows] == [name for name in RESULT_CLASSIFIERS for _ in range(6)]


def test_means_are_row_major_by_height_width_and_channel():
    means_KD = np.random.default_rng(0).random((3, 18), np.float32)
    [_, row, _] = means_table(RESULT_CLASSES, RESULT_TARGET.sides, np.arange(3), means_KD).to_pylist()
    image_HWC = np.array(row["mean"], np.float32).reshape(row["height"], row["width"], row["channels"])
    np.testing.assert_array_equal(image_HWC, means_KD[1].reshape(2, 3, 3))


def test_predictions_of_no_image_are_an_empty_part(output):
    none_N, none_NK = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
    table = predictions_table(RESULT_CLASSES, pa.array([], pa.string()), none_N, {"a": none_N}, {"a": none_NK})
    write_table(output, "predictions/part-00000", table)
    got = pq.read_table(path_of(output, "predictions/part-00000"))
    assert (len(got), got.column_names) == (0, ["key", "class", "a_prediction", "a_scores"])


def test_skipped_images_are_laid_out_by_the_schema():
    empty, damaged = Fault("empty", "the file has no bytes"), Fault("damaged", "OSError: x")
    table = skipped_table([(b"train/7/1.png", 1, empty), (b"train/3/\xff.png", 0, damaged)], "train", ("3", "7"))
    assert table.schema == SKIPPED_SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("train/7/1.png", "train", "7", "empty", "the file has no bytes"),
        ("train/3/\\xff.png", "train", "3", "damaged", "OSError: x")]  # fmt: skip


def test_no_faults_make_an_empty_table_of_the_schema():
    table = skipped_table([], "valid", ("3", "7"))
    assert (len(table), table.schema) == (0, SKIPPED_SCHEMA)


@pytest.mark.parametrize("num_classes", [2, 10, 11, 1000])
@pytest.mark.parametrize("are_distances", [True, False])
def test_the_best_scores_are_those_of_a_stable_sort(num_classes, are_distances):
    random = np.random.default_rng(0)
    scores_NK = random.integers(-15, 15, (50, num_classes)).astype(np.float32) / 7  # many of them equal
    scores_NK[:, 0] = -np.inf
    labels_N = random.integers(0, num_classes, 50)
    top = choose_top(scores_NK, labels_N, are_distances=are_distances)
    for row, scores_K in enumerate(scores_NK):
        order = sorted(range(num_classes), key=lambda label: scores_K[label] if are_distances else -scores_K[label])
        assert top.labels_NT[row].tolist() == order[:10]
        assert top.scores_NT[row].tolist() == scores_K[order[:10]].tolist()
        assert top.own_N[row] == scores_K[labels_N[row]]


def test_best_scores_have_columns_of_their_own():
    scores_NK = np.arange(24, dtype=np.float32).reshape(2, 12)
    top = choose_top(scores_NK, np.array([3, 0]), are_distances=False)
    labels = {"a": np.array([11, 11])}
    classes = [f"c{label}" for label in range(12)]
    got = predictions_table(classes, pa.array(["x", "y"]), np.array([3, 0]), labels, {"a": top})
    assert got.column_names == ["key", "class", "a_prediction", "a_top_classes", "a_top_scores", "a_class_score"]
    assert got["a_top_classes"].to_pylist() == [[f"c{label}" for label in range(11, 1, -1)]] * 2
    assert got["a_top_scores"].to_pylist() == [list(range(11, 1, -1)), list(range(23, 13, -1))]
    assert got["a_class_score"].to_pylist() == [3, 12]


def test_predictions_of_many_classes_take_few_bytes(tmp_path):
    random = np.random.default_rng(0)
    classes = [f"n{number:08d}" for number in random.choice(10**8, 1000, replace=False)]
    labels_N = random.integers(0, 1000, 4000)
    names = ["nearest_mean_l1", "nearest_mean_rms", "knn_1", "knn_5", "sgd_linear"]
    scores = {
        name: choose_top(random.random((4000, 1000), np.float32), labels_N, are_distances=False) for name in names
    }
    keys = [f"valid/{classes[label]}/{random.integers(10**8):08d}.JPEG" for label in labels_N]
    neighbors = NeighborColumns(
        np.array([f"train/{random.integers(10**8):08d}.JPEG" for _ in range(20_000)], object).reshape(4000, 5),
        random.integers(0, 1000, (4000, 5)),
        random.random((4000, 5), np.float32),
    )
    predictions = {name: random.integers(0, 1000, 4000) for name in names}
    table = predictions_table(classes, pa.array(keys), labels_N, predictions, scores, neighbors)
    write_table(Output.at(str(tmp_path)), "part-00000", table)
    assert (tmp_path / "part-00000.parquet").stat().st_size <= 600 * 4000


def test_written_weights_are_for_features_as_they_are():
    random = np.random.default_rng(0)
    centre_D, scale_D, features_ND = random.normal(size=18), random.uniform(0.1, 10, 18), random.normal(size=(5, 18))
    params_P = random.normal(size=57).astype(np.float32)
    table = weights_table(("a", "b", "c"), (1, 18, 1), params_P, centre_D, scale_D)
    weights_KD, bias_K = np.array(table["weights"].to_pylist()), table["bias"].to_numpy()
    expected_NK = (features_ND - centre_D) * scale_D @ params_P[:-3].reshape(3, 18).T.astype(np.float64) + params_P[-3:]
    np.testing.assert_allclose(features_ND @ weights_KD.T + bias_K, expected_NK, rtol=1e-4, atol=1e-5)
