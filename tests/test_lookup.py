import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import ALL_TRAIN, pack_tar, scan_archive, write_folder

from pipeline.data.files import Location, ReadFault
from pipeline.data.lookup import read_files, read_members


def test_files_are_found_by_displayed_keys_in_their_order(tmp_path):
    location = write_folder(tmp_path, ["a/1", "a/2", os.fsdecode(b"a/\xff"), r"a/\xfe"])
    keys = ["a/2", r"a/\xff", r"a/\xfe", "a/gone", "a/1"]
    found = dict(read_files(location, keys))
    assert list(found) == keys
    assert [found[key] for key in ("a/2", "a/1", r"a/\xff", r"a/\xfe")] == [b"a/2", b"a/1", b"a/\xff", rb"a/\xfe"]
    assert found["a/gone"].reason == "unreadable"


def test_of_a_folder_that_is_gone_every_key_is_answered(tmp_path):
    found = list(read_files(Location("folder", str(tmp_path / "gone")), ["a", "b"]))
    assert [(key, data.reason) for key, data in found] == [("a", "unreadable"), ("b", "unreadable")]


def test_the_package_has_no_other_images():
    ((_, data),) = read_files(Location("package", "digits"), ["train/0/none.png"])
    assert isinstance(data, ReadFault)


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_members_are_found_with_and_without_an_index(tmp_path, kind, is_indexed):
    path = tmp_path / f"all.{kind}"
    if kind == "tar":
        path.write_bytes(pack_tar([(f"3/{row}.png", b"image %d" % row) for row in range(5)]))
    else:
        rows = {"image": [b"image %d" % row for row in range(5)], "label": ["3"] * 5}
        stream = io.BytesIO()
        pq.write_table(pa.table(rows), stream)
        path.write_bytes(stream.getvalue())
    scanned = scan_archive(path, ALL_TRAIN)
    keys = [key.decode() for key in scanned.index["train"]["key"].to_pylist()]
    wanted = [keys[3], f"{path.name}/gone", keys[1]]
    indexes = list(scanned.index.values()) if is_indexed else None
    found = dict(read_members(Location("folder", str(path)), scanned.archive, indexes, wanted, ALL_TRAIN))
    assert (found[keys[3]], found[keys[1]]) == (b"image 3", b"image 1")
    assert found[f"{path.name}/gone"].reason == "unreadable"
