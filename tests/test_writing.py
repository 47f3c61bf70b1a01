import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline.data.storage import temporary_beside
from pipeline.errors import OutputError
from pipeline.plan import Target
from pipeline.results.checkpoint import Checkpoint, delete_checkpoint, read_checkpoint, write_checkpoint
from pipeline.results.figures import EpochMetric, accuracies
from pipeline.results.tables import (
    SKIPPED_SCHEMA,
    confusion_table,
    history_table,
    means_table,
    metrics_table,
    predictions_table,
    weights_table,
)
from pipeline.results.writing import Output, combine_digests, prepare, write_run, write_table, write_tables

CLASSES = ("3", "7", "ä")
TARGET = Target(2, 3, "RGB")
CLASSIFIERS = ("nearest_mean_l1", "nearest_mean_rms", "sgd_linear")
FINGERPRINT = {"listing": "abc", "--learning-rate": 0.1, "--seed": 2**63 - 1}
HISTORY = [
    EpochMetric(1, 97, 0.1 + 0.2, 1 / 3, 1e-300, 0.9, 0.8, 1e17 / 3, 1.5),
    EpochMetric(2, 97, 0.25, 0.5, 0.75, 1.0, 0.0, 0.125, 2.5),
]
SCHEMAS = {
    "metrics": {
        "classifier": "string", "scope": "string", "class": "string", "num_images": "int64", "num_correct": "int64",
        "accuracy": "double", "accuracy_low": "double", "accuracy_high": "double",
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
        "gradient_norm": "double", "seconds": "double",
    },
    "skipped": {"key": "string", "split": "string", "class": "string", "reason": "string", "error": "string"},
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
}  # fmt: skip
NUMBERS = pa.table({"a": pa.array([1, None, 3], pa.int32()), "b": ["x", "ä", None], "c": [[1.5], [], [2.5, 3.5]]})


@pytest.fixture
def output(tmp_path):
    made = Output.at(str(tmp_path / "out"))
    prepare(made, overwrite=False, resume=False)
    return made


@pytest.fixture
def memory_output():
    """A file system in memory, which like an object store is no local one."""
    made = Output.at("mock:///bucket/out")
    prepare(made, overwrite=False, resume=False)
    return made


def make_tables():
    confusion_KK = np.array([[4, 0, 1], [2, 3, 0], [0, 1, 1]])
    labels_N, predictions_N = np.array([0, 1, 2, 2]), np.array([0, 0, 2, 1])
    scores_NK = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 0.75], [0, 0, 1]], np.float32)
    keys = pa.array([f"valid/{CLASSES[label]}/{row % 2}.png" for row, label in enumerate(labels_N)])
    rows = [row for name in CLASSIFIERS for row in accuracies(name, CLASSES, confusion_KK)]
    return {
        "metrics": metrics_table(rows),
        "confusion": confusion_table(CLASSES, dict.fromkeys(CLASSIFIERS, confusion_KK)),
        "predictions/part-00000": predictions_table(
            CLASSES, keys, labels_N, dict.fromkeys(CLASSIFIERS, predictions_N), dict.fromkeys(CLASSIFIERS, scores_NK)
        ),
        "means": means_table(CLASSES, TARGET, np.arange(1, 4), np.arange(54, dtype=np.float32).reshape(3, 18)),
        "weights": weights_table(CLASSES, TARGET, np.arange(57, dtype=np.float32), np.zeros(18)),
        "history": history_table(HISTORY),
        "skipped": pa.table([["k", "l"], ["train"] * 2, ["3", "7"], ["empty"] * 2, ["no bytes"] * 2],
                            schema=SKIPPED_SCHEMA),
    }  # fmt: skip


def path_of(output, name):
    return f"{output.root}/{name}.parquet"


def digest_of(output, table, name="metrics"):
    return write_table(output, name, table)


def names_in(output):
    filesystem, root = output.filesystem
    infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    return sorted(info.path[len(root) + 1 :] for info in infos if info.type == pafs.FileType.File)


def tree_of(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def fail_half_way(error):
    yield NUMBERS
    raise error


def read_bytes(output, name):
    filesystem, root = output.filesystem
    return filesystem.open_input_file(f"{root}/{name}").read()


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
    assert nulls == {"class", "num_images", "num_correct", "accuracy_low", "accuracy_high"}


def test_confusion_has_the_pairs_that_occur():
    rows = make_tables()["confusion"].to_pylist()
    assert [(row["true_class"], row["predicted_class"], row["num_images"]) for row in rows[:6]] == [
        ("3", "3", 4), ("3", "ä", 1), ("7", "3", 2), ("7", "7", 3), ("ä", "7", 1), ("ä", "ä", 1),
    ]  # fmt: skip
    assert [row["classifier"] for row in rows] == [name for name in CLASSIFIERS for _ in range(6)]


def test_means_are_row_major_by_height_width_and_channel():
    means_KD = np.random.default_rng(0).random((3, 18), np.float32)
    [_, row, _] = means_table(CLASSES, TARGET, np.arange(3), means_KD).to_pylist()
    image_HWC = np.array(row["mean"], np.float32).reshape(row["height"], row["width"], row["channels"])
    np.testing.assert_array_equal(image_HWC, means_KD[1].reshape(2, 3, 3))


def test_predictions_of_no_image_are_an_empty_part(output):
    none_N, none_NK = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
    table = predictions_table(CLASSES, pa.array([], pa.string()), none_N, {"a": none_N}, {"a": none_NK})
    write_table(output, "predictions/part-00000", table)
    got = pq.read_table(path_of(output, "predictions/part-00000"))
    assert (len(got), got.column_names) == (0, ["key", "class", "a_prediction", "a_scores"])


def test_several_tables_become_one_file_and_none_an_empty_one(output):
    skipped = make_tables()["skipped"]
    write_tables(output, "skipped", SKIPPED_SCHEMA, [skipped, skipped[:1]])
    assert pq.read_table(path_of(output, "skipped")).to_pylist() == [*skipped.to_pylist(), skipped.to_pylist()[0]]
    write_tables(output, "skipped", SKIPPED_SCHEMA, iter([]))
    assert pq.read_table(path_of(output, "skipped")).schema.equals(SKIPPED_SCHEMA)


def test_all_parts_are_read_as_one_folder(output):
    table = make_tables()["predictions/part-00000"]
    for part in range(3):
        write_table(output, f"predictions/part-{part:05d}", table)
    assert len(pq.read_table(f"{output.root}/predictions")) == 12
    assert duckdb.sql(f"SELECT count(*) FROM '{output.root}/predictions/*.parquet'").fetchall() == [(12,)]


@pytest.mark.parametrize("error", [RuntimeError("half"), OutputError("half"), KeyboardInterrupt("half")])
def test_a_write_that_fails_half_way_leaves_nothing(output, error):
    with pytest.raises(type(error), match="half"):
        write_tables(output, "means", NUMBERS.schema, fail_half_way(error))
    assert names_in(output) == []


def test_a_write_that_fails_half_way_leaves_the_older_file(output):
    write_table(output, "means", NUMBERS)
    before = tree_of(Path(output.root))
    with pytest.raises(RuntimeError, match="half"):
        write_tables(output, "means", NUMBERS.schema, fail_half_way(RuntimeError("half")))
    assert tree_of(Path(output.root)) == before


def test_an_object_store_shows_nothing_of_a_write_that_fails_half_way(memory_output):
    with pytest.raises(RuntimeError, match="half"):
        write_tables(memory_output, "means", NUMBERS.schema, fail_half_way(RuntimeError("half")))
    assert names_in(memory_output) == []


def test_an_object_store_keeps_the_older_object_when_a_write_fails_half_way(memory_output):
    write_table(memory_output, "means", NUMBERS[:1])
    before = read_bytes(memory_output, "means.parquet")
    with pytest.raises(RuntimeError, match="half"):
        write_tables(memory_output, "means", NUMBERS.schema, fail_half_way(RuntimeError("half")))
    assert read_bytes(memory_output, "means.parquet") == before


def test_a_file_is_there_under_its_name_only_when_it_is_complete(output):
    def tables():
        yield NUMBERS
        seen.append(names_in(output))
        yield NUMBERS

    seen = []
    write_tables(output, "means", NUMBERS.schema, tables())
    assert seen == [[temporary_beside("means.parquet").name]]
    assert names_in(output) == ["means.parquet"]


def test_who_reads_the_older_file_reads_it_to_its_end(output):
    write_table(output, "means", NUMBERS)
    before = read_bytes(output, "means.parquet")
    with Path(path_of(output, "means")).open("rb") as stream:
        write_table(output, "means", NUMBERS[:1])
        assert stream.read() == before


@pytest.mark.parametrize(
    "write", [lambda out: write_table(out, "means", NUMBERS), lambda out: write_run(out, {"a": 1})]
)
def test_a_place_that_is_gone_is_said_in_one_line(tmp_path, write):
    (tmp_path / "file").touch()
    output = Output.at(str(tmp_path / "file" / "out"))
    with pytest.raises(
        OutputError, match=r"out/(means\.parquet|run\.json): expected to write it, got Not a dir"
    ) as caught:
        write(output)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_in_one_line(output):
    # A device that is always full stands where the file should go.
    temporary_beside(f"{output.root}/means.parquet").symlink_to("/dev/full")
    table = pa.table({"a": np.random.default_rng(0).random(10**6)})
    with pytest.raises(
        OutputError, match=r"means\.parquet: expected to write it, got .*No space left on device.*; make"
    ):
        write_table(output, "means", table)
    assert names_in(output) == []


@pytest.mark.parametrize("out", ["nosuch://bucket/out", "s3://bucket/a b", "s3://"])
def test_a_uri_that_cannot_be_opened_is_refused_in_one_line(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^--out: expected a URI that can be opened, got ") as caught:
        Output.at(out).filesystem  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_local_output_is_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    roots = [Output.at(out).root for out in ("a/b/", "./c/../d", "~/e", f"file://{tmp_path}/f", "a b/ä")]
    assert roots == [str(tmp_path / name) for name in ("a/b", "d", "home/e", "f", "a b/ä")]


def test_a_local_output_keeps_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert Output.at(str(tmp_path / "link" / "out")).root == str(tmp_path / "link" / "out")


@pytest.mark.parametrize("name", ["a%20b", "%C3%A4", "100%25"])
def test_a_file_uri_is_read_as_for_the_data(tmp_path, name):
    uri = f"file://{tmp_path}/{name}"
    _, path = pafs.FileSystem.from_uri(uri)
    assert Output.at(uri).root == path


def test_a_uri_with_a_host_of_its_own_is_no_folder_here(tmp_path):
    assert Output.at(f"file://localhost{tmp_path}/out").root == f"{tmp_path}/out"


@pytest.mark.parametrize("name", ["with space", "ä ö/ü", "run=1", "a,b;c", "100% 'quoted'", "_hidden", ".dot"])
def test_odd_names_work_for_all_that_is_written_and_read(tmp_path, name):
    output = Output.at(str(tmp_path / name))
    prepare(output, overwrite=False, resume=False)
    write_table(output, "history", history_table(HISTORY))
    write_run(output, {"out": output.root})
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32)))
    assert names_in(output) == ["checkpoint.parquet", "history.parquet", "run.json"]
    assert read_checkpoint(output, FINGERPRINT).params_P.tolist() == [0, 0, 0]
    prepare(output, overwrite=True, resume=False)
    assert names_in(output) == []


def test_an_output_crosses_a_pickle_after_its_use(output):
    assert pickle.loads(pickle.dumps(output)) == output
    assert pickle.loads(pickle.dumps(output)).filesystem[1] == output.root


@pytest.mark.parametrize("overwrite_resume", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("is_there", [False, True])
def test_new_and_empty_folders_are_taken(tmp_path, overwrite_resume, is_there):
    folder = tmp_path / "a" / "b"
    if is_there:
        folder.mkdir(parents=True)
    overwrite, resume = overwrite_resume
    prepare(Output.at(str(folder)), overwrite=overwrite, resume=resume)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["predictions"]


@pytest.mark.parametrize("name", ["run.json", "metrics.parquet", "notes.txt", ".hidden", "sub/deep/file"])
def test_a_folder_that_holds_anything_is_refused_and_left_as_it_is(tmp_path, name):
    fill(tmp_path, name)
    before = tree_of(tmp_path)
    with pytest.raises(OutputError, match=r"^--out .*: expected a new or empty folder, got one with 1 files?; choose"):
        prepare(Output.at(str(tmp_path)), overwrite=False, resume=False)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("overwrite_resume", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "name",
    ["notes.txt", ".bashrc", "photos/part-00000.parquet", "predictions/cat.png", "sub/run.json", "metrics.parquet.bak",
     "predictions/part-1.parquet/metrics.parquet", ".metrics.parquet", "other.parquet", ".notes.txt.1.tmp"],
)  # fmt: skip
def test_what_is_not_of_this_job_is_never_touched(tmp_path, overwrite_resume, name):
    fill(tmp_path, name, "metrics.parquet" if name != "metrics.parquet" else "means.parquet")
    before = tree_of(tmp_path)
    overwrite, resume = overwrite_resume
    with pytest.raises(
        OutputError, match=r"^--out .*: expected only results of this job, got .*; choose another folder"
    ):
        prepare(Output.at(str(tmp_path)), overwrite=overwrite, resume=resume)
    assert tree_of(tmp_path) == before


def test_overwrite_removes_all_of_a_finished_run(tmp_path):
    names = ["run.json", "metrics.parquet", "skipped.parquet", "checkpoint.parquet", "predictions/part-00012.parquet",
             ".means.parquet.12.tmp", "predictions/.part-00012.parquet.34.tmp", ".run.json.5.tmp"]  # fmt: skip
    fill(tmp_path, *names)
    output = Output.at(str(tmp_path))
    prepare(output, overwrite=True, resume=False)
    assert names_in(output) == []


def test_resume_keeps_the_checkpoint_alone(tmp_path):
    fill(tmp_path, "checkpoint.parquet", "metrics.parquet", "predictions/part-00000.parquet", ".means.parquet.1.tmp")
    output = Output.at(str(tmp_path))
    prepare(output, overwrite=False, resume=True)
    assert names_in(output) == ["checkpoint.parquet"]


def test_a_finished_run_is_not_resumed(tmp_path):
    fill(tmp_path, "run.json", "metrics.parquet")
    before = tree_of(tmp_path)
    with pytest.raises(OutputError, match=r"^--out .*: expected an unfinished run to resume, got a finished one; give"):
        prepare(Output.at(str(tmp_path)), overwrite=False, resume=True)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("below", [".", "out", "a/b"])
def test_a_file_in_the_way_is_said_in_one_line(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^--out .*: expected to write there, got .*; choose another$") as caught:
        prepare(Output.at(str(tmp_path / "file" / below)), overwrite=True, resume=False)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_links_in_the_folder_lead_nowhere_to_delete(tmp_path):
    fill(tmp_path, "home/run.json", "home/metrics.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions").symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match="expected only results of this job, got predictions/"):
        prepare(Output.at(str(tmp_path / "out")), overwrite=True, resume=False)
    assert (tmp_path / "home" / "run.json").exists()


def test_a_uri_is_prepared_written_and_read_alike(memory_output):
    write_table(memory_output, "history", history_table(HISTORY))
    write_checkpoint(memory_output, Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32)))
    write_run(memory_output, {"a": 1})
    assert names_in(memory_output) == ["checkpoint.parquet", "history.parquet", "run.json"]
    assert read_checkpoint(memory_output, FINGERPRINT).history == HISTORY
    with pytest.raises(OutputError, match="expected a new or empty folder, got one with 3 files"):
        prepare(memory_output, overwrite=False, resume=False)
    delete_checkpoint(memory_output)
    prepare(memory_output, overwrite=True, resume=False)
    assert names_in(memory_output) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_same_content_has_the_same_digest_however_it_is_chunked(output, name):
    table = make_tables()[name]
    expected = digest_of(output, table)
    pieces = pa.concat_tables([table[:1], table[1:1], table[1:]])
    cut_out = pa.concat_tables([table, table]).combine_chunks()[len(table) :]
    assert digest_of(output, pieces) == expected
    assert digest_of(output, cut_out) == expected
    assert digest_of(output, make_tables()[name], "means") == expected


def test_nulls_have_the_same_digest_however_they_are_chunked(output):
    expected = digest_of(output, NUMBERS)
    assert digest_of(output, pa.concat_tables([NUMBERS[:2], NUMBERS[2:]])) == expected
    assert digest_of(output, pa.concat_tables([NUMBERS, NUMBERS]).combine_chunks()[3:]) == expected
    assert digest_of(output, pa.table(NUMBERS.to_pydict(), schema=NUMBERS.schema)) == expected


def test_a_digest_does_not_count_seconds(output):
    other = [replace(row, seconds=row.seconds + 1) for row in HISTORY]
    assert digest_of(output, history_table(other)) == digest_of(output, history_table(HISTORY))
    assert pq.read_table(path_of(output, "metrics"))["seconds"].to_pylist() == [1.5, 2.5]


@pytest.mark.parametrize("name", SCHEMAS)
def test_another_value_is_another_digest(output, name):
    table = make_tables()[name]
    expected = digest_of(output, table)
    for place, column in enumerate(table.column_names):
        rolled = table[column].take(pa.array([*range(1, len(table)), 0]))
        if column != "seconds" and not rolled.equals(table[column]):
            assert digest_of(output, table.set_column(place, column, rolled)) != expected


@pytest.mark.parametrize("name", SCHEMAS)
def test_another_name_order_or_number_of_rows_is_another_digest(output, name):
    table = make_tables()[name]
    renamed = table.rename_columns(["other", *table.column_names[1:]])
    turned = table.take(pa.array(range(len(table)))[::-1])
    assert len({digest_of(output, other) for other in (table, renamed, turned, table[:-1])}) == 4


def test_one_bit_makes_another_digest(output):
    values = np.array([0.5, 1.0], np.float32)
    nudged = np.nextafter(values, 2, dtype=np.float32)
    assert digest_of(output, pa.table({"a": values})) != digest_of(output, pa.table({"a": nudged}))
    assert digest_of(output, pa.table({"a": [0.0]})) != digest_of(output, pa.table({"a": [-0.0]}))


def test_digests_combine_by_name_in_any_order():
    digests = {"metrics": "a", "means": "b"}
    assert combine_digests(digests) == combine_digests(dict(reversed(digests.items())))
    assert len({combine_digests(d) for d in (digests, {"metrics": "b", "means": "a"}, {"metrics": "a"})}) == 3


def test_a_checkpoint_comes_back_bit_for_bit(output):
    params_P = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    params_P[:4] = [-0.0, np.inf, np.nan, 1e-45]
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, params_P))
    got = read_checkpoint(output, dict(FINGERPRINT))
    assert (got.fingerprint, got.history) == (FINGERPRINT, HISTORY)
    assert (got.params_P.dtype, got.params_P.tobytes()) == (np.float32, params_P.tobytes())


def test_there_is_no_checkpoint_before_an_epoch_or_after_its_deletion(output):
    assert read_checkpoint(output, FINGERPRINT) is None
    delete_checkpoint(output)
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32)))
    delete_checkpoint(output)
    assert read_checkpoint(output, FINGERPRINT) is None


def test_a_checkpoint_of_other_files_is_refused(output):
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32)))
    with pytest.raises(OutputError, match=r"^--resume: expected the files, with which .* was begun, got others; run"):
        read_checkpoint(output, {**FINGERPRINT, "listing": "x"})


@pytest.mark.parametrize("change", [{"--learning-rate": 0.2}, {"--seed": 0}, {"--lanes": 8}])
def test_a_checkpoint_of_other_options_is_refused(output, change):
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32)))
    [(name, value)] = change.items()
    with pytest.raises(OutputError, match=rf"^--resume: expected {name} {FINGERPRINT.get(name)}, .* got {value}; run"):
        read_checkpoint(output, {**FINGERPRINT, **change})


@pytest.mark.parametrize("content", [b"", b"no Parquet at all", None])
def test_what_is_no_checkpoint_is_said_in_one_line(output, content):
    if content is None:
        write_table(output, "checkpoint", NUMBERS)
    else:
        (Path(output.root) / "checkpoint.parquet").write_bytes(content)
    with pytest.raises(OutputError, match=r"checkpoint\.parquet: expected") as caught:
        read_checkpoint(output, FINGERPRINT)
    assert "\n" not in str(caught.value)


def test_run_json_is_whole_or_not_there(output):
    write_run(output, {"name": "ä", "history": [asdict(row) for row in HISTORY], "none": None})
    before = read_bytes(output, "run.json")
    assert json.loads(before)["history"][0]["train_loss"] == 0.1 + 0.2
    assert "ä".encode() in before
    for bad in ({"loss": float("nan")}, {"loss": {1, 2}}):
        with pytest.raises((ValueError, TypeError), match=r"not JSON|serializable"):
            write_run(output, bad)
    assert names_in(output) == ["run.json"]
    assert read_bytes(output, "run.json") == before


def test_a_path_that_is_no_text_is_written_and_read_back(tmp_path):
    path = os.fsdecode(b"/data/im\xe9ges")
    write_run(Output.at(str(tmp_path)), {"root": path, "ä": 1})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"root": path, "ä": 1}


def test_rows_that_are_parted_otherwise_have_the_same_digest(output):
    whole = write_tables(output, "skipped", NUMBERS.schema, [NUMBERS])
    assert write_tables(output, "skipped", NUMBERS.schema, [NUMBERS[:1], NUMBERS[1:]]) == whole
    assert write_tables(output, "skipped", NUMBERS.schema, [NUMBERS[1:], NUMBERS[:1]]) != whole


def test_what_killed_writers_left_is_gone_when_a_run_is_finished(output):
    (Path(output.root) / "predictions" / ".part-00000.parquet.123.tmp").write_bytes(b"half")
    write_run(output, {})
    assert names_in(output) == ["run.json"]
