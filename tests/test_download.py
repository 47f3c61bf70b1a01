import contextlib
import hashlib
import io
import os
import random
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.data import download
from pipeline.data.download import cache_folder, fetch
from pipeline.errors import DownloadError

# Longer than 1 MiB, of which alone the MD5 is known.
FILES = {"mnist_sample/train/3/1.png": b"three", "mnist_sample/noise": random.Random(0).randbytes(1_200_000)}


def make_tgz(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


TGZ = make_tgz(FILES)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def publish(monkeypatch):
    def publish(data):
        """Make `data` what is known of the archive."""
        monkeypatch.setattr(download, "SIZE_BYTES", len(data))
        monkeypatch.setattr(download, "MD5_OF_FIRST_MIB", hashlib.md5(data[: 2**20]).hexdigest())

    publish(TGZ)
    return publish


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.num_requests += 1
        self.server.before_answer()
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has read enough closes the connection
            self.wfile.write(self.server.data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(monkeypatch, publish):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = False  # so that closing waits for them and no socket stays open
        server.num_requests, server.status, server.headers, server.data = 0, 200, {}, TGZ
        server.before_answer = lambda: None
        monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{server.server_port}/mnist_sample.tgz")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def contents(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def assert_fails_and_leaves_nothing(cache, match):
    with pytest.raises(DownloadError, match=f"^{download.URL}: expected {match}.*; put mnist_sample.tgz into {cache}"):
        fetch(cache)
    assert list(cache.iterdir()) == []


def test_the_archive_is_downloaded_once(server, cache):
    progress = []
    assert fetch(cache, lambda *each: progress.append(each)) == fetch(cache) == cache / "mnist_sample"
    assert contents(cache) == FILES
    assert (progress[0], progress[-1]) == ((2**16, len(TGZ)), (len(TGZ), len(TGZ)))
    assert server.num_requests == 1


def test_what_is_asked_for_is_an_https_url():
    assert download.URL.startswith("https://")


def test_an_interrupt_leaves_nothing_behind(server, cache):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.fetch(cache, interrupt)
    assert list(cache.glob("*")) == []


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (TGZ[:-1], rf"{len(TGZ)} bytes, got {len(TGZ) - 1}"),
        (TGZ + b"x", rf"{len(TGZ)} bytes, got more"),
        (bytes(len(TGZ)), r"first MiB of MD5 \w+, got \w+"),
        (TGZ[:1_100_000] + bytes(1) + TGZ[1_100_001:], "a sound gzipped tar file, got CRC check failed"),
    ],
    ids=["short", "long", "checksum", "behind the first MiB"],
)
def test_another_archive_is_refused(server, cache, data, match):
    server.data = data
    assert_fails_and_leaves_nothing(cache, match)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (make_tgz({"mnist_sample/x": b"x"})[:-20], "a sound gzipped tar file, got Compressed file ended"),
        (b"no gzip at all", "a sound gzipped tar file, got Not a gzipped file"),
        (make_tgz({"../evil": b"x"}), "a sound gzipped tar file, got '../evil' would be extracted to"),
        (make_tgz({"mnist_sample/zeros": bytes(2**20)}), f"at most {2**20} bytes unpacked, got more"),
    ],
    ids=["truncated", "no gzip", "path", "bomb"],
)
def test_an_archive_that_cannot_be_unpacked_safely_is_refused(server, publish, cache, monkeypatch, data, match):
    monkeypatch.setattr(download, "MAX_TAR_BYTES", 2**20)
    server.data = data
    publish(data)
    assert_fails_and_leaves_nothing(cache, match)
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (302, "Found")])
def test_an_answer_without_the_archive_is_told(server, cache, status, reason):
    server.status, server.headers = status, {"Location": "/elsewhere"}
    assert_fails_and_leaves_nothing(cache, f"{len(TGZ)} bytes, got HTTP {status} {reason} after 0")
    assert server.num_requests == 1  # a redirect is not followed


def test_no_network_is_told(cache, publish, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{closed.getsockname()[1]}/mnist_sample.tgz")
        assert_fails_and_leaves_nothing(cache, r".*Connection refused after 0")


def test_no_answer_in_time_is_told(server, cache, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    is_over = threading.Event()
    server.before_answer = lambda: is_over.wait(60)
    assert_fails_and_leaves_nothing(cache, f"{len(TGZ)} bytes, got timed out after 0")
    is_over.set()


def test_an_archive_put_there_by_hand_is_used_and_kept(server, cache):
    cache.mkdir()
    (cache / "mnist_sample.tgz").write_bytes(TGZ)
    fetch(cache)
    assert contents(cache) == {**FILES, "mnist_sample.tgz": TGZ}
    assert server.num_requests == 0


@pytest.mark.parametrize(("data", "got"), [(TGZ[:-1], len(TGZ) - 1), (TGZ + b"x", "more")])
def test_a_wrong_archive_put_there_by_hand_is_named_and_kept(server, cache, data, got):
    cache.mkdir()
    by_hand = cache / "mnist_sample.tgz"
    by_hand.write_bytes(data)
    with pytest.raises(DownloadError, match=rf"^{by_hand}: expected {len(TGZ)} bytes, got {got}; delete or replace"):
        fetch(cache)
    assert contents(cache) == {"mnist_sample.tgz": data}
    assert server.num_requests == 0


def test_two_at_the_same_time_both_end_well(server, cache):
    server.before_answer = threading.Barrier(2, timeout=60).wait
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(fetch, [cache, cache])) == [cache / "mnist_sample"] * 2
    assert contents(cache) == FILES
    assert list(cache.iterdir()) == [cache / "mnist_sample"]


@pytest.mark.parametrize("taken", ["cache", "cache/mnist_sample"])
def test_a_place_that_cannot_be_written_is_told(server, tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"cache\S*: expected to keep mnist_sample here, got .*; check permissions"):
        fetch(tmp_path / "cache")
    assert contents(tmp_path) == {taken: b"mine"}


@pytest.mark.parametrize(("xdg", "base"), [("/xdg", "/xdg"), ("", "/home/me/.cache"), ("x", "/home/me/.cache")])
def test_the_cache_folder_follows_xdg(monkeypatch, xdg, base):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_folder() == Path(base) / "image-baseline"


def test_a_user_without_a_home_folder_is_told(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(DownloadError, match="expected a home folder, got none; set XDG_CACHE_HOME"):
        cache_folder()
