import contextlib
import gzip
import hashlib
import io
import os
import random
import resource
import socket
import struct
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.data import download
from pipeline.data.download import MNIST_SAMPLE, Download, cache_folder, fetch
from pipeline.errors import DownloadError

DATA = Path(__file__).parents[2] / "shared" / "data"
HAS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        with contextlib.suppress(ConnectionError):  # a client that has read enough hangs up
            self.server.answers[self.path](self)

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as listener:
        listener.daemon_threads = False  # so that closing waits for them and no socket stays open
        listener.requests, listener.answers, listener.released = [], {}, threading.Event()
        listener.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listener
        listener.released.set()
        listener.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def _answer(data=b"", status=200, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def _member(name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member, content


def _tgz(*members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", **options) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SMALL = {"set/train/3/1.png": b"three", "set/train/7/2.png": b"seven" * 1000, "set/labels.csv": b""}
SMALL_TGZ = _tgz(*[_member(name, content) for name, content in SMALL.items()])


def _archive(url, data=SMALL_TGZ, folder="set"):
    return Download("small", url, len(data), hashlib.md5(data[: 2**20]).hexdigest(), folder)


def _serve(server, data=SMALL_TGZ, answer=None):
    server.answers["/set.tgz"] = answer or _answer(data)
    return _archive(f"{server.url}/set.tgz", data)


def _contents(folder):
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _assert_fails_and_leaves_nothing(archive, cache, match):
    with pytest.raises(DownloadError, match=match) as caught:
        fetch(archive, cache)
    assert f"put set.tgz into {cache} by hand and run again" in str(caught.value)
    assert list(cache.iterdir()) == []


@pytest.mark.data
@HAS_DATA
def test_the_real_dataset_is_fetched_once(server, cache):
    data, progress = (DATA / "mnist_sample.tgz").read_bytes(), []
    server.answers["/mnist_sample.tgz"] = _answer(data)
    archive = _archive(f"{server.url}/mnist_sample.tgz", data, "mnist_sample")
    folder = fetch(archive, cache, lambda done, total: progress.append((done, total)))
    assert folder == cache / "mnist_sample"
    assert len(list(folder.glob("*/*/*.png"))) == 14_434
    assert progress[0] == (64 * 1024, len(data))
    assert progress[-1] == (len(data), len(data))
    assert fetch(archive, cache) == folder
    assert server.requests == ["/mnist_sample.tgz"]
    assert list(cache.iterdir()) == [folder]


def test_the_files_are_unpacked_as_packed(server, cache):
    folder = fetch(_serve(server), cache)
    assert _contents(folder) == SMALL
    assert list(cache.iterdir()) == [folder]


def test_a_folder_already_there_needs_no_network(server, cache):
    (cache / "set").mkdir(parents=True)
    assert fetch(_serve(server), cache) == cache / "set"
    assert server.requests == []


def test_the_record_holds_what_is_published_and_cannot_change():
    assert MNIST_SAMPLE.file_name == "mnist_sample.tgz"
    assert (MNIST_SAMPLE.size_bytes, len(MNIST_SAMPLE.md5_of_first_mib)) == (3_214_948, 32)
    with pytest.raises(FrozenInstanceError, match="size_bytes"):
        MNIST_SAMPLE.size_bytes = 1


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [("/some/cache", "/some/cache"), ("", "/home/me/.cache"), (None, "/home/me/.cache"), ("below", "/home/me/.cache")],
)
def test_the_cache_folder_follows_xdg(monkeypatch, xdg, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_folder() == Path(expected) / "image-baseline"


def test_a_user_without_a_home_folder_is_told(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(DownloadError, match=r"expected a user with a home folder, got none; set XDG_CACHE_HOME"):
        cache_folder()


def _ends_early(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(SMALL_TGZ)))
    handler.end_headers()
    handler.wfile.write(SMALL_TGZ[:100])


def _ends_early_in_a_chunk(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"64\r\n" + SMALL_TGZ[:100] + b"\r\n64\r\n")


def _resets(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(bytes(64 * 1024))
    handler.server.released.wait()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.mark.parametrize(
    "answer", [_answer(SMALL_TGZ[:100]), _ends_early, _ends_early_in_a_chunk], ids=["short", "early", "chunk"]
)
def test_a_truncated_download_names_both_sizes(server, cache, answer):
    archive = _serve(server, answer=answer)
    _assert_fails_and_leaves_nothing(archive, cache, rf"set.tgz: expected {len(SMALL_TGZ)} bytes, got 100; ")


def test_a_download_that_is_too_large_stops_early(server, cache):
    archive = _serve(server, answer=_answer(bytes(50_000_000)))
    _assert_fails_and_leaves_nothing(archive, cache, f"expected {len(SMALL_TGZ)} bytes, got at least 65536; ")


def test_a_failed_download_hangs_up_at_once(server, cache):
    def answer(handler):
        try:
            _answer(bytes(50_000_000))(handler)
        finally:
            server.released.set()

    with pytest.raises(DownloadError, match="at least 65536") as caught:
        fetch(_serve(server, answer=answer), cache)
    assert server.released.wait(10)
    assert caught.tb is not None  # alive until here, and with it all that a frame of `fetch` holds


def test_a_wrong_checksum_is_refused(server, cache):
    archive = _serve(server, answer=_answer(bytes(len(SMALL_TGZ))))
    _assert_fails_and_leaves_nothing(archive, cache, rf"2\^20 bytes of MD5 {archive.md5_of_first_mib}, got [0-9a-f]+; ")


def test_a_fault_behind_the_first_mib_is_found_by_the_crc(server, cache):
    data = bytearray(_tgz(_member("set/noise", random.Random(0).randbytes(1_500_000))))
    archive = _serve(server, bytes(data))
    data[2**20 + 7] ^= 1
    server.answers["/set.tgz"] = _answer(bytes(data))
    _assert_fails_and_leaves_nothing(archive, cache, r"expected a sound gzipped tar file, got BadGzipFile \(CRC check")


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (503, "Service Unavailable"), (302, "Found")])
def test_an_http_error_is_told(server, cache, status, reason):
    archive = _serve(server, answer=_answer(b"sorry", status))
    _assert_fails_and_leaves_nothing(archive, cache, f"^{archive.url}: expected set.tgz, got HTTP {status} {reason}; ")


def test_an_answer_that_is_not_http_is_told(server, cache):
    archive = _serve(server, answer=lambda handler: handler.wfile.write(b"220 mail here\r\n"))
    _assert_fails_and_leaves_nothing(archive, cache, "expected set.tgz, got 220 mail here *; ")


def test_a_refused_connection_is_told(cache):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        archive = _archive(f"http://127.0.0.1:{unheard.getsockname()[1]}/set.tgz")
        _assert_fails_and_leaves_nothing(archive, cache, f"^{archive.url}: expected set.tgz, got Connection refused; ")


def test_no_answer_in_time_is_told(server, cache, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    archive = _serve(server, answer=lambda _handler: server.released.wait())
    _assert_fails_and_leaves_nothing(archive, cache, r"got no answer within 0\.2 s; ")


def test_silence_in_the_middle_is_told(server, cache, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    archive = _archive(f"{server.url}/set.tgz", bytes(100_000))
    server.answers["/set.tgz"] = _resets
    _assert_fails_and_leaves_nothing(archive, cache, r"got no answer within 0\.2 s after 65536 of 100000 bytes; ")


def test_a_connection_reset_is_told(server, cache):
    archive = _archive(f"{server.url}/set.tgz", bytes(100_000))
    server.answers["/set.tgz"] = _resets
    with pytest.raises(DownloadError, match="got Connection reset by peer after 65536 of 100000 bytes; put"):
        fetch(archive, cache, lambda _done, _total: server.released.set())
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(server, cache, status):
    archive = _serve(server, answer=_answer(status=status, Location="/other"))
    server.answers["/other"] = _answer(SMALL_TGZ)
    assert _contents(fetch(archive, cache)) == SMALL
    assert server.requests == ["/set.tgz", "/other"]


@pytest.mark.parametrize("place", ["", "http://127.0.0.1:{port}", "http://localhost:{port}"])
@pytest.mark.parametrize(("path", "asked"), [("/a%2Fb?c=d&e", "/a%2Fb?c=d&e"), ("/a b", "/a%20b")])
def test_a_redirect_may_be_absolute_and_unquoted(server, cache, place, path, asked):
    archive = _serve(server, answer=_answer(status=302, Location=place.format(port=server.server_port) + path))
    server.answers[asked] = _answer(SMALL_TGZ)
    assert _contents(fetch(archive, cache)) == SMALL


@pytest.mark.parametrize("location", ["http://0.0.0.0:{server.server_port}/other", "file:///etc/hosts", "ftp://[::1]/"])
def test_a_redirect_to_another_place_than_https_is_refused_unasked(server, cache, location):
    location = location.format(server=server)
    archive = _serve(server, answer=_answer(status=302, Location=location))
    server.answers["/other"] = _answer(SMALL_TGZ)
    expected = location.replace("[", r"\[")
    _assert_fails_and_leaves_nothing(archive, cache, f"got {expected}, which is not an https URL; ")
    assert server.requests == ["/set.tgz"]


def test_a_redirect_to_a_malformed_url_is_told(server, cache):
    archive = _serve(server, answer=_answer(status=302, Location="https://[nowhere/"))
    _assert_fails_and_leaves_nothing(archive, cache, "got Invalid IPv6 URL; ")


def test_redirects_in_a_circle_end(server, cache):
    archive = _serve(server, answer=_answer(status=302, Location="/set.tgz"))
    _assert_fails_and_leaves_nothing(archive, cache, "got more than 10 redirects; ")
    assert len(server.requests) == 11


@pytest.mark.parametrize("url", ["http://example.invalid/set.tgz", "file://{path}/set.tgz", "ftp://127.0.0.1/set.tgz"])
def test_a_url_that_is_not_https_is_refused(tmp_path, cache, url):
    (tmp_path / "set.tgz").write_bytes(SMALL_TGZ)
    archive = _archive(url.format(path=tmp_path))
    _assert_fails_and_leaves_nothing(archive, cache, f"got {archive.url}, which is not an https URL; ")


def test_a_proxy_in_the_environment_is_used(server, cache, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    archive = _archive("http://127.0.0.1:9/set.tgz")
    server.answers[archive.url] = _answer(SMALL_TGZ)
    assert _contents(fetch(archive, cache)) == SMALL


def test_a_proxy_that_refuses_https_is_told(server, cache, monkeypatch):
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    archive = _archive("https://example.invalid/set.tgz")
    _assert_fails_and_leaves_nothing(archive, cache, "got Tunnel connection failed: 501 ")


OUTSIDE = "expected members below set/ of at most 32 parts"
KIND = "expected regular files and folders, got another kind"
DEVICE = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}


@pytest.mark.parametrize(
    ("member", "match"),
    [
        (_member("../evil", b"x"), OUTSIDE),
        (_member("set/../../evil", b"x"), OUTSIDE),
        (_member("/set/evil", b"x"), OUTSIDE),
        (_member("other/evil", b"x"), OUTSIDE),
        (_member("settee", b"x"), OUTSIDE),
        (_member("set" + "/d" * 32, type=tarfile.DIRTYPE), OUTSIDE),
        (_member("evil", pax_headers={"path": "set/a\0b"}), OUTSIDE),
        (_member("set/link", type=tarfile.SYMTYPE, linkname="/etc"), KIND),
        (_member("set/link", type=tarfile.SYMTYPE, linkname="3"), KIND),
        (_member("set/link", type=tarfile.LNKTYPE, linkname="set/3"), KIND),
        (_member("set/pipe", type=tarfile.FIFOTYPE), KIND),
        (_member("set/null", **DEVICE), KIND),
        (_member("set/holes", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}), KIND),
    ],
)
def test_a_hostile_member_is_refused_by_name(server, cache, tmp_path, member, match):
    archive = _serve(server, _tgz(_member("set/3", b"x"), member, format=tarfile.PAX_FORMAT))
    name = repr(member[0].pax_headers.get("path", member[0].name)).replace("\\", "\\\\")
    _assert_fails_and_leaves_nothing(archive, cache, f"{match}.* at member {name}; ")
    assert list(tmp_path.iterdir()) == [cache]


@pytest.mark.parametrize(
    ("limit", "value", "match"),
    [
        ("MAX_UNPACKED_BYTES", 5004, "expected 0 to 5004 bytes unpacked, got 5005 at member 'set/train/7/2.png'"),
        ("MAX_MEMBERS", 2, "expected at most 2 members, got more at member 'set/labels.csv'"),
        ("MAX_TAR_BYTES", 10_239, "expected at most 10239 bytes of tar, got more"),
    ],
)
def test_a_bomb_stops_at_each_limit(server, cache, monkeypatch, limit, value, match):
    monkeypatch.setattr(download, limit, value)
    _assert_fails_and_leaves_nothing(_serve(server), cache, match)


@pytest.mark.parametrize(("limit", "value"), [("MAX_UNPACKED_BYTES", 5005), ("MAX_MEMBERS", 3)])
def test_an_archive_right_at_a_limit_is_unpacked(server, cache, monkeypatch, limit, value):
    monkeypatch.setattr(download, limit, value)
    assert _contents(fetch(_serve(server), cache)) == SMALL


def test_a_bomb_is_refused_by_its_declared_size(server, cache):
    member, _ = _member("set/zeros", size=2**40)
    archive = _serve(server, gzip.compress(member.tobuf()))
    _assert_fails_and_leaves_nothing(archive, cache, "got 1099511627776 at member 'set/zeros'; ")


def test_a_size_below_zero_is_refused(server, cache):
    member, _ = _member("set/less", size=-5)
    archive = _serve(server, gzip.compress(member.tobuf(format=tarfile.GNU_FORMAT)))
    _assert_fails_and_leaves_nothing(archive, cache, "got -5 at member 'set/less'; ")


def _header(kind, size, is_extended=0):
    header = bytearray(_member("set/x", size=size, type=kind)[0].tobuf(format=tarfile.USTAR_FORMAT))
    header[482] = is_extended
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


LONG_NAMES = (_header(b"L", 1) + bytes(512)) * 3000
# More of the map of holes should follow in the next block, which is not there.
HALF_A_MAP = _header(tarfile.GNUTYPE_SPARSE, 0, is_extended=1)
NO_MAP = _tgz(_member("set/x", pax_headers={"GNU.sparse.map": "no"}), format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"no gzip at all", r"BadGzipFile \(Not a gzipped file"),
        (SMALL_TGZ[:-20], "EOFError"),
        (SMALL_TGZ[:12] + b"\xff" * 40, "error"),
        (gzip.compress(b"no tar" * 1000), "ReadError"),
        (gzip.compress(gzip.decompress(SMALL_TGZ)[:3000]), r"ReadError \(unexpected end of data\)"),
        (gzip.compress(LONG_NAMES), "RecursionError"),
        (gzip.compress(HALF_A_MAP), "IndexError"),
        (NO_MAP, "ValueError"),
    ],
    ids=["magic", "cut", "deflate", "tar", "cut tar", "long names", "half a map", "no map"],
)
def test_a_corrupt_archive_is_told(server, cache, data, match):
    _assert_fails_and_leaves_nothing(_serve(server, data), cache, f"expected a sound gzipped tar file, got {match}.*; ")


@pytest.mark.parametrize("second", ["set/x/below", "set/" + "long" * 99])
def test_a_member_whose_name_cannot_be_a_file_is_told(server, cache, second):
    archive = _serve(server, _tgz(_member("set/x", b"a file"), _member(second, b"x"), format=tarfile.PAX_FORMAT))
    with pytest.raises(DownloadError, match=rf"/unpacked/{second}: expected to keep small here, got "):
        fetch(archive, cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("data", [_tgz(), _tgz(_member("set", b"a file"))], ids=["empty", "a file"])
def test_an_archive_without_the_folder_is_refused(server, cache, data):
    _assert_fails_and_leaves_nothing(_serve(server, data), cache, "expected a folder set, got none; ")


def test_owners_modes_and_times_of_the_archive_are_left_out(server, cache):
    data = _tgz(_member("set/x", b"x", mode=0o6777, uid=77, mtime=1e300), format=tarfile.PAX_FORMAT)
    found = (fetch(_serve(server, data), cache) / "x").stat()
    assert found.st_mode & 0o7111 == 0
    assert found.st_uid == os.getuid()


def test_an_archive_put_by_hand_is_used_and_kept(server, cache):
    cache.mkdir()
    (cache / "set.tgz").write_bytes(SMALL_TGZ)
    assert _contents(fetch(_serve(server), cache)) == SMALL
    assert server.requests == []
    assert sorted(path.name for path in cache.iterdir()) == ["set", "set.tgz"]


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (SMALL_TGZ[:-1], f"{len(SMALL_TGZ)} bytes, got {len(SMALL_TGZ) - 1}"),
        (SMALL_TGZ + b"x", f"{len(SMALL_TGZ)} bytes, got {len(SMALL_TGZ) + 1}"),
        (b"", f"{len(SMALL_TGZ)} bytes, got 0"),
        (bytes(len(SMALL_TGZ)), r"first 2\^20 bytes of MD5 \w+, got \w+"),
    ],
    ids=["short", "long", "empty", "other"],
)
def test_a_wrong_archive_put_by_hand_is_named_and_kept(server, cache, data, got):
    cache.mkdir()
    by_hand = cache / "set.tgz"
    by_hand.write_bytes(data)
    with pytest.raises(DownloadError, match=f"^{by_hand}: expected {got}; delete or replace this file"):
        fetch(_serve(server), cache)
    assert server.requests == []
    assert by_hand.read_bytes() == data
    assert list(cache.iterdir()) == [by_hand]


def test_a_hostile_archive_put_by_hand_is_named(cache):
    cache.mkdir()
    data = _tgz(_member("../evil", b"x"))
    (cache / "set.tgz").write_bytes(data)
    with pytest.raises(DownloadError, match=r"set.tgz: .* at member '\.\./evil'; delete or replace this file"):
        fetch(_archive("https://example.invalid/set.tgz", data), cache)


def test_two_at_once_both_end_well(server, cache):
    both_are_asking = threading.Barrier(2, timeout=20)

    def answer(handler):
        both_are_asking.wait()
        _answer(SMALL_TGZ)(handler)

    archive = _serve(server, answer=answer)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: fetch(archive, cache), range(2)))
    assert folders == [cache / "set"] * 2
    assert _contents(folders[0]) == SMALL
    assert list(cache.iterdir()) == [cache / "set"]


def test_a_cache_below_a_file_is_told(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(DownloadError, match=f"^{cache}: expected to keep small here, got Not a directory; see to"):
        fetch(_serve(server), cache)
    assert server.requests == []


def test_a_file_in_the_folders_place_is_told_and_kept(server, cache):
    cache.mkdir()
    (cache / "set").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="expected to keep small here, got Not a directory; see to"):
        fetch(_serve(server), cache)
    assert [(path.name, path.read_bytes()) for path in cache.iterdir()] == [("set", b"mine")]


@contextlib.contextmanager
def largest_file_of_4000_bytes():
    # Not a fixture: that would still hold when the result is reported, perhaps to a file.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = random.Random(1).randbytes(100_000)


@pytest.mark.parametrize("data", [SMALL_TGZ, _tgz(_member("set/noise", NOISE))], ids=["unpacking", "downloading"])
def test_a_failed_write_is_told_and_leaves_nothing(server, cache, data):
    archive, message = _serve(server, data), f"^{cache}: expected to keep small here, got File too large; see to"
    with pytest.raises(DownloadError, match=message), largest_file_of_4000_bytes():
        fetch(archive, cache)
    assert list(cache.iterdir()) == []


def test_an_interrupt_leaves_nothing_of_what_lay_in_the_cache(server, cache):
    def interrupt(_done, _total):
        raise KeyboardInterrupt(*[path.name for path in cache.iterdir()])

    with pytest.raises(KeyboardInterrupt, match=r"^\.small-\w+$"):
        fetch(_serve(server), cache, interrupt)
    assert list(cache.iterdir()) == []
