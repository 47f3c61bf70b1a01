"""Files of results: whole or not there, under the right folder, with digests that depend on their content alone."""

import json
import logging
import os
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from builders import HISTORY, RESULT_TABLES, make_tables, write_files

from pipeline.data.storage import temporary_beside
from pipeline.errors import OutputError
from pipeline.results.checkpoint import Checkpoint, delete_checkpoint, read_checkpoint, write_checkpoint
from pipeline.results.tables import SKIPPED_SCHEMA, history_table
from pipeline.results.writing import Output, combine_digests, prepare, write_run, write_table, write_tables

NUMBERS = pa.table({"a": pa.array([1, None, 3], pa.int32()), "b": ["x", "ä", None], "c": [[1.5], [], [2.5, 3.5]]})


def path_of(output, name):
    return f"{output.root}/{name}.parquet"


def prepare_at(folder, *, overwrite=False, resume=False):
    output = Output.at(str(folder))
    prepare(output, overwrite=overwrite, resume=resume)
    return output


def digest_of(output, table):
    return write_table(output, "metrics", table)


def names_in(output):
    store, root = output.store
    return sorted(entry.path[len(root) + 1 :] for entry in store.entries(root, recursive=True))


def tree_of(folder):
    return sorted((str(path), path.read_bytes() if path.is_file() else None) for path in folder.rglob("*"))


def fail_half_way(error):
    yield NUMBERS
    raise error


def read_bytes(output, name):
    store, root = output.store
    return store.read(f"{root}/{name}".encode(), lambda num_bytes: None)


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
def test_a_write_that_fails_half_way_leaves_nothing(any_output, error):
    with pytest.raises(type(error), match="half"):
        write_tables(any_output, "means", NUMBERS.schema, fail_half_way(error))
    assert names_in(any_output) == []


def test_a_write_that_fails_half_way_leaves_the_older_file(any_output):
    write_table(any_output, "means", NUMBERS[:1])
    before = read_bytes(any_output, "means.parquet")
    with pytest.raises(RuntimeError, match="half"):
        write_tables(any_output, "means", NUMBERS.schema, fail_half_way(RuntimeError("half")))
    assert (names_in(any_output), read_bytes(any_output, "means.parquet")) == (["means.parquet"], before)


def test_a_reader_of_the_older_file_reads_it_to_its_end(output):
    write_table(output, "means", NUMBERS)
    before = read_bytes(output, "means.parquet")
    with Path(path_of(output, "means")).open("rb") as stream:
        write_table(output, "means", NUMBERS[:1])
        assert stream.read() == before


@pytest.mark.parametrize(
    "write", [lambda out: write_table(out, "means", NUMBERS), lambda out: write_run(out, {"a": 1})]
)
def test_a_folder_that_is_gone_is_said_in_one_line(tmp_path, write):
    (tmp_path / "file").touch()
    output = Output.at(str(tmp_path / "file" / "out"))
    with pytest.raises(OutputError, match=r"out/(means\.parquet|run\.json): expected .*, got Not a dir") as caught:
        write(output)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_said_in_one_line(output):
    # A device that is always full stands where the file should go.
    temporary_beside(f"{output.root}/means.parquet").symlink_to("/dev/full")
    table = pa.table({"a": np.random.default_rng(0).random(10**6)})
    with pytest.raises(OutputError, match=r"means\.parquet: expected .*, got .*No space left"):
        write_table(output, "means", table)
    assert names_in(output) == []


@pytest.mark.parametrize("out", ["nosuch://bucket/out", "s3://buck et/a", "s3://"])
def test_a_uri_that_cannot_be_opened_is_refused_in_one_line(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^--out: expected a URI .*, got ") as caught:
        Output.at(out).store  # noqa: B018
    assert "\n" not in str(caught.value)


def test_a_local_output_is_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    roots = [Output.at(out).root for out in ("a/b/", "./c/../d", "~/e", f"file://{tmp_path}/f", "a b/ä")]
    assert roots == [str(tmp_path / name) for name in ("a/b", "d", "home/e", "f", "a b/ä")]


@pytest.mark.parametrize("name", ["a%20b", "%C3%A4", "100%25"])
def test_a_file_uri_is_read_as_for_the_data(tmp_path, name):
    uri = f"file://{tmp_path}/{name}"
    assert Output.at(uri).root == pafs.FileSystem.from_uri(uri)[1]
    assert Output.at(f"file://localhost{tmp_path}/out").root == f"{tmp_path}/out"  # a host of its own is no folder here


@pytest.mark.parametrize("name", ["with space", "ä ö/ü", "run=1", "a,b;c", "100% 'quoted'", "_hidden", ".dot"])
def test_odd_names_work_for_all_that_is_written_and_read(tmp_path, name):
    output = prepare_at(tmp_path / name)
    write_table(output, "history", history_table(HISTORY))
    write_run(output, {"out": output.root})
    write_checkpoint(output, Checkpoint({}, HISTORY, np.zeros(3, np.float32)))
    assert names_in(output) == ["checkpoint.parquet", "history.parquet", "run.json"]
    assert read_checkpoint(output, {}).params.tolist() == [0, 0, 0]
    assert names_in(prepare_at(tmp_path / name, overwrite=True)) == []


def test_an_output_crosses_a_pickle_after_its_use(output):
    assert pickle.loads(pickle.dumps(output)) == output
    assert pickle.loads(pickle.dumps(output)).store[1] == output.root


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("is_there", [False, True])
def test_new_and_empty_folders_are_taken(tmp_path, options, is_there):
    folder = tmp_path / "a" / "b"
    if is_there:
        folder.mkdir(parents=True)
    prepare_at(folder, **options)
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["predictions"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["notes.txt"], "one with 1 file; choose another$"),
        ([".hidden", "run.json"], "one with 2 files; choose another$"),
        (["sub/deep/file"], "one with 1 file; choose another$"),
        (["run.json", "metrics.parquet"], "a finished run; choose another, or replace it with --overwrite$"),
        (["checkpoint.parquet"], "an unfinished run; go on with it by --resume, or start over by --overwrite$"),
        (["predictions/part-00000.parquet"], "an unfinished run; go on with it by --resume"),
    ],
)
def test_a_folder_that_holds_anything_is_refused_and_left_as_it_is(tmp_path, names, found):
    before = tree_of(write_files(tmp_path, names))
    with pytest.raises(OutputError, match=rf"^--out .*: expected a new or empty folder, got {found}"):
        prepare_at(tmp_path)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("option", ["overwrite", "resume"])
@pytest.mark.parametrize(
    "name",
    ["notes.txt", ".bashrc", "photos/part-00000.parquet", "predictions/cat.png", "sub/run.json", "metrics.parquet.bak",
     "predictions/part-1.parquet/metrics.parquet", ".metrics.parquet", "other.parquet", ".notes.txt.1.tmp"],
)  # fmt: skip
def test_what_is_not_of_this_job_is_never_touched(tmp_path, option, name):
    before = tree_of(write_files(tmp_path, [name, "metrics.parquet"]))
    with pytest.raises(OutputError, match=r"^--out .*: expected only results of this job, got "):
        prepare_at(tmp_path, **{option: True})
    assert tree_of(tmp_path) == before


def test_overwrite_removes_all_of_a_finished_run(tmp_path):
    names = ["run.json", "metrics.parquet", "skipped.parquet", "checkpoint.parquet", "predictions/part-00012.parquet",
             ".means.parquet.12.tmp", "predictions/.part-00012.parquet.34.tmp", ".run.json.5.tmp"]  # fmt: skip
    assert names_in(prepare_at(write_files(tmp_path, names), overwrite=True)) == []


def test_resume_keeps_the_checkpoint_alone(tmp_path):
    names = ["checkpoint.parquet", "metrics.parquet", "predictions/part-00000.parquet", ".means.parquet.1.tmp"]
    assert names_in(prepare_at(write_files(tmp_path, names), resume=True)) == ["checkpoint.parquet"]


@pytest.mark.parametrize("names", [[], ["predictions/part-00000.parquet"]])
def test_a_run_without_a_saved_epoch_begins_anew_and_says_so(tmp_path, names, caplog):
    with caplog.at_level(logging.INFO):
        prepare_at(write_files(tmp_path, names), resume=True)
    assert caplog.messages == [f"--resume: no epoch is saved in {tmp_path}; beginning anew"]


def test_a_finished_run_is_not_resumed(tmp_path):
    before = tree_of(write_files(tmp_path, ["run.json", "metrics.parquet"]))
    with pytest.raises(OutputError, match=r"^--out .*: expected an unfinished run to resume, got a finished one"):
        prepare_at(tmp_path, resume=True)
    assert tree_of(tmp_path) == before


def test_a_folder_that_is_gone_is_said_in_the_system_s_words(output):
    shutil.rmtree(output.root)
    with pytest.raises(
        OutputError, match=r"history\.parquet: expected to write it, got No such file or directory; free"
    ):
        write_table(output, "history", history_table(HISTORY))


@pytest.mark.parametrize("below", [".", "out", "a/b"])
def test_a_file_in_the_way_is_said_in_one_line(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^--out .*: expected to write there, got ") as caught:
        prepare_at(tmp_path / "file" / below, overwrite=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_links_in_the_folder_lead_nowhere_to_delete(tmp_path):
    write_files(tmp_path, ["home/run.json", "home/metrics.parquet"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions").symlink_to(tmp_path / "home")
    with pytest.raises(OutputError, match="expected only results of this job, got predictions/"):
        prepare_at(tmp_path / "out", overwrite=True)
    assert (tmp_path / "home" / "run.json").exists()


def test_a_uri_is_prepared_written_and_read_alike(memory_output):
    write_table(memory_output, "history", history_table(HISTORY))
    write_checkpoint(memory_output, Checkpoint({}, HISTORY, np.zeros(3, np.float32)))
    write_run(memory_output, {"a": 1})
    assert names_in(memory_output) == ["checkpoint.parquet", "history.parquet", "run.json"]
    assert read_checkpoint(memory_output, {}).history == HISTORY
    with pytest.raises(OutputError, match="expected a new or empty folder, got a finished run;"):
        prepare(memory_output, overwrite=False, resume=False)
    delete_checkpoint(memory_output)
    prepare(memory_output, overwrite=True, resume=False)
    assert names_in(memory_output) == []


@pytest.mark.parametrize("name", [*RESULT_TABLES, "nulls"])
def test_the_same_content_has_the_same_digest_however_it_is_chunked(output, name):
    table = {**make_tables(), "nulls": NUMBERS}[name]
    expected = digest_of(output, table)
    pieces = pa.concat_tables([table[:1], table[1:1], table[1:]])
    cut_out = pa.concat_tables([table, table]).combine_chunks()[len(table) :]
    assert digest_of(output, pieces) == digest_of(output, cut_out) == expected
    assert write_table(output, "another name", table) == expected
    assert digest_of(output, pa.table(table.to_pydict(), schema=table.schema)) == expected


def test_a_digest_does_not_count_seconds(output):
    other = [replace(row, seconds=row.seconds + 1) for row in HISTORY]
    assert digest_of(output, history_table(other)) == digest_of(output, history_table(HISTORY))
    assert pq.read_table(path_of(output, "metrics"))["seconds"].to_pylist() == [1.5, 2.5]


@pytest.mark.parametrize("name", RESULT_TABLES)
def test_another_value_is_another_digest(output, name):
    table = make_tables()[name]
    expected = digest_of(output, table)
    for index, column in enumerate(table.column_names):
        rolled = table[column].take(pa.array([*range(1, len(table)), 0]))
        if column != "seconds" and not rolled.equals(table[column]):
            assert digest_of(output, table.set_column(index, column, rolled)) != expected


@pytest.mark.parametrize("name", RESULT_TABLES)
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


def test_what_killed_processes_left_is_gone_when_a_run_is_finished(output):
    (Path(output.root) / "predictions" / ".part-00000.parquet.123.tmp").write_bytes(b"half")
    write_run(output, {})
    assert names_in(output) == ["run.json"]
