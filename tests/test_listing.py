"""Splits, classes and the listing of a dataset, and its digest."""

import os
import pickle
import re
import time
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest
from builders import KEYS, keys_of, put_in_bucket, read_keys, write_bucket, write_dataset, write_folder

from pipeline.config import Config
from pipeline.data.files import Location
from pipeline.data.formats.index import Archive, Scan
from pipeline.data.listing import list_archives, list_dataset
from pipeline.errors import DataError

UNSPLIT = Config(valid_fraction=0.25)
every_kind = pytest.mark.parametrize("kind", ["folder", "bucket"])


# Splits and classes


@every_kind
def test_splits_and_classes_are_listed_in_order(kind, tmp_path):
    listing = list_dataset(write_dataset(kind, tmp_path, KEYS[::-1]), Config())
    assert keys_of(listing.train) + keys_of(listing.valid) == KEYS
    assert listing.train["label"].to_pylist() == listing.valid["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert (listing.classes, listing.valid_split, listing.num_ignored) == (("3", "7"), "valid", {})
    assert listing.num_images == 12


@every_kind
def test_a_table_has_binary_keys_and_int32_labels(kind, tmp_path):
    listing = list_dataset(write_dataset(kind, tmp_path, KEYS), Config())
    assert listing.split("train") is listing.train
    assert listing.split("valid").schema == pa.schema(
        [("key", pa.binary()), ("label", pa.int32()), ("size", pa.int64())][: 2 if kind == "folder" else 3]
    )


@every_kind
@pytest.mark.parametrize("name", ["valid", "val", "validation", "test"])
def test_the_validation_split_is_found_by_its_usual_names(kind, name, tmp_path):
    location = write_dataset(kind, tmp_path, [key.replace("valid/", f"{name}/") for key in KEYS])
    listing = list_dataset(location, Config())
    assert (listing.valid_split, keys_of(listing.valid)[0]) == (name, f"{name}/3/1.png")


@pytest.mark.parametrize(("names", "found"), [(("test", "val"), "val"), (("test", "validation", "valid"), "valid")])
def test_of_several_names_the_first_is_taken(names, found, tmp_path):
    for name in names:
        write_folder(tmp_path, [key.replace("valid/", f"{name}/") for key in KEYS])
    assert list_dataset(Location("folder", str(tmp_path)), Config()).valid_split == found


def test_splits_that_are_named_are_used(tmp_path):
    write_folder(tmp_path, [key.replace("train/", "learn/").replace("valid/", "exam/") for key in KEYS])
    location = write_folder(tmp_path, KEYS)
    listing = list_dataset(location, Config(train_split="learn", valid_split="exam"))
    assert (keys_of(listing.train)[0], keys_of(listing.valid)[0]) == ("learn/3/1.png", "exam/3/1.png")


def test_a_named_split_has_no_synonyms(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder val/ .*, got train, valid"):
        list_dataset(write_folder(tmp_path, KEYS), Config(valid_split="val"))


@pytest.mark.parametrize("part", ["train", "train/3", "valid"])
def test_links_to_folders_are_followed(part, tmp_path):
    location = write_folder(tmp_path / "digits", KEYS)
    expected = list_dataset(location, Config())
    (tmp_path / "digits" / part).rename(tmp_path / "elsewhere")
    (tmp_path / "digits" / part).symlink_to(tmp_path / "elsewhere")
    assert list_dataset(location, Config()).sha256 == expected.sha256
    assert read_keys(location, *KEYS) == [key.encode() for key in KEYS]


@every_kind
def test_only_the_classes_asked_for_are_listed(kind, tmp_path):
    location = write_dataset(kind, tmp_path, [*KEYS, "train/5/1.png", "train/notes/a.txt", "valid/9/1.png"])
    listing = list_dataset(location, Config(classes=("7", "3")))
    assert (listing.classes, keys_of(listing.train) + keys_of(listing.valid)) == (("3", "7"), KEYS)
    assert listing.num_ignored == {}


def test_classes_are_in_natural_order(tmp_path):
    names = ("02", "2", "10")
    keys = [f"{split}/{name}/1.png" for split in ("train", "valid") for name in reversed(names)]
    listing = list_dataset(write_folder(tmp_path, keys), Config())
    assert listing.classes == names
    assert keys_of(listing.train) == [f"train/{name}/1.png" for name in names]


@every_kind
def test_folders_inside_a_class_belong_to_it(kind, tmp_path):
    inner = ["train/7/a/b/c/1.png", "train/7/a/2.png", "train/7/folder.png/3.png"]
    listing = list_dataset(write_dataset(kind, tmp_path, KEYS + inner), Config(classes=("3", "7")))
    sevens = [key for key in keys_of(listing.train) if key.startswith("train/7/")]
    assert sevens == sorted(inner + [f"train/7/{number}.png" for number in (1, 10, 2)])
    assert listing.train["label"].to_pylist() == [0] * 3 + [1] * 6


@pytest.mark.parametrize(
    "name", ["1.png", "a.PNG", "b.Jpg", "c.JPEG", "d.tif", "e.webp", "f.gif", "a.tar.bmp", "x.pgm"]
)
def test_an_image_is_known_by_its_ending(name, tmp_path):
    listing = list_dataset(write_folder(tmp_path, [*KEYS, f"train/3/x{name}"]), Config())
    assert f"train/3/x{name}" in keys_of(listing.train)


# Files that are no images


@every_kind
def test_other_files_are_counted_by_their_ending(kind, tmp_path):
    others = ["labels.csv", "train/.DS_Store", "train/3/.DS_Store", "train/3/notes.TXT", "train/3/a/b.txt",
              "valid/7/png", "valid/7/photo.png.part", "valid/7/archive.tar.gz", "README"]  # fmt: skip
    listing = list_dataset(write_dataset(kind, tmp_path, KEYS + others), Config())
    assert keys_of(listing.train) + keys_of(listing.valid) == KEYS
    counts = {".DS_Store": 2, ".csv": 1, ".gz": 1, ".part": 1, ".txt": 2, "none": 2}
    assert listing.num_ignored == counts


@every_kind
def test_images_outside_of_class_folders_are_counted_too(kind, tmp_path):
    listing = list_dataset(write_dataset(kind, tmp_path, [*KEYS, "cover.jpg", "train/sprite.png"]), Config())
    assert listing.num_ignored == {".jpg": 1, ".png": 1}


@every_kind
def test_a_dataset_without_splits_counts_a_file_once(kind, tmp_path):
    keys = [f"{name}/{number}.png" for name in "37" for number in range(40)]
    listing = list_dataset(write_dataset(kind, tmp_path, [*keys, "labels.csv", "3/a.txt"]), UNSPLIT)
    assert listing.num_ignored == {".csv": 1, ".txt": 1}


@every_kind
def test_the_shadow_files_of_a_mac_are_no_images_and_one_line_of_the_count(kind, tmp_path):
    shadows = [f"train/3/._{number}.png" for number in range(50)]
    listing = list_dataset(write_dataset(kind, tmp_path, KEYS + shadows), Config())
    assert keys_of(listing.train) + keys_of(listing.valid) == KEYS
    assert list(listing.num_ignored.values()) == [50]


@every_kind
@pytest.mark.parametrize(
    "hidden",
    [".git/1.png", "train/.cache/1.png", "train/3/.ipynb_checkpoints/1.png", "@eaDir/1.png", "train/@eaDir/1.png",
     "train/3/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "valid/__MACOSX/3/1.png", "valid/7/$RECYCLE.BIN/1.png",
     "train/lost+found/1.png", "train/System Volume Information/1.png", "train/3/deep/#recycle/1.png"],
)  # fmt: skip
def test_folders_of_systems_are_no_part_of_a_dataset_and_counted(kind, hidden, tmp_path):
    listing = list_dataset(write_dataset(kind, tmp_path, [*KEYS, hidden]), Config())
    assert listing.classes == ("3", "7")
    assert keys_of(listing.train) + keys_of(listing.valid) == KEYS
    assert list(listing.num_ignored.values()) == [1] * (hidden.startswith(("train", "valid")))


@every_kind
def test_folders_of_systems_are_no_classes_without_splits(kind, tmp_path):
    keys = [f"{name}/{number}.png" for name in ("3", "7", "__MACOSX", "lost+found") for number in range(40)]
    listing = list_dataset(write_dataset(kind, tmp_path, keys), Config(valid_fraction=0.3))
    assert listing.classes == ("3", "7")


# Without splits


@every_kind
def test_without_splits_keys_begin_with_the_class(kind, tmp_path):
    keys = [f"{name}/{number:02}.png" for name in ("cat", "dog", "eel") for number in range(40)]
    listing = list_dataset(write_dataset(kind, tmp_path, keys), Config(valid_fraction=0.25, classes=("dog", "eel")))
    assert listing.classes == ("dog", "eel")
    assert sorted(keys_of(listing.train) + keys_of(listing.valid)) == keys[40:]
    assert keys_of(listing.train) == sorted(keys_of(listing.train))


# What is wrong with a dataset


WRONG = [
    (["a.txt"], {}, r"expected a folder train/, got no folder at all"),
    (["3/1.png", "7/1.png"], {}, r"expected a folder train/, got 3, 7;"),
    (["Train/3/1.png", "Valid/3/1.png"], {}, r"expected a folder train/, got Train, Valid;"),
    ([f"c{n:02}/1.png" for n in range(12)], {}, r"expected a folder train/, got c00, .*, c09 and 2 more;"),
    (["train/3/1.png"], {}, r"expected a folder valid/ or val/ or validation/ or test/ beside train/, got train;"),
    (KEYS, {"valid_split": "dev"}, r"expected a folder dev/ beside train/, got train, valid;"),
    (KEYS, {"valid_fraction": 0.2}, r"--valid-fraction: expected .*, got train/ in "),
    (["train/3/a.txt", "valid/3/a.txt"], {}, r"expected image files in class folders, got none; .*\.avif .*\.webp"),
    (["train/1.png", "valid/1.png"], {}, r"expected image files in class folders, got 2 images beside them;"),
    (["1.png"], {"valid_fraction": 0.5}, r"expected at least two class folders, got 1 image of one class; give"),
]  # fmt: skip


@every_kind
@pytest.mark.parametrize(("keys", "options", "message"), WRONG)
def test_a_dataset_that_cannot_be_used_is_refused_with_its_reason(kind, keys, options, message, tmp_path):
    location = write_dataset(kind, tmp_path, keys)
    with pytest.raises(DataError, match=message):
        list_dataset(location, Config(**options))


LEVELS = [
    ("train", None, "3, 7; give {root}, which has train/ and valid/"),
    ("valid", None, "3, 7; give {root}, which has train/ and valid/"),
    ("train/3", None, "3 images of one class; give {root}, which has train/ and valid/"),
    ("train/3", 0.2, "3 images of one class; give {root}, which has train/ and valid/"),
    ("..", None, "data; give {root}, which has train/ and valid/"),
    ("..", 0.2, "data; give {root}, which has train/ and valid/"),
    ("whole/3", None, "2 images of one class; give the folder of all classes, {root}/whole if it is that, with"),
    ("whole/3", 0.2, "2 images of one class; give the folder of all classes, {root}/whole if it is that, with"),
    ("single/train/3", None, "1 image of one class; give the folder of all classes, {root}/single/train if"),
    ("single/train", None, "3; give a folder with train and valid, or one of at least two class folders"),
    ("single", None, "train; name it with --valid-split, or point --data at train/ itself"),
]


@every_kind
@pytest.mark.parametrize(("below", "fraction", "found"), LEVELS)
def test_a_folder_above_or_below_the_dataset_is_told_which_is_meant(kind, below, fraction, found, tmp_path):
    location = write_dataset(kind, tmp_path, [])
    root = f"{location.root}/top/data"
    keys = [*KEYS, "single/train/3/1.png", *(f"whole/{name}/{number}.png" for name in "37" for number in "12")]
    fill = {"folder": write_folder, "bucket": lambda folder, keys: write_bucket(keys)}[kind]
    fill(tmp_path, [f"top/data/{key}" for key in keys])
    given = f"{location.root}/top" if below == ".." else f"{root}/{below}"
    with pytest.raises(DataError, match=re.escape(f", got {found.format(root=root)}")):
        list_dataset(Location(location.kind, given), Config(valid_fraction=fraction))


def test_names_need_not_be_utf8(tmp_path):
    keys = ["train/3/\udcff.png", "train/\udce9t\udce9/1.png", "valid/3/\udcff\udcfe.png", "valid/\udce9t\udce9/1.png"]
    location = write_folder(tmp_path, keys)
    listing = list_dataset(location, Config())
    assert listing.classes == ("3", "\\xe9t\\xe9")
    assert keys_of(listing.train) + keys_of(listing.valid) == keys
    assert read_keys(location, *keys) == [os.fsencode(key) for key in keys]


def test_a_class_of_a_name_that_is_not_utf8_can_be_asked_for(tmp_path):
    location = write_folder(tmp_path, [*KEYS, "train/\udcff/1.png", "valid/\udcff/1.png"])
    assert list_dataset(location, Config(classes=("3", "\udcff"))).classes == ("3", "\\xff")


def test_errors_about_names_that_are_not_utf8_can_be_shown(tmp_path):
    location = write_folder(tmp_path / "\udcff", ["train/\udcfe/1.png", "valid/3/1.png", "\udcfd.txt"])
    with pytest.raises(DataError, match=r"\\xff: expected images of every class") as refusal:
        list_dataset(location, Config())
    assert str(refusal.value).encode().decode() == str(refusal.value)


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_a_uri_s_listing_has_sizes_and_times_for_a_cache(fraction, tmp_path):
    keys = [f"{split}{name}/{number}.png" for split in ("train/", "valid/") for name in "37" for number in range(20)]
    keys = keys if fraction is None else [key.partition("/")[2] for key in keys[:40]]
    location = write_folder(tmp_path, [*keys, keys[0].replace("0.png", "notes.txt")])
    for number, key in enumerate(keys):
        (tmp_path / key).write_bytes(bytes(number))
    uri = put_in_bucket(tmp_path)
    listing = list_dataset(uri, Config(cache="kept", valid_fraction=fraction))
    rows = pa.concat_tables([listing.train, listing.valid])
    assert rows.column_names == ["key", "label", "size", "time_ns"]
    assert sorted(keys_of(rows)) == sorted(keys)
    statuses = [(tmp_path / key).stat() for key in keys_of(rows)]
    assert rows["size"].to_pylist() == [status.st_size for status in statuses]
    store, root = uri.store
    times = [store.find(f"{root}/{key}").mtime_ns for key in keys_of(rows)]
    assert rows["time_ns"].to_pylist() == times
    assert all(abs(each - time.time_ns()) < 600 * 10**9 for each in times)
    others = {"size": (uri, None), "label": (location, "kept")}
    for last, (where, cache) in others.items():
        other = list_dataset(where, Config(cache=cache, valid_fraction=fraction))
        assert other.train.column_names[-1] == other.valid.column_names[-1] == last


# The digest


def test_the_same_files_have_the_same_digest_wherever_they_lie(tmp_path):
    digests = set()
    for kind in ("folder", "bucket"):
        (tmp_path / kind).mkdir()
        digests.add(list_dataset(write_dataset(kind, tmp_path / kind, KEYS), Config()).sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    "keys",
    [[*KEYS, "train/3/4.png"], KEYS[1:], ["train/3/0.png", *KEYS[1:]], ["train/7/x.png", *KEYS[1:]],
     [key.replace("/7/", "/8/") for key in KEYS], [key.replace("valid/", "val/") for key in KEYS]],
)  # fmt: skip
def test_another_listing_has_another_digest(keys, tmp_path):
    digest = list_dataset(write_folder(tmp_path / "first", KEYS), Config()).sha256
    assert list_dataset(write_folder(tmp_path / "second", keys), Config()).sha256 != digest


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_cache_changes_no_digest(kind, tmp_path):
    location = write_dataset(kind, tmp_path, KEYS)
    digests = {list_dataset(location, Config(cache=cache)).sha256 for cache in (None, "kept")}
    assert len(digests) == 1


def test_a_share_held_out_has_the_digest_of_the_same_rows_listed(tmp_path):
    location = write_folder(tmp_path, [f"{name}/{number}.png" for name in "37" for number in range(40)])
    listing = list_dataset(location, Config(valid_fraction=0.3))
    tables = {}
    for split in ("train", "valid"):
        rows = [(key, key[:1]) for key in listing.split(split)["key"].to_pylist()]
        chunks = [[key for key, name in rows if name == each] for each in (b"3", b"7")]
        keys = pa.chunked_array([pa.array(chunk, pa.binary()) for chunk in chunks])
        labels = pa.chunked_array([pa.array([label] * len(chunk), pa.int32()) for label, chunk in enumerate(chunks)])
        tables[split] = pa.table({"key": keys, "label": labels})
    assert replace(listing, **tables).sha256 == listing.sha256


def test_another_share_held_out_has_another_digest(tmp_path):
    location = write_folder(tmp_path, [f"{name}/{number}.png" for name in "37" for number in range(40)])
    digests = {list_dataset(location, Config(valid_fraction=fraction)).sha256 for fraction in (0.2, 0.3, 0.4)}
    assert len(digests) == 3


# Archives


@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize(
    ("names", "found"),
    [(["a.tar"], r"1 \.tar"), (["train/a.TAR", "valid/3/b.tar"], r"2 \.tar"),
     (["train/7/a.parquet", "b.tar"], r"1 \.parquet")],
)  # fmt: skip
def test_archives_beside_images_are_refused(kind, names, found, tmp_path):
    with pytest.raises(DataError, match=f"expected .*, got images and {found}"):
        list_dataset(write_dataset(kind, tmp_path, [*KEYS, *names]), Config())


def test_archives_beside_class_folders_without_splits_are_refused(tmp_path):
    location = write_folder(tmp_path, ["7/b.tar", *(f"{name}/{number}.png" for name in "37" for number in range(20))])
    with pytest.raises(DataError, match=r"expected .*, got images and 1 \.tar"):
        list_dataset(location, UNSPLIT)


def make_found(*archives, num_images=3):
    """Archives with what scans of them found; a name, the split that it says, the splits of folders inside."""
    found = []
    for name, split_name, split_names in archives:
        archive = Archive("tar", f"/data/{name}", name, 0, None, None, split_name)
        counts = {split: {"3": num_images, "7": num_images} for split in ("train", "valid")}
        rows = dict.fromkeys(counts, (0, 2 * num_images))
        found.append((archive, Scan(("3", "7"), counts, rows, split_names, {".txt": 1}), {"train": 0, "valid": 1}))
    return found


def list_found(*archives, **options):
    return list_archives(Location("folder", "/data"), make_found(*archives), Counter({".md": 1}), Config(**options))


@pytest.mark.parametrize(
    ("archives", "valid_split"),
    [
        ([("a.tar", None, ("train", "val")), ("b.tar", None, ("train", "val"))], "val"),
        ([("a.tar", None, ("train",)), ("b.tar", None, ("test",))], "test"),
        ([("train.tar", "train", ()), ("validation.tar", "validation", ())], "validation"),
    ],
)
def test_archives_are_put_together_in_their_order(archives, valid_split):
    listing = list_found(*archives)
    assert (listing.classes, listing.valid_split) == (("3", "7"), valid_split)
    assert [rows.archive.name for rows in listing.train.files] == [name for name, _, _ in archives]
    assert (listing.num_images, listing.row_groups("train")) == (24, [(0, 6), (0, 6)])
    assert listing.num_ignored == {".md": 1, ".txt": 2}


def test_archives_that_call_validation_by_two_names_are_refused():
    archives = [("a.tar", None, ("train", "val")), ("b.tar", None, ("test",))]
    with pytest.raises(DataError, match=r"^--valid-split: expected .*, got val in /data/a\.tar and test"):
        list_found(*archives)
    assert list_found(*archives, valid_split="val").valid_split == "val"


@pytest.mark.parametrize("inside", [("train", "test"), ("test", "train"), ("val", "test")])
def test_holding_out_beside_splits_of_several_archives_is_refused(inside):
    archives = [(f"{name}.tar", None, (name,)) for name in inside]
    with pytest.raises(DataError, match=rf"^--valid-fraction: expected .*, got .*/data/{inside[0]}\.tar and"):
        list_found(*archives, valid_fraction=0.2)


def test_holding_out_of_one_split_of_several_archives_is_fine():
    assert list_found(("a.tar", None, ("train",)), ("b.tar", None, ("train",)), valid_fraction=0.2).num_images == 24


def test_a_listing_crosses_a_pickle_unchanged(tmp_path):
    listing = list_dataset(write_folder(tmp_path, KEYS), Config())
    copy = pickle.loads(pickle.dumps(listing))
    assert copy == listing
    assert copy.sha256 == listing.sha256
