"""The same images laid out in every way that a dataset may come: the same tables, the same skipped images."""

import io
import itertools
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import encode, pack_tar, put_in_bucket
from PIL import Image

from pipeline.config import Config
from pipeline.data import files
from pipeline.data.archives import find_archives
from pipeline.data.files import Location
from pipeline.data.formats import reader_of
from pipeline.data.listing import ArchiveListing, list_archives, list_dataset
from pipeline.decoding import cache, cache_key
from pipeline.decoding.cache import Cache
from pipeline.decoding.images import decode_images, sample_rows
from pipeline.decoding.shards import Loader, ShardFile, load_shard, load_shards, sample_headers, shard_owners
from pipeline.errors import DataError
from pipeline.plan import LaneAssignment, Shard, Target, make_plan
from pipeline.tree import lane_ranges

TARGET = Target(4, 5, "L")
PLAIN = Config()
CLASSES = ("3", "7")
SIZES = {"train": 50, "valid": 13}  # of each class
BROKEN = {0: b"", 7: b"no image", 8: b"", 49: b"\x89PNG\r\n\x1a\n", 60: b"no image"}
REASONS = {0: "empty", 7: "unidentified", 8: "empty", 49: "unidentified", 60: "unidentified"}
KINDS = ("folder", "uri", "tar of folders", "tars with splits in their names", "webdataset", "parquet")


def make_rows(split):
    """Class, name and bytes of every image of a split, in the listing's order."""
    number = itertools.count()
    for name in CLASSES:
        for index in range(SIZES[split]):
            row = next(number)
            pixels = np.random.default_rng([len(split), row]).integers(0, 256, (4, 5), np.uint8)
            yield name, f"{index:03d}", BROKEN.get(row, encode(pixels))


def write_as(folder, kind):
    """Write the dataset, in archives two for a split, cut within a class."""
    rows = {split: list(make_rows(split)) for split in SIZES}
    folder.mkdir(exist_ok=True)
    members = [(f"{split}/{name}/{number}.png", data) for split in SIZES for name, number, data in rows[split]]
    if kind in ("folder", "uri"):
        with tarfile.open(fileobj=io.BytesIO(pack_tar(members))) as tar:
            tar.extractall(folder, filter="data")
    elif kind == "tar of folders":
        (folder / "all.tar").write_bytes(pack_tar(members))
    for split, part in itertools.product(SIZES, range(2)):
        cut = 4 * SIZES[split] // 3
        some = rows[split][cut:] if part else rows[split][:cut]
        path = folder / f"{split}-{part}"
        if kind == "tars with splits in their names":
            path.with_suffix(".tar").write_bytes(pack_tar((f"{n}/{i}.png", data) for n, i, data in some))
        elif kind == "webdataset":
            pairs = [((f"{n}_{i}.png", data), (f"{n}_{i}.cls", n.encode())) for n, i, data in some]
            path.with_suffix(".tar").write_bytes(pack_tar(itertools.chain(*pairs)))
        elif kind == "parquet":
            columns = {"image": pa.array([data for *_, data in some], pa.binary()), "label": [n for n, *_ in some]}
            pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=9)
    return put_in_bucket(folder) if kind == "uri" else Location("folder", str(folder))


def list_all(location, config=PLAIN):
    found = find_archives(*location.store, "", config, Counter())
    if not found:
        return list_dataset(location, config)
    parts = [(archive, *reader_of(archive).scan(location.store[0], archive, config)) for archive in found]
    return list_archives(location, parts, Counter(), config)


def rows_and_file(listing, split, number=0):
    """What a task is given of a listing."""
    listed = listing.split(split)
    if not isinstance(listed, ArchiveListing):
        return listed, None
    return listed.files[number].index, ShardFile(listed.files[number].archive, listed.files[number].labels)


def load_all(location, num_actors=1, kept=None, shard_images=11):
    config = Config(cache=kept and kept.root)
    return load_listed(list_all(location, config), num_actors, kept, shard_images)


def load_listed(listing, num_actors=1, kept=None, shard_images=11):
    """Load every shard; by row of the listing, what each actor has, what was skipped, and the keys of validation."""
    plan, shards = make_plan(Config(shard_images=shard_images), listing, TARGET, 36)
    loader = Loader(listing.location, TARGET, listing.classes, plan.assignment, num_actors, kept)
    actors, skipped, keys = {}, {}, {}
    for shard in shards:
        rows, file = rows_and_file(listing, shard.split, shard.file)
        rows = rows if file else rows.slice(shard.start, shard.num_images)
        if kept and not file:
            shard = replace(shard, entry=cache_key.name_entry(listing.location, TARGET, rows))
        tables, faults, decoded = load_shard(loader, shard, rows, file)
        is_train = shard.split == "train"
        ranks = shard_owners(plan.assignment, num_actors, shard) if is_train else [shard.part % num_actors]
        for rank, given in zip(ranks, tables, strict=True):
            pixels = given["image"].combine_chunks().storage.flatten().to_numpy().reshape(len(given), 20)
            for row, label, image in zip(given["row"].to_pylist(), given["class"].to_pylist(), pixels, strict=True):
                actors.setdefault((shard.split, rank), {})[shard.start + row] = (label, image.tobytes())
            if not is_train:
                keys |= dict(zip(given["row"].to_numpy() + shard.start, given["key"].to_pylist(), strict=True))
        for (row, fault), (_, _, same_fault) in zip(decoded.faults, faults, strict=True):
            assert fault == same_fault
            skipped[shard.split, shard.start + row] = fault.reason
    return actors, skipped, keys


@pytest.fixture(scope="module")
def expected():
    """What Pillow and NumPy make of the images, as one actor is to have them."""
    actors = {("train", 0): {}, ("valid", 0): {}}
    for split in SIZES:
        for row, (name, _, data) in enumerate(make_rows(split)):
            if row not in BROKEN:
                pixels = np.asarray(Image.open(io.BytesIO(data)))
                actors[split, 0][row] = (CLASSES.index(name), pixels.tobytes())
    skipped = {(split, row): reason for split in SIZES for row, reason in REASONS.items() if row < 2 * SIZES[split]}
    return actors, skipped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_images", [1, 11, 2048])
def test_the_same_images_give_the_same_tables_however_they_come(tmp_path, expected, kind, shard_images):
    actors, skipped, keys = load_all(write_as(tmp_path / "data", kind), shard_images=shard_images)
    assert (actors, skipped) == expected
    assert sorted(keys) == sorted(expected[0]["valid", 0])
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
@pytest.mark.parametrize("num_actors", [2, 3, 8])
def test_the_split_by_owners_loses_and_doubles_nothing(tmp_path, expected, kind, num_actors):
    actors, skipped, _ = load_all(write_as(tmp_path / "data", kind), num_actors)
    assert skipped == expected[1]
    lanes = LaneAssignment(2 * SIZES["train"], 8)
    for rank, own_lanes in enumerate(lane_ranges(8, num_actors)):
        images = expected[0]["train", 0].items()
        own = {row: image for row, image in images if row // lanes.run_length % 8 in own_lanes}
        assert actors["train", rank] == own
    assert sum(len(actors["train", rank]) for rank in range(num_actors)) == len(expected[0]["train", 0])


@pytest.mark.parametrize("num_images", [1, 9, 1000, 12_396, 100_000])
@pytest.mark.parametrize(("num_lanes", "num_actors"), [(1, 1), (8, 1), (8, 3), (8, 8), (3, 2), (64, 5)])
def test_owners_are_those_of_a_loop(num_images, num_lanes, num_actors):
    assignment = LaneAssignment(num_images, num_lanes)
    for start, size in itertools.product((0, 1, 700, num_images - 1), (1, 2, 77, 2048)):
        stop = min(start + size, num_images)
        if start < stop:
            lanes = {row // assignment.run_length % num_lanes for row in range(start, stop)}
            shard = Shard(0, "train", start, stop, 0, start)
            ranges = lane_ranges(num_lanes, num_actors)
            expected = [rank for rank, own in enumerate(ranges) if lanes.intersection(own)]
            assert shard_owners(assignment, num_actors, shard) == expected


def test_images_on_their_way_to_training_have_no_keys(tmp_path):
    location = write_as(tmp_path / "data", "folder")
    listing = list_all(location)
    loader = Loader(location, TARGET, CLASSES, LaneAssignment(100, 8), 1, None)
    for split, columns in (("train", ["class", "image", "row"]), ("valid", ["key", "class", "image", "row"])):
        shard = Shard(0, split, 10, 20, 0, 10)
        [table], skipped, _ = load_shard(loader, shard, listing.split(split).slice(10, 10), None)
        assert (table.column_names, table["row"].type, skipped) == (columns, pa.int32(), [])
        assert table["row"].to_pylist() == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_headers_are_those_of_the_images_that_open(tmp_path, kind):
    location = write_as(tmp_path / "data", kind)
    listing = list_all(location)
    rows = sample_rows(20)
    headers = sample_headers(location, *rows_and_file(listing, "train"), rows)
    assert headers == [(4, 5, True)] * len([row for row in rows if row not in BROKEN])


# The cache


def blank_out(folder):
    """Give every file other bytes, of which its size and the time of its last change tell nothing."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["folder", "bucket", "tar"])
def test_a_header_is_found_where_it_is_not_in_the_first_bytes(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(files, "HEAD_BYTES", 300)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 34), np.uint8))
    contents = {
        "PNG": encode(image, "PNG"),
        "TIFF": encode(image, "TIFF"),
        "WEBP": encode(image, "WEBP", lossless=True),
    }
    members = [(f"train/{name}/1.{name.lower()}", data) for name, data in contents.items()]
    folder = tmp_path / "data"
    for name, data in members if kind != "tar" else [("train.tar", pack_tar(members))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    location = put_in_bucket(folder) if kind == "bucket" else Location("folder", str(folder))
    if kind == "tar":
        (archive,) = find_archives(*location.store, "", Config(valid_fraction=1e-9), Counter())
        _, index = reader_of(archive).scan(location.store[0], archive, Config(valid_fraction=1e-9))
        rows, file = index["train"], ShardFile(archive, (0, 1, 2))
    else:
        rows, file = pa.table({"key": [name.encode() for name, _ in members]}), None
    assert sample_headers(location, rows, file, range(3)) == [(21, 34, True), (21, 34, True), (21, 34, False)]


def test_headers_are_sampled_beside_what_is_no_file(tmp_path):
    location = write_as(tmp_path / "data", "folder")
    os.mkfifo(tmp_path / "data" / "train" / "3" / "0000.png")
    listing = list_all(location)
    assert sample_headers(location, listing.train, None, range(len(listing.train)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_gives_the_same_tables_to_any_number_of_actors(tmp_path, kind):
    kept = Cache(str(tmp_path / "cache"))
    location = write_as(tmp_path / "data", kind)
    for num_actors in (1, 1, 3):
        assert load_all(location, num_actors, kept) == load_all(location, num_actors)
    _, shards = make_plan(Config(shard_images=11), list_all(location), TARGET, 36)
    assert cache.usage(kept).num_entries == len(shards)


@pytest.mark.parametrize("kind", KINDS[1:])  # of class folders it would see the change
def test_what_is_in_the_cache_is_not_read_again(tmp_path, expected, kind):
    kept = Cache(str(tmp_path / "cache"))
    listing = list_all(write_as(tmp_path / "data", kind), Config(cache=kept.root))
    before = load_listed(listing, 1, kept)
    blank_out(tmp_path / "data")
    assert load_listed(listing, 1, kept) == before
    assert before[:2] == expected


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_damaged_entries_are_decoded_again_and_good_the_next_time(tmp_path, expected, kind, caplog):
    kept = Cache(str(tmp_path / "cache"))
    listing = list_all(write_as(tmp_path / "data", kind))
    load_listed(listing, 1, kept)
    for entry in (tmp_path / "cache").glob("*.arrow"):
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    for num_warnings in (cache.usage(kept).num_entries, 0):
        caplog.clear()
        assert load_listed(listing, 1, kept)[:2] == expected
        assert caplog.text.count("got another checksum; decoding again") == num_warnings


def test_files_that_changed_are_decoded_again(tmp_path, expected):
    kept = Cache(str(tmp_path / "cache"))
    location = write_as(tmp_path / "data", "folder")
    assert load_all(location, 1, kept)[:2] == expected
    blank_out(tmp_path / "data")
    actors, skipped, _ = load_all(location, 1, kept)
    assert (actors, len(skipped)) == ({}, 126)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shard_that_changes_while_it_is_decoded_is_not_kept(tmp_path, monkeypatch, when):
    kept = Cache(str(tmp_path / "cache"))
    location = write_as(tmp_path / "data", "folder")
    whole = decode_images

    def decode_slowly(*args):
        if when == "before":
            blank_out(tmp_path / "data" / "valid")
        decoded = whole(*args)
        if when == "after":
            blank_out(tmp_path / "data" / "valid")
        return decoded

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.decoding.shards.decode_images", decode_slowly)
        load_all(location, 1, kept, shard_images=2048)
    assert cache.usage(kept).num_entries == 1  # the training shard


def test_a_file_that_could_not_be_looked_up_is_not_kept(tmp_path, monkeypatch):
    kept = Cache(str(tmp_path / "cache"))
    location = write_as(tmp_path / "data", "folder")
    rows = list_all(location).train
    with monkeypatch.context() as patch:
        patch.setattr(cache_key.os, "stat", lambda path: os.lstat(path + b" of another name"))
        entry = cache_key.name_entry(location, TARGET, rows)
    loader = Loader(location, TARGET, CLASSES, LaneAssignment(100, 8), 1, kept)
    load_shard(loader, Shard(0, "train", 0, 100, 0, 0, entry=entry), rows, None)
    assert not list((tmp_path / "cache").glob("*.arrow"))


@pytest.mark.parametrize("kind", ["folder", "uri"])
def test_shards_that_are_read_together_are_what_each_is_by_itself(tmp_path, kind):
    listing = list_all(write_as(tmp_path / "data", kind))
    plan, shards = make_plan(Config(shard_images=11), listing, TARGET, 36)
    loader = Loader(listing.location, TARGET, listing.classes, plan.assignment, 2, None)
    together = [shard for shard in shards if shard.split == "train"][1:5]
    rows = listing.train.slice(together[0].start, together[-1].stop - together[0].start)
    for shard, outcome in load_shards(loader, together, rows, None):
        own = listing.train.slice(shard.start, shard.num_images)
        assert outcome == load_shard(loader, shard, own, None)
    assert shard == together[-1]
    assert any(outcome[1] for _, outcome in load_shards(loader, together, rows, None))


def test_an_archive_that_is_gone_is_one_line(tmp_path):
    location = write_as(tmp_path / "data", "webdataset")
    listing = list_all(location)
    rows, file = rows_and_file(listing, "train")
    Path(file.archive.path).unlink()
    loader = Loader(location, TARGET, CLASSES, LaneAssignment(100, 8), 1, None)
    with pytest.raises(DataError, match=r"train-0\.tar: expected .*, got no such file"):
        load_shard(loader, Shard(0, "train", 0, 5, 0, 0), rows, file)
