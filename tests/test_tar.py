import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from builders import ALL_TRAIN, LOCAL, CountingStore, pack_tar, read_archive, rows_of, scan_archive

from pipeline.config import Config
from pipeline.data.archives import find_archives
from pipeline.data.files import ReadFault
from pipeline.data.formats import tar
from pipeline.data.splits import hashes_of
from pipeline.errors import DataError

FOLDERS = [
    (f"mnist/{split}/{name}/{number}.png", f"{split}{name}{number}".encode())
    for split in ("train", "test")
    for name in (3, 7)
    for number in range(4)
]


def scan_tar(folder, members, config=ALL_TRAIN):
    """Write a tar, `a.tar`, and scan it."""
    folder.mkdir(exist_ok=True)
    (folder / "a.tar").write_bytes(members if isinstance(members, bytes) else pack_tar(members))
    return scan_archive(folder / "a.tar", config)


# Class folders


def test_class_folders_give_splits_and_classes(tmp_path):
    scanned = scan_tar(tmp_path, FOLDERS, Config())
    assert rows_of(scanned) == [(name, name.split("/")[2], data) for name, data in FOLDERS[:8]]
    assert rows_of(scanned, "valid") == [(name, name.split("/")[2], data) for name, data in FOLDERS[8:]]
    assert scanned[0].num_images == {split: {"3": 4, "7": 4} for split in ("train", "valid")}
    assert (scanned[0].split_names, scanned[0].row_groups) == (("train", "test"), {"train": (0, 8), "valid": (0, 8)})


def test_classes_are_in_natural_order(tmp_path):
    result, index, _ = scan_tar(tmp_path, [(f"{name}/1.png", b"") for name in ("c10", "c9", "b")])
    assert result.class_names == ("b", "c9", "c10")
    assert index["train"]["label"].to_pylist() == [2, 1, 0]


def test_the_name_of_the_file_comes_before_folders(tmp_path):
    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / name).write_bytes(pack_tar(FOLDERS))
    for archive in find_archives(LOCAL, str(tmp_path), "", Config(), Counter()):
        _, index = tar.scan(LOCAL, archive, Config())
        assert len(index[archive.split]) == 16


def test_images_outside_of_classes_are_counted(tmp_path):
    others = ("README.md", "mnist/train/all.png", "mnist/sample.png", "mnist/train/3/._1.png", "mnist/train/3/a.txt")
    result, index, _ = scan_tar(tmp_path, [*FOLDERS, *((name, b"") for name in others)], Config())
    assert result.num_ignored == {"._*": 1, ".md": 1, ".png": 2, ".txt": 1}
    assert len(index["train"]) == 8


def test_another_name_of_valid_is_not_listed(tmp_path):
    others = [("mnist/val/3/1.png", b"v"), ("mnist/val/7/1.png", b"v")]
    result, index, _ = scan_tar(tmp_path, FOLDERS + others, Config())
    assert (len(index["valid"]), result.split_names, result.num_ignored) == (2, ("train", "val"), {})


def test_holding_out_beside_splits_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"^--valid-fraction: expected .* train and test in .*a\.tar"):
        scan_tar(tmp_path, FOLDERS, Config(valid_fraction=0.5))


def test_holding_out_from_a_train_folder_leaves_others_out(tmp_path):
    scanned = scan_tar(tmp_path, [*FOLDERS[:8], ("mnist/3/x.png", b"")])
    assert [name for name, _, _ in rows_of(scanned, "train")] == [name for name, _ in FOLDERS[:8]]


def test_names_that_are_no_text_are_kept(tmp_path):
    scanned = scan_tar(tmp_path, pack_tar([("train/ä/\udcff.png", b"1")], tarfile.GNU_FORMAT))
    assert scanned[1]["train"]["key"].to_pylist() == [b"a.tar/train/\xc3\xa4/\xff.png"]
    assert scanned[0].class_names == ("ä",)


# Side files


def test_what_webdataset_writes_is_read_as_it_reads_it(tmp_path):
    pattern = str(tmp_path / "train-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=30, verbose=0) as writer:
        for number in range(30):
            pixels = np.full((4, 4, 3), number, np.uint8)
            writer.write({"__key__": f"x/{number:04d}", "png": pixels, "cls": number % 3, "json": {"n": number}})
    path = tmp_path / "train-00.tar"
    data = path.read_bytes()
    with path.open("rb") as stream:
        members = webdataset.tariterators.tar_file_expander([{"url": "", "stream": stream}])
        samples = list(webdataset.tariterators.group_by_keys(members))
    expected = [(f"{sample['__key__']}.png", sample["cls"].decode(), sample["png"]) for sample in samples]
    assert rows_of(scan_tar(tmp_path / "again", data)) == expected
    assert len(expected) == 30


@pytest.mark.parametrize(
    ("side", "name"),
    [(("a.cls", b"3"), "3"), (("a.cls", b" sea lion\n"), "sea lion"), (("a.CLS", b"3"), "3"),
     (("a.json", b'{"label": 3}'), "3"), (("a.json", b'{"class": "cat", "cls": 4}'), "cat"),
     (("a.json", b'{"cls": "\xc3\xa4"}'), "ä")],
)  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False])
def test_a_class_stands_beside_its_image(tmp_path, side, name, is_first):
    members = [side, ("a.png", b"x")] if is_first else [("a.png", b"x"), side]
    assert rows_of(scan_tar(tmp_path, members)) == [("a.png", name, b"x")]


def test_cls_comes_before_json_wherever_it_stands(tmp_path):
    members = [
        ("a.json", b'{"label": 1}'),
        ("a.png", b""),
        ("a.cls", b"2"),
        ("b.cls", b"2"),
        ("b.json", b'{"label": 1}'),
        ("b.png", b""),
    ]
    assert [name for _, name, _ in rows_of(scan_tar(tmp_path, members))] == ["2", "2"]


def test_side_files_may_stand_apart_and_are_no_images(tmp_path):
    images = [(f"{number}.png", b"%d" % number) for number in range(3)]
    labels = [(f"{number}.cls", b"c%d" % number) for number in (2, 0, 1)]
    texts = [("1.txt", b""), ("9.txt", b""), ("9.cls", b"1"), ("data.json", b"{}")]
    for members in (labels + images + texts, texts + images + labels):
        scanned = scan_tar(tmp_path, members)
        assert rows_of(scanned) == [(f"{number}.png", f"c{number}", b"%d" % number) for number in range(3)]
        assert scanned[0].num_ignored == {".cls": 1, ".json": 1, ".txt": 1}


def test_side_files_without_classes_leave_them_to_folders(tmp_path):
    scanned = scan_tar(tmp_path, [("3/a.png", b"x"), ("3/a.json", b'{"width": 4}')])
    assert rows_of(scanned) == [("3/a.png", "3", b"x")]


@pytest.mark.parametrize(
    "bad",
    [[], [("b.cls", b"")], [("b.cls", b"3\n4")], [("b.json", b"{")], [("b.json", b"[" * 100_000)],
     [("b.json", b'{"label": null}')], [("b.json", b'{"label": true}')], [("b.json", b'{"label": 0.5}')],
     [("b.json", b"[3]")], [("b.txt", b"3")]],
)  # fmt: skip
def test_an_image_without_a_class_is_an_error(tmp_path, bad):
    members = [("a.png", b""), ("a.cls", b"3"), *bad, ("b.png", b"")]
    with pytest.raises(DataError, match=r"a\.tar: expected the class of a\.tar/b\.png"):
        scan_tar(tmp_path, members)


def test_an_image_that_is_to_move_changes_sides(tmp_path):
    scanned = scan_tar(tmp_path, [(f"{name}/{number}.png", b"x") for name in ("cat", "dog") for number in range(9)])
    lowest, highest = scanned.scan.extremes["cat"]
    assert 0 < lowest < highest < 2**64
    archive = replace(scanned.archive, moved=(("cat", lowest), ("dog", lowest)))
    scan, index = tar.scan(LOCAL, archive, ALL_TRAIN)
    assert scan.num_images == {"train": {"cat": 8, "dog": 9}, "valid": {"cat": 1}}
    (moved,) = index["valid"]["key"].to_pylist()
    assert hashes_of([moved], 1).tolist() == [lowest]


def test_an_image_that_is_a_part_of_a_sample_has_no_class_of_its_own(tmp_path):
    members = [
        ("a/1.jpg", b"photo"),
        ("a/1.seg.png", b"mask"),
        ("a/1.cls", b"cat"),
        ("a/2.jpg", b"2"),
        ("a/2.cls", b"dog"),
    ]
    scanned = scan_tar(tmp_path, members)
    assert rows_of(scanned) == [("a/1.jpg", "cat", b"photo"), ("a/2.jpg", "dog", b"2")]
    assert scanned.scan.num_ignored == {".png": 1}


def test_two_images_of_one_name_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: expected the class of a\.tar/a\.jpg"):
        scan_tar(tmp_path, [("a.jpg", b""), ("a.png", b""), ("a.cls", b"3")])


def test_a_tar_without_classes_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: expected the class of a\.tar/1\.png"):
        scan_tar(tmp_path, [("1.png", b""), ("2.png", b"")])


def test_a_member_twice_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: expected .* a\.tar/3/1\.png again"):
        scan_tar(tmp_path, [("3/1.png", b""), ("3/2.png", b""), ("./3/1.png", b"")])


def test_an_empty_tar_has_no_images(tmp_path):
    result, index, _ = scan_tar(tmp_path, [])
    assert (len(index["train"]), result.class_names, result.row_groups["train"]) == (0, (), (0,))


def test_a_side_file_that_is_no_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.tar: expected a header"):
        scan_tar(tmp_path, [("a.cls", bytes(2**20 + 1)), ("a.png", b"")])


def test_many_images_pass_through_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_CHUNK_ROWS", 7)
    members = [(f"{number % 3}/{number}.png", b"%d" % number) for number in range(50)]
    assert rows_of(scan_tar(tmp_path, members)) == [(name, name[0], data) for name, data in members]


# Reading


def test_a_far_tar_is_scanned_and_read_in_one_request_each():
    members = [(f"{number % 3}/{number}.png", b"%d" % number) for number in range(1000)]
    store = CountingStore("a.tar", pack_tar(members))
    scanned = scan_archive("bucket/a.tar", ALL_TRAIN, store)
    assert len(store.sizes) == 1
    images = read_archive(scanned, rows=scanned.index["train"].slice(100, 500), store=store)
    assert images == [data for _, data in members[100:600]]
    assert len(store.sizes) == 2


def test_rows_may_leave_others_out(tmp_path):
    members = [(f"{number % 3}/{number}.png", b"%d" % number * 5000) for number in range(60)]
    config = Config(valid_fraction=1e-9, classes=("0", "2"))
    assert read_archive(scan_tar(tmp_path, members, config)) == [data for name, data in members if name[0] != "1"]


@pytest.mark.parametrize("run_bytes", [1, 10_000, 2**25])
def test_long_runs_are_read_in_parts(tmp_path, monkeypatch, run_bytes):
    monkeypatch.setattr(tar, "_LOCAL_RUN_BYTES", run_bytes)
    members = [(f"3/{number}.png", bytes([number]) * 100 * number) for number in range(60)]
    assert read_archive(scan_tar(tmp_path, members)) == [data for _, data in members]


def test_an_image_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_FILE_BYTES", 3)
    monkeypatch.setattr(tar, "_LOCAL_RUN_BYTES", 3)  # as ever, no more than an image may have
    found = read_archive(scan_tar(tmp_path, [("3/a.png", b"1"), ("3/b.png", b"1234"), ("3/c.png", b"3")]))
    assert found == [b"1", ReadFault("too_large", "4 bytes, more than 3"), b"3"]


def test_a_tar_that_has_changed_is_an_error(tmp_path):
    scanned = scan_tar(tmp_path, [("3/a.png", b"1" * 5000)])
    (tmp_path / "a.tar").write_bytes(b"short" * 200)
    with pytest.raises(DataError, match=r"a\.tar: expected the 10240 bytes"):
        read_archive(scanned)


def test_a_tar_that_is_gone_is_an_error(tmp_path):
    scanned = scan_tar(tmp_path, [("3/a.png", b"1")])
    (tmp_path / "a.tar").unlink()
    for again in (read_archive, lambda scanned: tar.scan(LOCAL, scanned.archive, ALL_TRAIN)):
        with pytest.raises(DataError, match=r"a\.tar: expected .* no such file"):
            again(scanned)


def test_an_index_costs_no_objects(tmp_path):
    _, index, _ = scan_tar(tmp_path, [(f"3/{number:04d}.png", b"1") for number in range(1000)])
    assert index["train"].schema == pa.schema(
        [("key", pa.binary()), ("label", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())]
    )
    assert index["train"].nbytes / 1000 == pytest.approx(4 + len("a.tar/3/0000.png") + 4 + 8 + 8, abs=1)
