import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline.errors import CacheError, OutputError
from pipeline.storage import absolute_root, open_root, write_whole


@pytest.mark.parametrize(("option", "error_class"), [("--out", OutputError), ("--cache", CacheError)])
def test_errors_are_of_the_option_that_they_concern(option, error_class):
    with pytest.raises(
        error_class, match=f"^{option} ~no-such-user/x: expected a folder, got no such user; give a full path$"
    ):
        absolute_root(option, "~no-such-user/x", error_class)
    with pytest.raises(error_class, match=f"^{option}: expected a URI that can be opened, got s3://; name a bucket"):
        open_root(option, "s3://", error_class)
    with pytest.raises(error_class, match=rf"^{option}: expected a folder whose name is UTF-8, got /d/\\xff; choose"):
        open_root(option, "/d/\udcff", error_class)


def write_and_look(folder, stream):
    stream.write(b"new")
    return sorted(path.name for path in folder.iterdir())


def test_a_local_file_is_written_beside_its_name(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    seen = []
    write_whole(pafs.LocalFileSystem(), f"{tmp_path}/a", lambda stream: seen.extend(write_and_look(tmp_path, stream)))
    assert seen == [f".a.{os.getpid()}.tmp", "a"]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"new")]


@pytest.mark.parametrize("is_local", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, is_local):
    filesystem, path = open_root("--out", str(tmp_path) if is_local else "mock:///bucket", OutputError)
    filesystem.create_dir(path, recursive=True)
    write_whole(filesystem, f"{path}/a", lambda stream: stream.write(b"old"))
    with pytest.raises(ZeroDivisionError, match="division"):
        write_whole(filesystem, f"{path}/a", lambda stream: stream.write(b"new") and 1 / 0)
    assert [info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path))] == ["a"]
    with filesystem.open_input_stream(f"{path}/a") as stream:
        assert stream.read() == b"old"


def test_a_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    Path(tmp_path / "link").symlink_to("real")
    assert absolute_root("--out", f"{tmp_path}/link/", OutputError) == f"{tmp_path}/link"
