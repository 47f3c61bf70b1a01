import os
from collections import Counter
from functools import partial

import pytest
from builders import LOCAL, write_bucket, write_files

from pipeline.config import Config
from pipeline.data.archives import find_archives
from pipeline.data.formats.index import Archive
from pipeline.errors import DataError

write_five = partial(write_files, content=b"12345")
UNSPLIT = Config(valid_fraction=0.5)


def find(folder, pattern="", config=UNSPLIT):
    return [archive.name for archive in find_archives(LOCAL, str(folder), pattern, config, Counter())]


# Globs


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.tar", ["a-08.tar", "a-9.tar", "a-10.tar", "b+.tar"]),
        ("**/*.tar", ["a-08.tar", "a-9.tar", "a-10.tar", "b+.tar", "x/a-1.tar", "x/y/a-1.tar"]),
        ("**", ["a-08.tar", "a-9.tar", "a-10.tar", "b+.tar", "x/a-1.tar", "x/y/a-1.tar"]),
        ("*/*.tar", ["x/a-1.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-10.tar"]),
        ("a-{8..10}.tar", ["a-9.tar", "a-10.tar"]),
        ("{b+,x/*,a-9*}{.tar,}", ["a-9.tar", "b+.tar", "x/a-1.tar"]),
    ],
)
def test_a_glob_chooses_files_in_natural_order(tmp_path, pattern, found):
    write_five(tmp_path, ["a-10.tar", "a-9.tar", "a-08.tar", "b+.tar", "x/a-1.tar", "x/y/a-1.tar"])
    assert find(tmp_path, pattern) == found


def test_a_glob_that_fits_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"/\*\.tar: expected .*, got none"):
        find(write_five(tmp_path, ["a.txt"]), "*.tar")


def test_a_range_too_long_to_mean_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"expected .* 100000 .*, got \{0\.\.99999999\}"):
        find(tmp_path, "{0..99999999}.tar")


# Folders and files


def test_archives_are_found_at_any_depth(tmp_path):
    write_five(tmp_path, ["x/2.tar", "x/10.TAR", "1.tar", ".hidden/3.tar", "x/.4.tar", "README.md", "x/labels.csv"])
    ignored = Counter()
    found = find_archives(LOCAL, f"{tmp_path}/", "", UNSPLIT, ignored)
    assert [archive.name for archive in found] == ["1.tar", "x/2.tar", "x/10.TAR"]
    assert ignored == {".md": 1, ".csv": 1}
    status = (tmp_path / "1.tar").stat()
    assert found[0] == Archive("tar", f"{tmp_path}/1.tar", "1.tar", 5, status.st_mtime_ns, None, None)


def test_a_store_is_searched_as_a_folder_is():
    names = ["x/2.parquet", "x/10.parquet", "1.parquet", ".hidden/3.parquet", "README.md"]
    store, root = write_bucket(names, b"12345").store
    ignored = Counter()
    found = find_archives(store, root, "", UNSPLIT, ignored)
    assert [archive.name for archive in found] == ["1.parquet", "x/2.parquet", "x/10.parquet"]
    assert (found[0].kind, found[0].path, found[0].size_bytes, ignored) == (
        "parquet", f"{root}/1.parquet", 5, {".md": 1}
    )  # fmt: skip


def test_one_file_is_named_by_its_last_part(tmp_path):
    assert find(write_five(tmp_path, ["a.tar"]) / "a.tar") == ["a.tar"]


def test_a_folder_of_images_or_of_nothing_is_left_to_class_folders(tmp_path):
    ignored = Counter()
    write_five(tmp_path, ["train/3/1.png", "train/7/notes.tar", "mnist.tgz", "README.md"])
    assert find_archives(LOCAL, str(tmp_path), "", Config(), ignored) == []
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty") == []
    assert ignored == {}


def test_a_link_to_a_parent_is_not_followed(tmp_path):
    write_five(tmp_path, ["x/1.tar", "outside/2.tar"])
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "x" / "beside").symlink_to(tmp_path / "outside")
    assert find(tmp_path / "x") == ["1.tar", "beside/2.tar"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.tar", "train/3/1.png"], "got both train/3/1.png and a.tar"),
        (["a.tar", "b.parquet"], "got a.tar and b.parquet"),
        (["a.tar", "b.tar.gz"], "got b.tar.gz, which is compressed"),
        (["a.tgz"], "got a.tgz, which is compressed"),
        (["train-0.tar", "valid-0.tar", "0.tar"], "every file's path, got 0.tar"),
    ],
)
def test_what_is_no_one_dataset_is_an_error(tmp_path, names, message):
    with pytest.raises(DataError, match=f"expected .*{message}"):
        find(write_five(tmp_path, names), config=Config())


@pytest.mark.parametrize(("name", "found"), [("a.zip", "none"), ("a.png", "a.png")])
def test_another_file_is_an_error(tmp_path, name, found):
    with pytest.raises(DataError, match=f"{name}: expected .*, got {found}"):
        find(write_five(tmp_path, [name]) / name)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"expected .*/no, got nothing"):
        find(tmp_path / "no")


def test_what_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: expected a tar file"):
        find(tmp_path)


# Splits of files


def test_the_first_synonym_of_valid_is_chosen_and_others_left_out(tmp_path):
    write_five(tmp_path, ["train-0.parquet", "test-0.parquet", "validation-0.parquet"])
    found = find_archives(LOCAL, str(tmp_path), "", Config(), Counter())
    assert [(each.name, each.split, each.split_name) for each in found] == [
        ("train-0.parquet", "train", "train"), ("validation-0.parquet", "valid", "validation")
    ]  # fmt: skip


def test_train_alone_is_no_split(tmp_path):
    (found,) = find_archives(LOCAL, str(write_five(tmp_path, ["train-0.parquet"])), "", UNSPLIT, Counter())
    assert found.split is None


def test_holding_out_beside_splits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"^--valid-fraction: expected .* train and of test in "):
        find(write_five(tmp_path, ["train-0.tar", "test-0.tar"]))
