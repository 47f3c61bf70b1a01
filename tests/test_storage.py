"""Object storage, by real servers: what is read and written, tried again, and said in one line."""

import json
import logging
import os
import re
import sys
import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import click.testing
import pyarrow.parquet as pq
import pytest
import s3
from builders import command

from benchmarks.store import stored
from jobs import cache as cache_command
from jobs import evaluate
from pipeline.config import Config
from pipeline.data import clients, files, storage
from pipeline.data.listing import list_dataset
from pipeline.data.storage import LocalStore, NotAFileError, TooLargeError, open_root, temporary_beside
from pipeline.decoding import cache
from pipeline.decoding.cache import Cache
from pipeline.decoding.images import sample_rows
from pipeline.errors import CacheError, DataError, OutputError
from pipeline.results import checkpoint, writing
from pipeline.results.progress import Progress


@pytest.fixture(scope="module")
def server():
    with s3.s3_server() as (throttle, query):
        yield throttle, query


@pytest.fixture
def bucket(server, monkeypatch):
    s3.set_credentials(monkeypatch)
    throttle, query = server
    yield throttle, query
    throttle.num_refused = 0
    throttle.refusals = {}


@pytest.fixture
def hurried(monkeypatch):
    """Clients that give up after two seconds and not after a minute."""
    monkeypatch.setitem(clients._RETRIES, "retry_timeout", timedelta(seconds=2))


def put(store, path, content):
    store.write(path, lambda stream: stream.write(content))


def read(store, path):
    return store.read(path.encode(), lambda num_bytes: None)


# One kind of store


@pytest.fixture(params=["local", "bucket", "memory"])
def place(request, tmp_path):
    """A store of each kind, with the path of a folder in it."""
    if request.param != "bucket":
        root = str(tmp_path / "d") if request.param == "local" else "memory://bucket/d"
        store, path = open_root("--out", root, OutputError)
    else:
        _, query = request.getfixturevalue("bucket")
        store, path = open_root("--out", f"s3://bucket/{tmp_path.name}{query}", OutputError)
    store.make_folder(path)
    return store, path


@pytest.mark.parametrize("name", ["a", "a b/é", "a#b", "50%", "a%20b", "a?b=c", "[x]*{y}", "a+b&c", '"~|\\'])
def test_what_is_written_is_found_listed_read_and_deleted(place, name):
    store, root = place
    path = f"{root}/{name}"
    store.make_folder(path.rpartition("/")[0])
    put(store, path, b"0123456789")
    assert read(store, path) == b"0123456789"
    assert [store.read_range(path, *span) for span in ((0, 3), (3, 99), (10, 12), (50, 60))] == [
        b"012", b"3456789", b"", b""
    ]  # fmt: skip
    (entry,) = store.entries(root, recursive=True)
    assert entry == store.find(path)
    assert (entry.path, entry.size, entry.is_folder) == (path, 10, False)
    assert abs(entry.mtime_ns - time.time_ns()) < 600 * 10**9
    assert store.find(root).is_folder
    (first,) = store.entries(root, recursive=False)
    assert (first.name, first.is_folder) == (name.split("/")[0], "/" in name)
    store.delete(path)
    store.delete(path)
    assert store.find(path) is None
    with pytest.raises(FileNotFoundError):
        read(store, path)
    with pytest.raises(FileNotFoundError):
        store.read_range(path, 0, 1)
    assert (
        list(store.entries(f"{root}/none", recursive=True))
        == list(store.entries(f"{root}/none", recursive=False))
        == []
    )


def test_a_write_that_fails_leaves_what_was_there(place):
    store, root = place
    put(store, f"{root}/a", b"old")
    with pytest.raises(ZeroDivisionError, match="division"):
        store.write(f"{root}/a", lambda stream: stream.write(b"new") and 1 / 0)
    assert [entry.name for entry in store.entries(root, recursive=True)] == ["a"]
    assert read(store, f"{root}/a") == b"old"


def test_a_file_larger_than_an_image_may_be_is_not_read(place, monkeypatch):
    store, root = place
    put(store, f"{root}/a", b"0123456789")
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 9)
    with pytest.raises(TooLargeError, match="10 bytes, more than 9"):
        store.read(f"{root}/a".encode(), lambda num_bytes: pytest.fail("room was made for it"))


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_regular_file_is_never_waited_for(kind, tmp_path):
    path = "/dev/null" if kind == "device" else str(tmp_path / "a.png")
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": str}[kind](path)
    for read_it in (lambda: read(LocalStore(), path), lambda: LocalStore().read_range(path, 0, 10)):
        with pytest.raises(NotAFileError):
            read_it()


def test_a_local_file_is_written_beside_its_name(tmp_path):
    def write_and_look(stream):
        stream.write(b"new")
        seen.extend(sorted(path.name for path in tmp_path.iterdir()))

    (tmp_path / "a").write_bytes(b"old")
    seen = []
    LocalStore().write(f"{tmp_path}/a", write_and_look)
    assert seen == [temporary_beside("a").name, "a"]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


def test_marks_of_folders_are_no_files(bucket):
    _, query = bucket
    client = s3.client(query.rpartition("=")[2])
    for key in (
        "marked/",
        "marked/train/",
        "marked/train/3/",
        "marked/train/3/1.png",
        "marked/train/empty.png",
        "marked/x/",
    ):
        client.put_object(Bucket="bucket", Key=key, Body=b"x" * key.endswith("1.png"))
    store, root = open_root("--data", f"s3://bucket/marked{query}", DataError)
    assert [entry.path for entry in store.entries(root, recursive=True)] == [
        f"{root}/train/3/1.png", f"{root}/train/empty.png", f"{root}/x"
    ]  # fmt: skip
    assert [(entry.name, entry.is_folder) for entry in store.entries(root, recursive=False)] == [
        ("train", True),
        ("x", True),
    ]


# Faults of the server


def test_throttled_requests_are_made_again_until_they_succeed(bucket):
    throttle, query = bucket
    store, root = open_root("--data", f"s3://bucket/throttled{query}", DataError)
    throttle.num_refused = 8
    put(store, f"{root}/a", b"content")
    throttle.num_refused = 8
    assert read(store, f"{root}/a") == b"content"


@pytest.mark.usefixtures("hurried")
def test_a_server_that_only_refuses_is_given_up_at_last(bucket):
    throttle, query = bucket
    throttle.num_refused = 10_000
    location = files.Location("uri", f"s3://bucket/refused{query}")
    with pytest.raises(DataError, match=r"^--data: expected to list .*bucket/refused\S*, got SlowDown, Please reduce"):
        list_dataset(location, Config())


def open_at(port, root="s3://small"):
    query = f"?region=x&scheme=http&endpoint_override=127.0.0.1:{port}&anonymous=true"
    return open_root("--data", f"{root}{query}", DataError)


@pytest.fixture
def buckets(small_dataset, tmp_path):
    """A folder of one bucket, `small`."""
    (tmp_path / "buckets").mkdir()
    (tmp_path / "buckets" / "small").symlink_to(small_dataset)
    return tmp_path / "buckets"


def test_a_server_that_comes_back_is_waited_for(buckets):
    with stored(buckets) as first:
        store, root = open_at(first.port)
        key = next(entry.path for entry in store.entries(root, recursive=True) if entry.name.endswith(".png"))
    with ExitStack() as stack:
        begun = time.monotonic()
        timer = threading.Timer(3, lambda: stack.enter_context(stored(buckets, port=first.port)))
        timer.start()
        assert read(store, key).startswith(b"\x89PNG")
        timer.join()
        assert time.monotonic() - begun > 2


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("endpoint", "words"), [("127.0.0.1:9", "Connection refused"), ("no.such.host.example", "lookup")]
)
def test_a_server_that_stays_away_is_one_line(endpoint, words):
    location = files.Location("uri", f"s3://b/d?region=x&scheme=http&endpoint_override={endpoint}&anonymous=true")
    with pytest.raises(DataError, match=rf"^--data: expected to list s3://b/d\S*, got .*{words}.*; check"):
        list_dataset(location, Config())


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/data", "s3://no-such-bucket"])
def test_a_missing_bucket_fails_at_once(bucket, uri):
    throttle, query = bucket
    before = throttle.num_requests
    with pytest.raises(DataError, match=r"got NoSuchBucket, The specified bucket does not exist; check name"):
        list_dataset(files.Location("uri", uri + query), Config())
    assert throttle.num_requests - before <= 3


@pytest.mark.ray
def test_results_in_a_missing_bucket_fail_at_once_and_in_one_line(bucket):
    _, query = bucket
    words = ("--out", f"s3://no-such-bucket/out{query}", "--epochs", 0)
    process = command(*words, IMAGE_BASELINE_PLAIN_RAY="")  # of which a line would speak
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, "")
    [error] = [line for line in stderr.splitlines() if "starting Ray" not in line]  # which a slow machine shows
    assert re.fullmatch(r"error: --out s3://no-such-bucket/out\S*: expected .*, got NoSuchBucket.*", error)


# Settings


@pytest.mark.parametrize(("end", "is_anonymous"), [("?region=x&anonymous=true", "true"), ("/?region=x", None)])
def test_a_uri_says_region_and_whether_to_sign(end, is_anonymous, monkeypatch):
    s3.set_credentials(monkeypatch)
    store, path = open_root("--data", f"s3://b/p{end}", DataError)
    config = store.client.config
    assert (config["region"], config.get("skip_signature"), path) == ("x", is_anonymous, "b/p")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_environment_says_where_s3_is(monkeypatch, name):
    s3.set_credentials(monkeypatch)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    for uri in ("s3://b/p?region=x", "s3://b/p?region=x&anonymous=true"):
        store, _ = open_root("--data", uri, DataError)
        assert store.client.config["endpoint"] == "http://127.0.0.1:9"


def write_profiles(folder):
    folder.mkdir()
    (folder / "credentials").write_text("[mine]\naws_access_key_id = of-profile\naws_secret_access_key = s\n")
    (folder / "config").write_text("[profile mine]\nregion = eu-north-1\n")


def test_a_profile_gives_credentials_and_region(bucket, monkeypatch, tmp_path):
    throttle, query = bucket
    write_profiles(tmp_path / ".aws")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store, root = open_root("--data", f"s3://bucket/profile{query.replace('region=us-east-1&', '')}", DataError)
    put(store, f"{root}/a", b"1")
    assert "Credential=of-profile/" in throttle.last_authorization
    assert "/eu-north-1/s3/" in throttle.last_authorization
    monkeypatch.setenv("AWS_PROFILE", "other")
    clients.connect.cache_clear()
    with pytest.raises(DataError, match=r"profile \(other\) could not be found; look at AWS_PROFILE and .*credentials"):
        open_root("--data", f"s3://bucket/profile{query}", DataError)


def test_a_profile_without_boto3_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in s3.CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(DataError, match="the profile mine boto3 is needed, which the extra `aws` brings; or set"):
        open_root("--data", "s3://bucket/a?region=x", DataError)


@pytest.mark.parametrize(("uri", "name"), [("s3://b/a?region=x", "AWS_ACCESS_KEY_ID"), ("gs://b/a", "GOOGLE_\\w+")])
def test_without_credentials_it_is_said_at_once(uri, name, monkeypatch, tmp_path):
    s3.set_credentials(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"no credentials; set {name}.* or add anonymous=true"):
        open_root("--data", uri, DataError)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("host", ["URI", "environment"])
def test_google_s_storage_is_read_by_the_same_requests(host, buckets, monkeypatch):
    with stored(buckets) as server:
        query = f"?scheme=http&endpoint_override=127.0.0.1:{server.port}"
        if host == "environment":
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.port}")
            query = ""
        store, root = open_root("--data", f"gs://anonymous@small/train{query}", DataError)
        found = [entry for entry in store.entries(root, recursive=True) if entry.name.endswith(".png")]
        assert len(found) > 100
        assert len(read(store, found[0].path)) == found[0].size


@pytest.mark.parametrize("uri", ["nosuch://a/b", "s3://b/p?nosuch=1", "s3://b/p?anonymous=true&nosuch=1", "hdfs://h/p"])
def test_a_uri_that_cannot_be_opened_is_one_line(uri, monkeypatch):
    s3.set_credentials(monkeypatch)
    with pytest.raises(DataError, match=r"--data: expected a URI that can be opened, got .* is none of them"):
        open_root("--data", uri, DataError)


def test_a_folder_whose_name_is_no_text_is_refused():
    with pytest.raises(CacheError, match=r"^--cache: expected .* UTF-8, got /d/\\xff;"):
        open_root("--cache", "/d/\udcff", CacheError)


# Whole jobs


def run_json(*args):
    process = command(*args)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


@pytest.mark.ray
def test_a_bucket_gives_the_results_of_a_folder(bucket, small_dataset, tmp_path):
    _, query = bucket
    s3.put_folder(query, small_dataset, "small#1")
    options = ("--epochs", 2, "--json")
    here = run_json("--data", small_dataset, "--out", tmp_path / "out", *options)
    data, out = f"s3://bucket/small#1{query}", f"s3://bucket/results#1{query}"
    there = run_json("--data", data, "--out", out, *options)
    assert there["results_sha256"] == here["results_sha256"]
    (tmp_path / "means").write_bytes(s3.read_object(query, "results#1/means.parquet"))
    assert pq.read_table(tmp_path / "means").num_rows == 3
    # A second run replaces the first: nothing of it is left beside the new tables.
    run_json("--data", data, "--out", out, "--overwrite", "--epochs", 0, "--json")
    names = [name.removeprefix("results#1/") for name in s3.object_names(query, "results")]
    assert names == ["confusion.parquet", "duplicates.parquet", "means.parquet", "metrics.parquet",
                     "predictions/part-00000.parquet", "report.html", "run.json", "skipped.parquet",
                     "suspects.parquet"]  # fmt: skip


@pytest.mark.ray
def test_a_server_that_refuses_and_cuts_off_changes_nothing_and_an_image_is_a_request(buckets, small_dataset, tmp_path):
    here = run_json("--data", small_dataset, "--out", tmp_path / "out", "--epochs", 0, "--json")
    for name, faults in (("good", {}), ("bad", {"refused": 0.05, "cut": 0.05})):
        with stored(buckets, latency_ms=2, **faults) as server:
            uri = f"s3://small?{server.query}&anonymous=true"
            there = run_json("--data", uri, "--out", tmp_path / name, "--epochs", 0, "--shard-images", 8, "--json")
        assert there["results_sha256"] == here["results_sha256"]
        # A page of keys for each of six classes, for the root and for each split, and 64 headers.
        asked = server.num_requests["GET"] - here["num_listed"] - 64
        assert (asked <= 12) if name == "good" else (12 < asked < 80), server.num_requests
        assert set(server.num_requests) == {"GET"}


@pytest.mark.ray
def test_an_object_that_cannot_be_had_is_one_unreadable_image(bucket, small_dataset, tmp_path):
    throttle, query = bucket
    s3.put_folder(query, small_dataset, "cold")
    frozen = {"Key": "cold/valid/10/0.png", "Body": b"x", "StorageClass": "GLACIER"}
    s3.client(query.rpartition("=")[2]).put_object(Bucket="bucket", **frozen)
    throttle.refusals = {"train/2/1.png": (403, "AccessDenied"), "train/10/7.png": (404, "NoSuchKey")}
    run = run_json("--data", f"s3://bucket/cold{query}", "--out", tmp_path / "out", "--epochs", 1, "--json")
    skipped = pq.read_table(tmp_path / "out" / "skipped.parquet").to_pylist()
    assert {row["key"]: (row["reason"], row["error"].partition(",")[0]) for row in skipped} == {
        "train/2/1.png": ("unreadable", "AccessDenied"),
        "train/10/7.png": ("unreadable", "No such file or directory"),
        "valid/10/0.png": ("unreadable", "InvalidObjectState"),
    }
    assert (run["num_listed"], run["num_skipped"]) == (156, 3)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("end", "code"), [(".png", "AccessDenied"), ("", "AccessDenied"), ("valid/2/7.png", "SignatureDoesNotMatch")]
)
def test_credentials_that_are_refused_are_one_line(bucket, small_dataset, tmp_path, end, code):
    throttle, query = bucket
    s3.put_folder(query, small_dataset, "denied")
    throttle.refusals = {end: (403, code)}
    begun = time.monotonic()
    process = command("--data", f"s3://bucket/denied{query}", "--out", tmp_path / "out", IMAGE_BASELINE_PLAIN_RAY="")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, "")
    *progress, last = stderr.splitlines()
    assert re.fullmatch(rf"error: .*expected .*{code}.*", last)
    assert not any("error" in line for line in progress)
    assert time.monotonic() - begun < 30


@pytest.mark.ray
@pytest.mark.long
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
    # Images of a sample, by whose headers the size is chosen, are read in every run.
    num_sampled = len(sample_rows(runs[0]["num_train"]))
    assert num_requests[0] - num_requests[1] >= num_images
    assert num_requests[1] < num_sampled + num_images / 2, num_requests
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
    assert open_root("--data", f"{data}&anonymous=true", DataError)[1] == "bucket/signed"
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
    monkeypatch.setitem(clients._RETRIES, "max_retries", 1)
    with caplog.at_level(logging.WARNING):
        assert cache.load(Cache.at(root), "0" * 64) is None
        checkpoint.delete_checkpoint(writing.Output.at(root))
    shown = [*caplog.messages, evaluate._left_undone(Progress("decode", 1, 2, 0.5), Config(out=root))]
    assert [text.partition("s3://")[2].partition("/")[0] for text in shown] == ["key:***@bucket"] * 3
    assert "hidden" not in "".join(shown)
