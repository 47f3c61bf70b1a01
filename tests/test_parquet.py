import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import ALL_TRAIN, LOCAL, CountingStore, pack_tar, read_archive, rows_of, scan_archive, write_files

from pipeline.config import Config
from pipeline.data.archives import find_archives
from pipeline.data.files import Location, ReadFault, display, locate, read_images
from pipeline.data.formats import parquet
from pipeline.data.listing import list_dataset
from pipeline.errors import DataError

IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog", "ape"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def hugging_face(images, labels, features=FEATURES, columns=("image", "label")):
    """Make a table as `datasets` does; checked against its version 5.2, `Dataset.to_parquet`.

    https://github.com/huggingface/datasets/blob/main/src/datasets/features/features.py, `Features.arrow_schema`
    """
    schema = pa.schema(
        [(columns[0], IMAGES), (columns[1], pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.table([pa.array(images, IMAGES), pa.array(labels, pa.int64())], schema=schema)


def example(num_rows, **options):
    images = [{"bytes": b"image %d" % row, "path": f"{row}.png"} for row in range(num_rows)]
    return hugging_face(images, [row % 3 for row in range(num_rows)], **options)


def scan_parquet(folder, table, config=ALL_TRAIN, **options):
    """Write a Parquet file, `a.parquet`, and scan it."""
    pq.write_table(table, folder / "a.parquet", **options)
    return scan_archive(folder / "a.parquet", config)


def plain(images, labels, image="image", label="label"):
    return pa.table({image: images, label: labels})


# Classes and columns


def test_what_datasets_writes_is_read(tmp_path):
    scanned = scan_parquet(tmp_path, example(7), row_group_size=3)
    assert rows_of(scanned) == [(f"{row}/{row}.png", NAMES[row % 3], b"image %d" % row) for row in range(7)]
    result, index, _ = scanned
    assert (result.class_names, result.num_images["train"]) == (tuple(NAMES), {"cat": 3, "dog": 2, "ape": 2})
    assert (result.row_groups["train"], result.num_ignored) == ((0, 3, 6, 7), {})
    assert index["train"]["offset"].to_pylist() == list(range(7))


def test_splits_are_those_of_the_files_names(tmp_path):
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        pq.write_table(example(4), tmp_path / name)
    found = find_archives(LOCAL, str(tmp_path), "", Config(), Counter())
    sizes = [{split: len(rows) for split, rows in parquet.scan(LOCAL, each, Config())[1].items()} for each in found]
    assert sizes == [{"train": 0, "valid": 4}, {"train": 4, "valid": 0}]


def test_a_folder_a_tar_and_a_parquet_file_hold_the_same_images(tmp_path):
    names = [f"train/{name}/{number}.png" for number in range(12) for name in "37"]
    images = {name: name.encode() for name in names}
    write_files(tmp_path / "in", [*names, "valid/3/x.png", "valid/7/x.png"])
    listing = list_dataset(Location("folder", str(tmp_path / "in")), Config())
    keys = [display(key) for key in listing.train["key"].to_pylist()]
    classes = [listing.classes[label] for label in listing.train["label"].to_pylist()]
    files = read_images(listing.location, listing.train["key"].combine_chunks())
    expected = sorted(zip(keys, classes, files, strict=True))
    table = hugging_face(
        [{"bytes": data, "path": key} for key, data in images.items()],
        [["7", "3"].index(key.split("/")[1]) for key in images],
        {"image": {"_type": "Image"}, "label": {"names": ["7", "3"], "_type": "ClassLabel"}},
    )
    rows = rows_of(scan_parquet(tmp_path, table, row_group_size=5))
    assert sorted((key.split("/", 1)[1], name, data) for key, name, data in rows) == expected
    (tmp_path / "a.tar").write_bytes(pack_tar(images.items()))
    assert sorted(rows_of(scan_archive(tmp_path / "a.tar", ALL_TRAIN))) == expected


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        ([b"0", b"1"], pa.binary()),
        ([b"0", b"1"], pa.large_binary()),
        ([{"bytes": b"0", "path": None}, {"bytes": b"1", "path": ""}], IMAGES),
        ([{"bytes": b"0"}, {"bytes": b"1"}], pa.struct([("bytes", pa.binary())])),
    ],
)
def test_an_image_without_a_path_is_named_by_its_row(tmp_path, images, kind):
    rows = rows_of(scan_parquet(tmp_path, plain(pa.array(images, kind), ["a", "b"])))
    assert rows == [("0", "a", b"0"), ("1", "b", b"1")]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("column", ["label", "class", "cls", "labels"])
def test_classes_may_be_text(tmp_path, kind, column):
    labels = pa.array(["c10", "c9", "c10", "a"], pa.string()).cast(kind)
    result, index, _ = scan_parquet(tmp_path, plain([b"x"] * 4, labels, "png", column), row_group_size=2)
    assert result.class_names == ("a", "c9", "c10")
    assert index["train"]["label"].to_pylist() == [2, 1, 2, 0]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_numbers_without_names_are_their_own(tmp_path, kind):
    result, index, _ = scan_parquet(tmp_path, plain([b"x"] * 3, pa.array([10, 9, 10], kind)))
    assert (result.class_names, index["train"]["label"].to_pylist()) == (("9", "10"), [1, 0, 1])


def test_declared_columns_come_before_usual_names(tmp_path):
    features = {"photo": {"_type": "Image"}, "kind": {"names": NAMES, "_type": "ClassLabel"}}
    table = example(3, features=features, columns=("photo", "kind"))
    table = table.append_column("label", pa.array(["x"] * 3)).append_column("image", pa.array([b"x"] * 3))
    assert rows_of(scan_parquet(tmp_path, table))[2] == ("2/2.png", "ape", b"image 2")


@pytest.mark.parametrize("metadata", [b"no json", b"[]", b'{"info": null}', b'{"info": {"features": [1]}}'])
def test_metadata_of_another_kind_are_left_alone(tmp_path, metadata):
    table = example(3).replace_schema_metadata({b"huggingface": metadata})
    assert scan_parquet(tmp_path, table)[0].class_names == ("0", "1", "2")


def test_a_path_does_not_make_a_key_alone(tmp_path):
    table = hugging_face([{"bytes": b"1", "path": "/x/1.png"}, {"bytes": b"2", "path": "/x/1.png"}], [0, 1])
    assert [key for key, _, _ in rows_of(scan_parquet(tmp_path, table))] == ["0/x/1.png", "1/x/1.png"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (plain([b"x"], pa.array([None], pa.string())), "a class in every row, got null in row 0"),
        (hugging_face([{"bytes": b"x"}] * 3, [0, None, -1]), "a class in every row, got null in row 1"),
        (hugging_face([{"bytes": b"x"}] * 3, [0, 2, -1]), "got -1 with 3 names in row 2"),
        (hugging_face([{"bytes": b"x"}] * 2, [0, 3]), "got 3 with 3 names in row 1"),
        (plain([b"x"], [1.5]), "classes as integers or strings, got double"),
        (plain([b"x"] * 3, ["a", "", "b"]), "a class in every row, got '' in row 1"),
        (plain([b"x"] * 3, pa.array(["a", "b", " "]).dictionary_encode()), "a class in every row, got ' ' in row 2"),
        (plain([b"x"], pa.nulls(1)), "classes as integers or strings, got null"),
        (plain([b"x"], [b"cat"]), "classes as integers or strings, got binary"),
        (plain(pa.nulls(1), ["a"]), r"a column of image files, .* got image \(null\)"),
        (plain(pa.array([b"x"], pa.binary(1)), ["a"]), "a column of image files, .*fixed_size_binary"),
        (
            plain(pa.array([[1]], pa.list_(pa.uint8())), ["a"]),
            "a column of image files, .*list<",
        ),
        (plain([{"path": "x"}], ["a"]), "a column of image files, .*struct<path"),
        (pa.table([[b"x"], ["a"], ["b"]], ["image", "label", "label"]), "each column once, got image, label, label"),
        (
            pa.table({"a": [b"x"], "b": [b"x"], "label": ["c"]}),
            "one column of image, got a, b, label; name it with --im",
        ),
        (pa.table({"image": [b"x"], "y": ["c"]}), "one column of label, got image, y; name it with --label-column"),
        (pa.table({"image": [b"x"], "name": ["a"]}), "one column of label, got image, name"),
        (pa.table({"photo": [b"x"], "label": ["a"]}), "one column of image, got photo, label"),
        (pa.table({"image": ["x"], "label": ["a"]}), r"a column of image files, .*, got image \(string\), label"),
        (pa.table({}), "a column of image files, .*, got no column"),
    ],
)
def test_what_is_no_labelled_image_is_an_error(tmp_path, table, message):
    with pytest.raises(DataError, match=rf"a\.parquet: expected .*{message}"):
        scan_parquet(tmp_path, table)


def test_two_columns_of_classes_are_an_error(tmp_path):
    label = {"names": NAMES, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "fine": label, "coarse": label}
    table = example(3, features=features, columns=("image", "fine")).append_column("coarse", pa.array([0, 1, 2]))
    with pytest.raises(DataError, match=r"a\.parquet: expected one column of label, got fine, coarse"):
        scan_parquet(tmp_path, table)


def test_the_columns_can_be_named(tmp_path):
    label = {"names": NAMES, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "fine": label, "coarse": label}
    table = example(3, features=features, columns=("image", "fine")).append_column("coarse", pa.array([0, 0, 1]))
    table = table.append_column("thumb", pa.array([b"x", b"y", b"z"]))
    config = replace(ALL_TRAIN, label_column="coarse", image_column="thumb")
    scanned = scan_parquet(tmp_path, table, config)
    assert (scanned.index["train"]["label"].to_pylist(), read_archive(scanned)) == ([0, 0, 1], [b"x", b"y", b"z"])
    for name in ("label_column", "image_column"):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(DataError, match=rf"{option}: expected one of the columns .* of .*a\.parquet, got none; "):
            scan_parquet(tmp_path, table, replace(ALL_TRAIN, **{name: "none"}))


@pytest.mark.parametrize(
    ("images", "found"),
    [(pa.array([[1, 2]], pa.list_(pa.uint8())), r"image \(list<\w+: uint8>\)"),
     (pa.array(["a.png"], pa.string_view()), r"image \(string_view\)"),
     (pa.array([b"ab"], pa.binary(2)), r"image \(fixed_size_binary\[2\]\)"),
     (pa.array([{"path": "a.png"}]), r"image \(struct<path: string>\)")],
)  # fmt: skip
def test_a_column_of_another_type_is_named_with_its_type(tmp_path, images, found):
    with pytest.raises(DataError, match=rf"a\.parquet: expected a column of image files, .*, got {found}, label \("):
        scan_parquet(tmp_path, pa.table({"image": images, "label": ["a"]}))


def test_a_link_to_a_file_of_another_name_is_read_by_its_own(tmp_path):
    (tmp_path / "blobs").mkdir()
    pq.write_table(plain([b"1", b"2"], ["a", "b"]), tmp_path / "blobs" / "0f3a")
    (tmp_path / "a.parquet").symlink_to("blobs/0f3a")
    location = locate(str(tmp_path / "a.parquet"))
    (archive,) = find_archives(*location.store, "", ALL_TRAIN, Counter())
    assert (archive.name, archive.size_bytes) == ("a.parquet", (tmp_path / "blobs" / "0f3a").stat().st_size)


def test_an_empty_file_has_no_images(tmp_path):
    for table in (example(0), plain(pa.array([], pa.binary()), pa.array([], pa.string()))):
        result, index, _ = scan_parquet(tmp_path, table)
        assert (len(index["train"]), result.row_groups["train"]) == (0, (0,))


def test_only_classes_that_are_asked_for_are_read(tmp_path):
    scanned = scan_parquet(tmp_path, example(9), Config(valid_fraction=1e-9, classes=("dog", "ape")), row_group_size=4)
    assert read_archive(scanned) == [b"image %d" % row for row in (1, 2, 4, 5, 7, 8)]
    assert scanned[0].row_groups["train"] == (0, 2, 5, 6)


# Reading


@pytest.mark.parametrize("rows", [range(0), range(3), range(5, 17), range(96, 100), range(100), range(3, 100, 7)])
def test_some_rows_are_read(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(parquet, "_MAX_BATCH_ROWS", 4)
    scanned = scan_parquet(tmp_path, example(100), row_group_size=9)
    some = scanned.index["train"].take(pa.array(list(rows), pa.int64()))
    assert read_archive(scanned, rows=some) == [b"image %d" % row for row in rows]


def test_an_image_without_bytes_is_one_fault(tmp_path):
    table = hugging_face([{"bytes": b"0"}, {"path": "/gone/1.png"}, None, {"bytes": b""}], [0, 0, 0, 0])
    fault = ReadFault("unreadable", "no bytes in the file, at most a path")
    assert read_archive(scan_parquet(tmp_path, table)) == [b"0", fault, fault, b""]


def test_an_image_too_large_is_one_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 3)
    scanned = scan_parquet(tmp_path, plain([b"1", b"1234"], ["a", "b"]))
    assert read_archive(scanned) == [b"1", ReadFault("too_large", "4 bytes, more than 3")]


def test_a_scan_reads_no_image_and_a_read_only_its_row_groups():
    images = [{"bytes": np.random.default_rng(row).bytes(5000), "path": f"{row}.png"} for row in range(400)]
    buffer = io.BytesIO()
    pq.write_table(hugging_face(images, [0] * 400), buffer, row_group_size=100)
    store = CountingStore("a.parquet", buffer.getvalue())
    scanned = scan_archive("bucket/a.parquet", ALL_TRAIN, store)
    assert sum(store.sizes) < 100_000
    store.sizes.clear()
    found = read_archive(scanned, rows=scanned.index["train"].slice(100, 100), store=store)
    assert found == [image["bytes"] for image in images[100:200]]
    assert sum(store.sizes) < 600_000


def test_many_small_row_groups_of_a_bucket_are_few_requests():
    buffer = io.BytesIO()
    pq.write_table(plain([b"image %d" % row for row in range(400)], ["a", "b"] * 200), buffer, row_group_size=10)
    store = CountingStore("a.parquet", buffer.getvalue())
    scanned = scan_archive("bucket/a.parquet", ALL_TRAIN, store)
    assert len(store.sizes) == 2  # the file's end, and all of the classes
    assert read_archive(scanned, store=store) == [b"image %d" % row for row in range(400)]
    assert len(store.sizes) == 4


def test_a_large_row_group_passes_through_a_small_memory(tmp_path):
    images = plain([bytes(2**12)] * 40_000, ["a"] * 40_000)
    _, index, archive = scan_parquet(tmp_path, images, use_dictionary=False, compression="NONE")
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in parquet.read_rows(LOCAL, archive, index["train"], 1))
    assert most - before < 40 * 2**20  # of 160 MiB


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -9])
def test_a_file_that_is_cut_off_is_an_error(tmp_path, cut):
    pq.write_table(example(3), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.parquet: expected to read it, got"):
        scan_archive(tmp_path / "a.parquet", ALL_TRAIN)


def test_a_damaged_row_group_is_an_error(tmp_path):
    scanned = scan_parquet(tmp_path, example(3), compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = bytes(56)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: expected to read it, got"):
        read_archive(scanned)
