"""Where --data points to, which names lie there, and what a file that cannot be read becomes."""

import multiprocessing
import os
import pickle
import resource
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from builders import KEYS, keys_of, read_keys, write_bucket, write_dataset, write_folder

from pipeline.config import Config
from pipeline.data.files import Location, ReadFault, display, locate, read_images, split_glob
from pipeline.data.listing import list_dataset
from pipeline.errors import DataError

every_kind = pytest.mark.parametrize("kind", ["folder", "bucket"])
# Python 3.12 and later warn of a fork beside Arrow's threads; the child only reads files.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def become_nobody():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def as_nobody(call, *arguments):
    """Call in a child process that has no more rights than anyone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), become_nobody) as pool:
        return pool.submit(call, *arguments).result()


@pytest.fixture
def public_folder():
    """A folder that others may enter, as pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


# Where --data points to


def test_a_folder_is_located_by_its_resolved_path(tmp_path, monkeypatch):
    write_folder(tmp_path / "digits", KEYS)
    (tmp_path / "link").symlink_to("digits")
    monkeypatch.chdir(tmp_path)
    assert locate("link") == locate("./digits/") == Location("folder", str((tmp_path / "digits").resolve()))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/digits") == Location("folder", str((tmp_path / "digits").resolve()))


@pytest.mark.parametrize("name", ["plain", "with space", "ä#?%25", "bytes\udcff"])
def test_a_file_uri_is_a_local_folder(name, tmp_path):
    folder = (tmp_path / name).resolve()
    folder.mkdir()
    assert locate(f"file://{quote(os.fsencode(folder))}") == Location("folder", str(folder))


@pytest.mark.parametrize("uri", ["s3://bucket/folder", "gs://bucket/folder/", "s3://bucket/folder//"])
def test_a_uri_is_located_without_connecting(uri):
    assert locate(uri) == Location("uri", uri.rstrip("/"))


def test_digits_are_in_the_package():
    location = locate("digits")
    assert (location.kind, location.root) == ("package", "digits")


def test_a_path_that_is_there_is_meant_even_if_it_reads_as_a_pattern(tmp_path, monkeypatch):
    for name in ("a{1,2}*", "b1"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    there = Location("folder", str((tmp_path / "a{1,2}*").resolve()))
    assert locate(str(tmp_path / "a{1,2}*")) == locate("~/a{1,2}*") == there
    assert locate(str(tmp_path / "b{1,2}*")) == Location("folder", str(tmp_path.resolve()), "b{1,2}*")


@pytest.mark.parametrize(
    ("data", "found"),
    [("gone", "nothing"), ("a.png", "a file that is no uncompressed .tar or .parquet"), ("dangling", "nothing"),
     ("a.tar.gz", "a file that is no uncompressed .tar or .parquet"), ("loop", "nothing"), ("a.png/b", "nothing"),
     ("~no-such-user/x", ".+"), ("n" * 300, ".+"), ("nul\0", "nothing")],
)  # fmt: skip
def test_a_path_without_a_folder_is_refused(data, found, tmp_path, monkeypatch):
    write_folder(tmp_path, ["a.png", "a.tar.gz"])
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"--data: expected a folder at .*, got {found}; "):
        locate(data)


@forks
def test_a_folder_behind_a_closed_one_is_refused(public_folder):
    write_folder(public_folder / "closed" / "digits", KEYS)
    (public_folder / "closed").chmod(0o000)
    with pytest.raises(DataError, match=r"--data: expected .*/closed/digits, got "):
        as_nobody(locate, str(public_folder / "closed" / "digits"))


@pytest.mark.parametrize("root", ["gopher://x/y", "https://example.org/x", "s3://buck et/x", "abfss://x"])
def test_a_uri_that_no_file_system_knows_is_refused(root):
    with pytest.raises(DataError, match=f"--data: expected .*, got {root}"):
        list_dataset(locate(root), Config())


@pytest.mark.parametrize(
    ("data", "parts"),
    [("data/mnist", ("data/mnist", "")), ("*.tar", (".", "*.tar")), ("/data/*/a.tar", ("/data/", "*/a.tar")),
     ("data/a-{000..146}.tar", ("data/", "a-{000..146}.tar")),
     ("s3://bucket/x?region=eu", ("s3://bucket/x?region=eu", "")),
     ("s3://bucket/x/**.tar?region=eu", ("s3://bucket/x/?region=eu", "**.tar")), ("what?/*.tar", ("what?/", "*.tar"))],
)  # fmt: skip
def test_a_glob_is_cut_off_where_it_begins(data, parts):
    assert split_glob(data) == parts


# Names


@pytest.mark.parametrize("name", ["nowhere", "data/a.png", "dat", "data/a"])
def test_a_uri_without_a_folder_is_refused(name):
    write_bucket(["a.png"])
    with pytest.raises(DataError, match=rf"--data: expected a folder at memory://bucket/{name}, got nothing"):
        list_dataset(Location("uri", f"memory://bucket/{name}"), Config())


def test_a_folder_that_went_away_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone.*: expected .*, got No such file"):
        list_dataset(Location("folder", str(tmp_path / "gone")), Config())


@forks
@pytest.mark.parametrize("part", ["", "train", "train/3", "train/3/inner"])
def test_a_folder_that_nobody_may_list_is_refused_by_its_name(part, public_folder):
    location = write_folder(public_folder / "digits", [*KEYS, "train/3/inner/1.png"])
    (public_folder / "digits" / part).chmod(0o000)
    with pytest.raises(DataError, match=f"digits/{part}/?: expected .*, got Permission denied"):
        as_nobody(list_dataset, location, Config())


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_to_a_folder_above_is_not_followed(target, tmp_path):
    location = write_folder(tmp_path, [*KEYS, "train/3/inner/1.png"])
    (tmp_path / "train" / "3" / "inner" / "up").symlink_to(target)
    listing = list_dataset(location, Config())
    assert keys_of(listing.train) == [*KEYS[:3], "train/3/inner/1.png", *KEYS[3:6]]


def test_a_link_to_another_folder_of_images_is_followed(tmp_path):
    location = write_folder(tmp_path / "digits", KEYS)
    write_folder(tmp_path / "more", ["a/1.png"])
    (tmp_path / "digits" / "train" / "3" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "more")
    assert "train/3/more/a/1.png" in keys_of(list_dataset(location, Config()).train)


@forks
def test_a_link_to_a_closed_folder_of_images_is_refused(public_folder):
    location = write_folder(public_folder / "digits", KEYS)
    write_folder(public_folder / "closed", ["more/1.png"])
    (public_folder / "digits" / "train" / "3" / "more").symlink_to(public_folder / "closed" / "more")
    (public_folder / "closed").chmod(0o000)
    with pytest.raises(DataError, match=r"train/3/more: expected .*, got Permission denied"):
        as_nobody(list_dataset, location, Config())


# Bytes


@every_kind
def test_files_are_read_in_the_order_of_the_keys(kind, tmp_path):
    location = write_dataset(kind, tmp_path, KEYS)
    assert read_keys(location, KEYS[5], KEYS[0], KEYS[5]) == [KEYS[5].encode(), KEYS[0].encode(), KEYS[5].encode()]


@every_kind
def test_every_listed_file_can_be_read(kind, tmp_path):
    keys = [*KEYS, "train/3/a b#1%20?.png", "train/3/ä 😀.png", "train/3/deep/er/7.png", "train/3/back\\slash.png"]
    location = write_dataset(kind, tmp_path, keys)
    listed = keys_of(list_dataset(location, Config()).train)
    assert sorted(listed) == sorted(key for key in keys if key.startswith("train/"))
    assert read_keys(location, *listed) == [key.encode() for key in listed]


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"7.png", "7.png"), ("ä".encode(), "ä"), (b"\xe4.png", "\\xe4.png"), (b"\xf0\x9f", "\\xf0\\x9f")],
)
def test_a_name_is_shown_as_text(name, shown):
    assert display(name) == shown


def make_odd(path, kind):
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "folder by now":
            path.unlink()
            path.mkdir()
        case "gone by now":
            path.unlink()
        case "file as folder":
            path.unlink()
            path.parent.rename(path.parent.with_name("old"))
            path.parent.write_bytes(b"")
        case _:
            path.symlink_to(kind)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("pipe", ReadFault("not_a_file", "not a regular file")),
        ("socket", ReadFault("unreadable", "No such device or address")),
        ("/dev/zero", ReadFault("not_a_file", "not a regular file")),
        ("gone.png", ReadFault("unreadable", "No such file or directory")),
        ("odd.png", ReadFault("unreadable", "Too many levels of symbolic links")),
        ("n" * 300, ReadFault("unreadable", "File name too long")),
    ],
)
def test_a_file_that_is_none_is_listed_and_then_a_fault(kind, fault, tmp_path, monkeypatch):
    location = write_folder(tmp_path, KEYS)
    monkeypatch.chdir(tmp_path / "train" / "3")  # a socket's path must be short
    make_odd(Path("odd.png"), kind)
    listing = list_dataset(location, Config())
    assert keys_of(listing.train)[3] == "train/3/odd.png"
    assert list(read_images(location, listing.train["key"].combine_chunks()))[3] == fault


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("gone by now", ReadFault("unreadable", "No such file or directory")),
        ("folder by now", ReadFault("not_a_file", "not a regular file")),
        ("file as folder", ReadFault("unreadable", "Not a directory")),
    ],
)
def test_a_file_that_changed_since_the_listing_is_a_fault(kind, fault, tmp_path):
    location = write_folder(tmp_path, KEYS)
    make_odd(tmp_path / KEYS[0], kind)
    assert read_keys(location, KEYS[0], KEYS[3]) == [fault, KEYS[3].encode()]


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_missing_file_is_a_fault_in_the_same_words_everywhere(kind, tmp_path):
    fault = ReadFault("unreadable", "No such file or directory")
    assert read_keys(write_dataset(kind, tmp_path, KEYS), "train/3/gone.png", KEYS[0]) == [fault, KEYS[0].encode()]


def test_a_link_to_a_file_is_read_as_that_file(tmp_path):
    location = write_folder(tmp_path, KEYS)
    (tmp_path / "train" / "3" / "link.png").symlink_to(tmp_path / KEYS[-1])
    assert read_keys(location, "train/3/link.png") == [KEYS[-1].encode()]


def test_an_empty_file_is_read_as_no_bytes(tmp_path):
    location = write_folder(tmp_path, KEYS)
    (tmp_path / KEYS[0]).write_bytes(b"")
    assert read_keys(location, KEYS[0]) == [b""]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="has no /proc")
def test_a_file_that_is_longer_than_it_says_is_read_to_its_end(tmp_path):
    location = write_folder(tmp_path, KEYS)
    (tmp_path / "train" / "3" / "link.png").symlink_to("/proc/version")
    assert read_keys(location, "train/3/link.png") == [Path("/proc/version").read_bytes()]


@forks
def test_a_file_that_nobody_may_read_is_a_fault(public_folder):
    location = write_folder(public_folder, KEYS)
    (public_folder / KEYS[0]).chmod(0o000)
    fault = ReadFault("unreadable", "Permission denied")
    assert as_nobody(read_keys, location, KEYS[0], KEYS[1]) == [fault, KEYS[1].encode()]


@forks
def test_a_link_into_a_closed_folder_is_a_fault_of_one_image(public_folder):
    location = write_folder(public_folder / "digits", KEYS)
    write_folder(public_folder / "closed", ["1.png"])
    (public_folder / "digits" / "train" / "3" / "link.png").symlink_to(public_folder / "closed" / "1.png")
    (public_folder / "closed").chmod(0o000)
    assert "train/3/link.png" in keys_of(as_nobody(list_dataset, location, Config()).train)
    assert as_nobody(read_keys, location, "train/3/link.png") == [ReadFault("unreadable", "Permission denied")]


def read_without_descriptors(location, key):
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    return read_keys(location, key)


@forks
def test_running_out_of_open_files_is_no_fault_of_an_image(tmp_path):
    location = write_folder(tmp_path, KEYS)
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool,
        pytest.raises(DataError, match=r"1\.png: expected .*, got Too many open files"),
    ):
        pool.submit(read_without_descriptors, location, KEYS[0]).result()


def read_in_one_more_gigabyte(location, key):
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**30, used_bytes + 2**30))
    return read_keys(location, key)


@forks
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="has no /proc")
def test_a_file_larger_than_memory_is_a_fault_of_one_image(tmp_path):
    location = write_folder(tmp_path, KEYS)
    os.truncate(tmp_path / KEYS[0], 2**33)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        (fault,) = pool.submit(read_in_one_more_gigabyte, location, KEYS[0]).result()
    assert isinstance(fault, ReadFault)
    assert fault.reason == "too_large"


@pytest.mark.parametrize("kind", ["folder", "file uri"])
def test_a_location_crosses_a_pickle_without_what_it_has_opened(kind, tmp_path):
    location = write_dataset(kind, tmp_path, KEYS)
    unused = pickle.dumps(location)
    list_dataset(location, Config())
    assert pickle.dumps(location) == unused
    assert read_keys(pickle.loads(unused), KEYS[0]) == [KEYS[0].encode()]


@pytest.mark.parametrize("fault", [ReadFault("unreadable", "Permission denied"), ReadFault("not_a_file", "a pipe")])
def test_a_fault_crosses_a_pickle_unchanged(fault):
    assert pickle.loads(pickle.dumps(fault)) == fault
