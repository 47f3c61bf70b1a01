import os
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipeline.config import Config
from pipeline.data.archives import find_archives
from pipeline.data.files import split_glob
from pipeline.data.formats.index import LEFT_OUT, NO_SPLIT, TRAIN, VALID, Archive, ScannedImages, make_index
from pipeline.data.splits import is_held_out
from pipeline.errors import DataError

LOCAL = pafs.LocalFileSystem()
UNSPLIT = Config(valid_fraction=0.5)


def lay(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    return folder


def lay_mock(*names):
    filesystem, root = pafs.FileSystem.from_uri("mock:///bucket/data")
    for name in names:
        filesystem.create_dir(f"{root}/{name}".rpartition("/")[0])
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(b"12345")
    return filesystem, root


def find(folder, pattern="", config=UNSPLIT):
    return [archive.name for archive in find_archives(LOCAL, str(folder), pattern, config, Counter())]


def make_rows(sides, labels=None, group_starts=(0,)):
    num_rows = len(sides)
    return ScannedImages(
        keys=pa.chunked_array([pa.array([b"a.tar/%d" % row for row in range(num_rows)], pa.binary())]),
        labels=np.asarray(labels or [0] * num_rows, np.int32),
        offsets=np.arange(num_rows),
        sizes=np.ones(num_rows, np.int64),
        sides=np.asarray(sides, np.int8),
        class_names=("3", "7"),
        group_starts=np.asarray(group_starts),
    )


def index_of(rows, config=UNSPLIT):
    archive = Archive("tar", "/data/a.tar", "a.tar", 0, None, None, None)
    return make_index(archive, rows, config, (), Counter())


# Globs


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("data/mnist", ("data/mnist", "")),
        ("*.tar", (".", "*.tar")),
        ("/data/*/a.tar", ("/data/", "*/a.tar")),
        ("data/a-{000..146}.tar", ("data/", "a-{000..146}.tar")),
        ("s3://bucket/x?region=eu", ("s3://bucket/x?region=eu", "")),
        ("s3://bucket/x/**.tar?region=eu", ("s3://bucket/x/?region=eu", "**.tar")),
        ("what?/*.tar", ("what?/", "*.tar")),
    ],
)
def test_a_glob_is_cut_off_where_it_begins(data, parts):
    assert split_glob(data) == parts


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
def test_a_glob_chooses_files_in_the_order_of_people(tmp_path, pattern, found):
    lay(tmp_path, "a-10.tar", "a-9.tar", "a-08.tar", "b+.tar", "x/a-1.tar", "x/y/a-1.tar")
    assert find(tmp_path, pattern) == found


def test_a_glob_that_fits_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"/\*\.tar: expected .tar or .parquet files, got none"):
        find(lay(tmp_path, "a.txt"), "*.tar")


def test_a_range_too_long_to_mean_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"at most 100000 numbers, got \{0\.\.99999999\}; use \*"):
        find(tmp_path, "{0..99999999}.tar")


# Folders and files


def test_archives_are_found_at_any_depth(tmp_path):
    lay(tmp_path, "x/2.tar", "x/10.TAR", "1.tar", ".hidden/3.tar", "x/.4.tar", "README.md", "x/labels.csv")
    ignored = Counter()
    found = find_archives(LOCAL, f"{tmp_path}/", "", UNSPLIT, ignored)
    assert [archive.name for archive in found] == ["1.tar", "x/2.tar", "x/10.TAR"]
    assert ignored == {".md": 1, ".csv": 1}
    status = (tmp_path / "1.tar").stat()
    assert found[0] == Archive("tar", f"{tmp_path}/1.tar", "1.tar", 5, status.st_mtime_ns, None, None)


def test_a_store_is_searched_as_a_folder_is():
    filesystem, root = lay_mock("x/2.parquet", "x/10.parquet", "1.parquet", ".hidden/3.parquet", "README.md")
    ignored = Counter()
    found = find_archives(filesystem, root, "", UNSPLIT, ignored)
    assert [archive.name for archive in found] == ["1.parquet", "x/2.parquet", "x/10.parquet"]
    assert (found[0].kind, found[0].path, found[0].size_bytes, ignored) == (
        "parquet", f"{root}/1.parquet", 5, {".md": 1}
    )  # fmt: skip


def test_one_file_is_named_by_its_last_part(tmp_path):
    assert find(lay(tmp_path, "a.tar") / "a.tar") == ["a.tar"]


def test_a_folder_of_images_or_of_nothing_is_left_to_class_folders(tmp_path):
    ignored = Counter()
    lay(tmp_path, "train/3/1.png", "train/7/notes.tar", "mnist.tgz", "README.md")
    assert find_archives(LOCAL, str(tmp_path), "", Config(), ignored) == []
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty") == []
    assert ignored == {}


def test_a_link_to_a_parent_is_not_followed(tmp_path):
    lay(tmp_path, "x/1.tar", "outside/2.tar")
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    (tmp_path / "x" / "beside").symlink_to(tmp_path / "outside")
    assert find(tmp_path / "x") == ["1.tar", "beside/2.tar"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.tar", "train/3/1.png"], "either class folders of images or archives, got both train/3/1.png and a.tar"),
        (["a.tar", "b.parquet"], "archives of one kind, got a.tar and b.parquet"),
        (["a.tar", "b.tar.gz"], "got b.tar.gz, which is compressed; unpack it"),
        (["a.tgz"], "got a.tgz, which is compressed"),
        (["train-0.tar", "valid-0.tar", "0.tar"], "as a word of every file's path, got 0.tar"),
    ],
)
def test_what_is_no_one_dataset_is_an_error(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        find(lay(tmp_path, *names), config=Config())


@pytest.mark.parametrize(("name", "found"), [("a.zip", "none"), ("a.png", "a.png")])
def test_another_file_is_an_error(tmp_path, name, found):
    with pytest.raises(DataError, match=f"expected .tar or .parquet files, got {found}"):
        find(lay(tmp_path, name) / name)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"expected a file or folder at .*/no, got nothing"):
        find(tmp_path / "no")


def test_what_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a.tar: expected a tar file, got none that can be read"):
        find(tmp_path)


# Splits of files


def test_the_first_synonym_of_valid_is_chosen_and_others_left_out(tmp_path):
    lay(tmp_path, "train-0.parquet", "test-0.parquet", "validation-0.parquet")
    found = find_archives(LOCAL, str(tmp_path), "", Config(), Counter())
    assert [(each.name, each.split, each.split_name) for each in found] == [
        ("train-0.parquet", "train", "train"), ("validation-0.parquet", "valid", "validation")
    ]  # fmt: skip


def test_train_alone_is_no_split(tmp_path):
    (found,) = find_archives(LOCAL, str(lay(tmp_path, "train-0.parquet")), "", UNSPLIT, Counter())
    assert found.split is None


def test_holding_out_beside_splits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"got files of train and of test in .*; leave the option out"):
        find(lay(tmp_path, "train-0.tar", "test-0.tar"))


# The index


def test_rows_go_to_their_side_in_order():
    scan, index = index_of(make_rows([TRAIN, VALID, LEFT_OUT, TRAIN], [1, 0, 0, 1]), Config())
    assert index["train"].to_pydict() == {
        "key": [b"a.tar/0", b"a.tar/3"], "label": [1, 1], "offset": [0, 3], "size": [1, 1]
    }  # fmt: skip
    assert index["valid"]["offset"].to_pylist() == [1]
    assert scan.num_images == {"train": {"7": 2}, "valid": {"3": 1}}


def test_rows_without_a_split_are_held_out_by_their_keys():
    _, index = index_of(make_rows([NO_SPLIT] * 100))
    keys = index["valid"]["key"].to_pylist()
    assert keys == [key for key in (b"a.tar/%d" % row for row in range(100)) if is_held_out(key, 0.5)]
    assert len(index["train"]) + len(keys) == 100


def test_rows_without_a_split_are_an_error_when_nothing_is_held_out():
    with pytest.raises(DataError, match=r"/data/a.tar: expected train and valid or val or .*, got no two splits"):
        index_of(make_rows([NO_SPLIT]), Config())


def test_only_classes_that_are_asked_for_are_listed():
    scan, index = index_of(make_rows([TRAIN] * 3, [0, 1, 0]), Config(classes=("7", "9")))
    assert index["train"]["offset"].to_pylist() == [1]
    assert (scan.class_names, scan.num_images["train"]) == (("3", "7"), {"7": 1})


def test_row_groups_are_told_in_rows_of_each_index():
    sides = [TRAIN, TRAIN, VALID, VALID, TRAIN, VALID, TRAIN]
    scan, _ = index_of(make_rows(sides, group_starts=(0, 2, 4)), Config())
    assert scan.row_groups == {"train": (0, 2, 4), "valid": (0, 2, 3)}


def test_what_crosses_ray_is_the_same_after_it(tmp_path):
    (archive,) = find_archives(LOCAL, str(lay(tmp_path, "a.tar")), "", UNSPLIT, Counter())
    scan, index = index_of(make_rows([TRAIN, VALID]))
    assert pickle.loads(pickle.dumps((archive, scan, index))) == (archive, scan, index)
