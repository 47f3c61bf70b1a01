"""The S3 server of the benchmark, against clients that nobody here wrote."""

import time

import boto3
import botocore.config
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from builders import write_files
from click.testing import CliRunner
from pyarrow.fs import FileSelector, S3FileSystem

import benchmark
from benchmarks.store import stored

KEYS = [*(f"train/a/{number:04d}.png" for number in range(1100)), "train/b c/é&<1>.png", "top", "x/y/z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    write_files(root / "one", KEYS)
    write_files(root / "two", ["a"])
    return root


def client_of(server, **options):
    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="x", aws_access_key_id="k",
        aws_secret_access_key="s", config=botocore.config.Config(s3={"addressing_style": "path"}, **options),
    )  # fmt: skip


def test_objects_are_listed_page_by_page_and_folder_by_folder(folder):
    with stored(folder) as server:
        client = client_of(server)
        pages = list(client.get_paginator("list_objects_v2").paginate(Bucket="one"))
        assert [page["KeyCount"] for page in pages] == [1000, 103]
        assert [item["Key"] for page in pages for item in page["Contents"]] == sorted(KEYS)
        assert {item["Key"]: item["Size"] for page in pages for item in page["Contents"]}["top"] == 3
        root = client.list_objects_v2(Bucket="one", Delimiter="/")
        assert [item["Prefix"] for item in root["CommonPrefixes"]] == ["train/", "x/"]
        assert [item["Key"] for item in root["Contents"]] == ["top"]
        small = client.get_paginator("list_objects_v2").paginate(
            Bucket="one", Prefix="train/", Delimiter="/", PaginationConfig={"PageSize": 1}
        )
        assert [page["KeyCount"] for page in small] == [1, 1]
    assert server.num_requests == {"GET": 5}


def test_objects_are_read_whole_and_by_range(folder):
    with stored(folder) as server:
        client = client_of(server)
        name = "train/b c/é&<1>.png"
        whole = client.get_object(Bucket="one", Key=name)["Body"].read()
        assert whole == name.encode()
        for asked, expected in (("bytes=2-4", whole[2:5]), ("bytes=3-", whole[3:]), ("bytes=-4", whole[-4:])):
            assert client.get_object(Bucket="one", Key=name, Range=asked)["Body"].read() == expected
        assert client.head_object(Bucket="one", Key=name)["ContentLength"] == len(whole)
        for bucket, key, code in (("one", "none", "NoSuchKey"), ("none", "a", "NoSuchBucket")):
            with pytest.raises(ClientError, match=code):
                client.get_object(Bucket=bucket, Key=key)
        with pytest.raises(ClientError, match="InvalidRange"):
            client.get_object(Bucket="one", Key=name, Range="bytes=99-100")


def test_another_client_finds_the_same(folder):
    with stored(folder) as server:
        files = S3FileSystem(
            endpoint_override=f"127.0.0.1:{server.port}", scheme="http", access_key="k", secret_key="s", region="x"
        )
        found = files.get_file_info(FileSelector("one/train", recursive=True))
        assert len([info for info in found if info.is_file]) == 1101
        assert files.open_input_file("one/x/y/z").read() == b"x/y/z"


def test_every_answer_takes_its_time_and_faults_come_in_their_share(folder):
    with stored(folder, latency_ms=30, refused=0.5) as server:
        client = client_of(server, retries={"total_max_attempts": 1})
        begun, num_refused = time.monotonic(), 0
        for _ in range(20):
            try:
                client.get_object(Bucket="two", Key="a")
            except ClientError as exc:
                num_refused += exc.response["ResponseMetadata"]["HTTPStatusCode"] == 503
        assert time.monotonic() - begun >= 20 * 0.03
    assert 3 <= num_refused <= 17


@pytest.mark.ray
@pytest.mark.long
def test_a_job_on_a_store_is_held_against_the_client_and_the_disk(noisy_dataset, tmp_path):
    names, out = ["evaluate", "evaluate_local", "client", "limit"], tmp_path / "runs.parquet"
    arguments = ["--data", noisy_dataset, "--runs", 1, "--warm-ups", 0, "--only", ",".join(names), "--out", out]
    options = ["--workload", "store", "--latency-ms", "1,2", *arguments]
    result = CliRunner().invoke(benchmark.main, list(map(str, options)))
    assert result.exit_code == 0, result.output
    rows = pq.read_table(out).to_pylist()
    assert [row["command"] for row in rows] == names * 2
    assert [row["case"] for row in rows[::4]] == ["store, 42 images, 1 ms", "store, 42 images, 2 ms"]
    assert [row["num_requests"] for row in rows[1:4]] == [None, 42, None]
    # The head of each image that is trained on, for the size, and each image, and the pages of their keys.
    assert 42 + 24 < rows[0]["num_requests"] < 42 + 42 + 15
    assert "client: 1.0000 requests an image" in result.stdout
