"""URIs and object storage: what is opened, what is tried again and what is not."""

import json
import logging
import re
from pathlib import Path

import click.testing
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import s3
from builders import command

from jobs import cache as cache_command
from jobs import evaluate
from pipeline.config import Config
from pipeline.data import files, storage
from pipeline.data.listing import list_dataset
from pipeline.data.storage import absolute_root, open_root, temporary_beside, write_atomic
from pipeline.decoding import cache
from pipeline.decoding.cache import Cache
from pipeline.decoding.images import sample_rows
from pipeline.errors import CacheError, DataError, OutputError
from pipeline.results import checkpoint, writing
from pipeline.results.terminal import Progress


@pytest.fixture(scope="module")
def server():
    with s3.s3_server() as (throttle, query):
        yield throttle, query


@pytest.fixture
def bucket(server, monkeypatch):
    s3.set_credentials(monkeypatch)
    throttle, query = server
    monkeypatch.setattr(storage, "_FIRST_WAIT_SECONDS", 0.01)
    yield throttle, query
    throttle.num_refused = 0


def test_throttled_requests_are_made_again_until_they_succeed(bucket):
    throttle, query = bucket
    filesystem, root = storage.open_uri("--data", f"s3://bucket/throttled{query}", DataError)
    throttle.num_refused = 8  # more than the client's own three tries

    def write():
        with filesystem.open_output_stream(f"{root}/a") as stream:
            stream.write(b"content")

    storage.with_retries(write, root)
    throttle.num_refused = 8
    assert storage.with_retries(lambda: filesystem.open_input_stream(f"{root}/a").read(), root) == b"content"


def test_a_server_that_only_refuses_is_given_up_at_last(bucket, monkeypatch):
    throttle, query = bucket
    throttle.num_refused = 10_000
    monkeypatch.setattr(storage, "_NUM_TRIES", 2)
    location = files.Location("uri", f"s3://bucket/refused{query}")
    with pytest.raises(DataError, match=r"--data: expected .*bucket/refused, got .*(SLOW_DOWN|503)"):
        list_dataset(location, Config())


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/data", "s3://no-such-bucket"])
def test_a_missing_bucket_fails_at_once(bucket, uri):
    throttle, query = bucket
    before = throttle.num_requests
    with pytest.raises(DataError, match=r"NO_SUCH_BUCKET|does not exist|got nothing; check the name"):
        list_dataset(files.Location("uri", uri + query), Config())
    assert throttle.num_requests - before <= 3


@pytest.mark.ray
def test_results_in_a_missing_bucket_fail_at_once_and_in_one_line(bucket, tmp_path):
    _, query = bucket
    words = ("--out", f"s3://no-such-bucket/out{query}", "--epochs", 0)
    process = command(*words, IMAGE_BASELINE_PLAIN_RAY="")  # of which a line would speak
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, "")
    assert re.fullmatch(r"error: --out s3://no-such-bucket/out\S*: expected .*, got .*not found.*\n", stderr)


@pytest.mark.parametrize(("end", "is_anonymous"), [("?region=x&anonymous=true", True), ("/?region=x", False)])
def test_a_uri_says_region_and_whether_to_sign(end, is_anonymous):
    filesystem, path = storage.open_uri("--data", f"s3://b/p{end}", DataError)
    settings = filesystem.__reduce__()[1][0]
    assert (filesystem.region, settings["anonymous"], path) == ("x", is_anonymous, "b/p")


def test_the_environment_says_where_s3_is(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for uri in ("s3://b/p?region=x", "s3://b/p?region=x&anonymous=true"):
        filesystem, _ = storage.open_uri("--data", uri, DataError)
        assert filesystem.__reduce__()[1][0]["endpoint_override"] == "http://127.0.0.1:9"


@pytest.mark.parametrize("uri", ["s3://[b/p", "s3://key:\u00bdhidden\u2100@b/p", "file://[b/p"])
@pytest.mark.parametrize("option", ["--data", "--out"])
def test_a_uri_whose_parts_cannot_be_told_is_one_line_too(uri, option):
    locate = files.locate if option == "--data" else writing.Output.at
    with pytest.raises((DataError, OutputError), match=f"^{option}: expected a URI .*, got ") as caught:
        locate(uri)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "nosuch://a/b", "s3://b/p?nosuch=1", "s3://b/p?anonymous=true&nosuch=1"])
def test_a_uri_that_cannot_be_opened_is_one_line(uri):
    with pytest.raises(DataError, match="--data: expected a URI that can be opened"):
        storage.open_uri("--data", uri, DataError)


@pytest.mark.parametrize(
    ("inner", "outer", "is_inside"),
    [("s3://b/data/out?region=x", "s3://b/data", True), ("s3://b/data", "s3://b/data/?region=x", True),
     ("s3://b/database", "s3://b/data", False), ("s3://c/data/out", "s3://b/data", False),
     ("gs://b/data/out", "s3://b/data", False), ("s3://key:secret@b/data/out", "s3://b/data", True),
     ("s3://b/data/out", "s3://key:secret@b/data", True), ("gs://anonymous@b/data/out", "gs://b/data", True),
     ("abfss://one@account/data/out", "abfss://other@account/data", False),
     ("abfss://one:secret@account/data/out", "abfss://other:secret@account/data", False),
     ("/data/out", "s3://b/data", False), ("s3://b/data", "/", False), ("/data/out", "/data/", True),
     ("/data", "/data", True), ("/database", "/data", False), ("/data/../out", "/data", False)],
)  # fmt: skip
def test_what_is_inside_a_folder_or_uri(inner, outer, is_inside):
    assert storage.is_inside(inner, outer) is is_inside


def test_a_folder_is_inside_another_through_links_too(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    assert storage.is_inside(f"{tmp_path}/link/inner", f"{tmp_path}/real")
    assert storage.is_inside(f"{tmp_path}/real/inner/new", f"{tmp_path}/link")


@pytest.mark.ray
def test_a_bucket_gives_the_results_of_a_folder(bucket, small_dataset, tmp_path):
    _, query = bucket
    s3.put_folder(query, small_dataset, "small")
    options = ("--epochs", 2, "--json")
    here = run_json("--data", small_dataset, "--out", tmp_path / "out", *options)
    data, out = f"s3://bucket/small{query}", f"s3://bucket/results{query}"
    there = run_json("--data", data, "--out", out, *options)
    assert there["results_sha256"] == here["results_sha256"]
    filesystem, root = pafs.FileSystem.from_uri(out)
    assert pq.read_table(f"{root}/means.parquet", filesystem=filesystem).num_rows == 3
    # A second run replaces the first: nothing of it is left beside the new tables.
    run_json("--data", data, "--out", out, "--overwrite", "--epochs", 0, "--json")
    names = [name.removeprefix("results/") for name in s3.object_names(query, "results/")]
    assert names == ["confusion.parquet", "means.parquet", "metrics.parquet", "predictions/part-00000.parquet",
                     "run.json", "skipped.parquet"]  # fmt: skip


@pytest.mark.ray
def test_what_is_cached_of_a_bucket_is_not_asked_for(bucket, small_dataset, tmp_path):
    throttle, query = bucket
    s3.put_folder(query, small_dataset, "kept")
    options = ("--data", f"s3://bucket/kept{query}", "--cache", tmp_path / "cache", "--shard-images", 7, "--epochs", 0)
    runs, num_requests = [], []
    for number in range(3):
        before = throttle.num_requests
        runs.append(run_json(*options, "--out", tmp_path / f"out {number}", "--json"))
        num_requests.append(throttle.num_requests - before)
        if number == 1:  # longer by a byte, which PNG allows
            path = next(small_dataset.rglob("*.png"))
            name = f"kept/{path.relative_to(small_dataset)}"
            s3.client(query.rpartition("=")[2]).put_object(Bucket="bucket", Key=name, Body=path.read_bytes() + b"x")
    num_images, num_shards = runs[0]["num_listed"], runs[0]["num_shards"]
    # Images of a sample, by whose headers the size is chosen, are read in every run, by two requests each.
    num_sampled = len(sample_rows(runs[0]["num_train"]))
    assert num_requests[0] - num_requests[1] >= num_images
    assert num_requests[1] < 2 * num_sampled + num_images / 2, num_requests
    assert [run["num_shards_from_cache"] for run in runs] == [0, num_shards, num_shards - 1]
    assert len({run["results_sha256"] for run in runs}) == 1


@pytest.mark.ray
def test_a_uris_secret_key_is_used_and_written_nowhere(bucket, small_dataset, tmp_path, monkeypatch):
    _, query = bucket
    s3.put_folder(query, small_dataset, "signed")
    for name in s3.CREDENTIALS:
        monkeypatch.delenv(name)
    root = "s3://key:hid%2Fden@bucket"
    data, out, kept = (f"{root}/{name}{query}" for name in ("signed", "signed-out", "signed-cache"))
    options = ("--data", data, "--out", out, "--cache", kept, "--epochs", 0)
    first = command(*options)
    stdout, stderr = first.communicate(timeout=180)
    assert storage.open_uri("--data", f"{data}&anonymous=true", DataError)[1] == "bucket/signed"
    assert (first.returncode, "s3://key:***@bucket/signed-out?" in stdout) == (0, True), stderr
    again = command(*options)  # refused, as results are there
    assert again.wait(180) == 1
    shown = stdout + stderr + "".join(again.communicate())
    for order in ("show", "clear"):
        asked = click.testing.CliRunner().invoke(cache_command.main, [order, kept])
        assert asked.output.startswith("s3://key:***@bucket/signed-cache?"), asked.output
        shown += asked.output
        run_json(*options, "--overwrite", "--json")
    json_run = run_json(*options, "--overwrite", "--json")
    assert json_run["num_shards_from_cache"] == json_run["num_shards"] > 0
    assert json_run["options"]["data"] == f"s3://key:***@bucket/signed{query}"
    written = [s3.read_object(query, name) for name in s3.object_names(query, "signed-")]
    assert len(written) > 8
    assert "hid" not in shown + json.dumps(json_run)
    assert not any(b"hid%2Fden" in content or b"hid/den" in content for content in written)


def test_a_uris_secret_key_is_in_no_warning_and_no_last_word(bucket, caplog, monkeypatch):
    throttle, query = bucket
    root = f"s3://key:hidden@bucket/a{query}"
    throttle.num_refused = 10_000
    monkeypatch.setattr(storage, "_NUM_TRIES", 1)
    with caplog.at_level(logging.WARNING):
        assert cache.load(Cache.at(root), "0" * 64) is None
        checkpoint.delete_checkpoint(writing.Output.at(root))
    shown = [*caplog.messages, evaluate._left_undone(Progress("decode", 1, 2, 0.5), Config(out=root))]
    assert [text.partition("s3://")[2].partition("/")[0] for text in shown] == ["key:***@bucket"] * 3
    assert "hidden" not in "".join(shown)


def run_json(*args):
    process = command(*args)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


@pytest.mark.parametrize(("option", "error_class"), [("--out", OutputError), ("--cache", CacheError)])
def test_errors_are_of_the_option_that_they_concern(option, error_class):
    with pytest.raises(error_class, match=f"^{option} ~no-such-user/x: expected .*, got no such user"):
        absolute_root(option, "~no-such-user/x", error_class)
    with pytest.raises(error_class, match=f"^{option}: expected a URI .*, got s3://;"):
        open_root(option, "s3://", error_class)
    with pytest.raises(error_class, match=rf"^{option}: expected .* UTF-8, got /d/\\xff;"):
        open_root(option, "/d/\udcff", error_class)


def write_and_look(folder, stream):
    stream.write(b"new")
    return sorted(path.name for path in folder.iterdir())


def test_a_local_file_is_written_beside_its_name(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    seen = []
    write_atomic(pafs.LocalFileSystem(), f"{tmp_path}/a", lambda stream: seen.extend(write_and_look(tmp_path, stream)))
    assert seen == [temporary_beside("a").name, "a"]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


@pytest.mark.parametrize("is_local", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, is_local):
    filesystem, path = open_root("--out", str(tmp_path) if is_local else "mock:///bucket", OutputError)
    filesystem.create_dir(path, recursive=True)
    write_atomic(filesystem, f"{path}/a", lambda stream: stream.write(b"old"))
    with pytest.raises(ZeroDivisionError, match="division"):
        write_atomic(filesystem, f"{path}/a", lambda stream: stream.write(b"new") and 1 / 0)
    assert [info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path))] == ["a"]
    with filesystem.open_input_stream(f"{path}/a") as stream:
        assert stream.read() == b"old"


def test_a_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    Path(tmp_path / "link").symlink_to("real")
    assert absolute_root("--out", f"{tmp_path}/link/", OutputError) == f"{tmp_path}/link"
