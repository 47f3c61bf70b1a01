import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import ROOT, write_folder

from pipeline.data.files import DIGITS, Location, locate
from pipeline.decoding import cache_key, images
from pipeline.decoding.cache_key import entry_key, file_stamps, name_entry
from pipeline.target import Target

TARGET = Target(4, 5, "L")
NAMES = [b"3/a.png", b"3/\xff.png", b"7/c.png"]
LABELS = pa.array([0, 0, 1], pa.int32())
FOLDER = Location("folder", "/d")
STAMPS = (np.array([1, 2, 3]), np.array([10**18, 10**18 + 1, -1]))


def make_key(location=FOLDER, target=TARGET, names=NAMES, labels=LABELS, stamps=STAMPS):
    return entry_key(location, target, pa.array(names, pa.binary()), labels, stamps)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, [os.fsdecode(name) for name in NAMES])


def listing_rows(names, **columns):
    """Rows of a listing, in two chunks, as they are where a shard has images of two classes."""
    table = pa.table({"key": pa.array(names, pa.binary()), **columns})
    return pa.concat_tables([table.slice(0, 1), table.slice(1)])


def key_of(location):
    return name_entry(location, TARGET, listing_rows(NAMES, label=LABELS))


def test_another_secret_leads_to_the_same_entries():
    first, second, other = (
        make_key(Location("uri", f"s3://{bucket}/d")) for bucket in ("key:one@b", "key:two@b", "key:one@c")
    )
    assert first == second != other


OTHERS = {
    "height": {"target": replace(TARGET, height=5)},
    "width": {"target": replace(TARGET, width=4)},
    "mode": {"target": replace(TARGET, mode="RGB")},
    "draft": {"target": replace(TARGET, draft=False)},
    "dataset": {"location": Location("folder", "/e")},
    "kind of dataset": {"location": Location("uri", "/d")},
    "dataset's name is not UTF-8": {"location": Location("folder", "/\udcff")},
    "names": {"names": [b"3/a.png", b"3/\xfe.png", b"7/c.png"]},
    "cut between names": {"names": [b"3/a.png3", b"/\xff.png", b"7/c.png"]},
    "order": {"names": NAMES[::-1]},
    "classes": {"labels": pa.array([0, 1, 1], pa.int32())},
    "size": {"stamps": (np.array([1, 2, 4]), STAMPS[1])},
    "time": {"stamps": (STAMPS[0], STAMPS[1] + 1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_differs_makes_another_key(name):
    assert make_key(**OTHERS[name]) != make_key()
    assert len({make_key(**other) for other in OTHERS.values()}) == len(OTHERS)


def test_another_version_of_decoding_makes_another_key(monkeypatch):
    before = make_key()
    monkeypatch.setattr(cache_key, "DECODE_VERSION", images.DECODE_VERSION + 1)
    assert make_key() != before


def test_the_key_is_the_same_in_every_process():
    code = "import test_cache_key as t; print(t.make_key())"
    paths = f"{ROOT}/tests:{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == make_key()


def test_a_slice_of_a_listing_has_the_key_of_its_rows():
    keys = pa.array([b"x", *NAMES, b"y"], pa.binary()).slice(1, 3)
    labels = pa.array([9, 0, 0, 1, 9], pa.int32()).slice(1, 3)
    assert entry_key(FOLDER, TARGET, keys, labels, STAMPS) == make_key()


# Files that change


def rewrite(path):
    path.write_bytes(b"7/x.png")


def rewrite_in_secret(path):
    status = path.stat()
    path.write_bytes(b"7/x.png")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_in_secret(path):
    other = path.with_name("other")
    other.write_bytes(b"7/x.png")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, rewrite_in_secret, replace_in_secret, os.utime, os.remove, os.truncate])
def test_a_file_that_changes_makes_another_key(folder, change):
    before = key_of(folder)
    assert key_of(folder) == before
    path = Path(folder.root) / "7" / "c.png"
    wait_for_the_clock(path)
    change(path, 2) if change is os.truncate else change(path)
    assert key_of(folder) != before


def wait_for_the_clock(path):
    """Wait until a change has another time: file systems keep it in steps of some milliseconds."""
    probe = path.with_name("probe")
    probe.write_bytes(b"")
    while probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        probe.write_bytes(b"")


def test_reading_changes_no_key(folder):
    before = key_of(folder)
    (Path(folder.root) / "7" / "c.png").read_bytes()
    (Path(folder.root) / "7" / "new.png").write_bytes(b"beside them")
    assert key_of(folder) == before


def test_stamps_of_a_folder_are_the_system_s(folder):
    sizes, times = file_stamps(folder, listing_rows([*NAMES, b"none.png", b"3/a.png/below"]))
    statuses = [(Path(folder.root) / os.fsdecode(name)).stat() for name in NAMES]
    assert sizes.tolist() == [status.st_size for status in statuses] + [-1, -1]
    assert times.tolist() == [status.st_ctime_ns for status in statuses] + [-1, -1]
    assert (sizes.dtype, times.dtype) == (np.int64, np.int64)


def test_stamps_of_a_uri_are_those_that_were_listed():
    rows = listing_rows([b"a.png", b"b.png"], size=pa.array([3, -1]), time_ns=pa.array([10**18 + 1, -1]))
    sizes, times = file_stamps(Location("uri", "s3://bucket/none"), rows)
    assert (sizes.tolist(), times.tolist()) == ([3, -1], [10**18 + 1, -1])


def test_the_name_of_an_entry_is_the_key_of_its_rows_and_stamps(folder):
    stamps = file_stamps(folder, listing_rows(NAMES))
    assert key_of(folder) == make_key(folder, stamps=stamps)


def test_images_of_the_package_have_the_size_of_its_file_alone():
    sizes, times = file_stamps(locate("digits"), listing_rows([b"train/0/1.png", b"x"]))
    assert sizes.tolist() == [DIGITS.stat().st_size] * 2
    assert times.tolist() == [-1, -1]  # the time of its installation, another on every node


def test_no_files_have_no_stamps():
    sizes, times = file_stamps(FOLDER, listing_rows([]))
    assert (sizes.tolist(), times.tolist()) == ([], [])
