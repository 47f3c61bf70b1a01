import binascii
import logging
import os
import pickle
import random
import shutil
import struct
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click.testing
import numpy as np
import pyarrow as pa
import pytest

from jobs.cache import main
from pipeline.data.storage import temporary_beside
from pipeline.decoding.cache import MARKER_FILE, Cache, Usage, clear, load, prepare, store, usage
from pipeline.decoding.images import Decoded, Fault, decode_images
from pipeline.errors import CacheError
from pipeline.target import Target

KEYS = [f"{number:064x}" for number in range(32)]
IMAGE = pa.fixed_shape_tensor(pa.uint8(), [4, 5])
FAULTS = ((2, Fault("damaged", "OSError: ä \udcff")), (6, Fault("empty", "the file has no bytes")))


def make_decoded(num_images=6, seed=0, faults=FAULTS):
    pixels = pa.array(np.random.default_rng(seed).integers(0, 256, 20 * num_images, np.uint8))
    images = pa.ExtensionArray.from_storage(IMAGE, pa.FixedSizeListArray.from_arrays(pixels, 20))
    keys = pa.array([f"train/ä/{row}.png" for row in range(num_images)], pa.string())
    table = pa.table({"key": keys, "class": pa.array(range(num_images), pa.int32()), "image": images})
    return Decoded(table, list(faults), seed)


@pytest.fixture
def cache(tmp_path):
    made = Cache(str(tmp_path / "cache"))
    prepare(made)
    return made


def entry_path(cache, key=KEYS[0]):
    return Path(cache.root) / f"{key}.arrow"


def names_in(cache):
    return sorted(path.name for path in Path(cache.root).iterdir())


def store_aged(cache, numbers, seconds_ago):
    for number in numbers:
        store(cache, KEYS[number], make_decoded(seed=number))
        if entry_path(cache, KEYS[number]).exists():
            os.utime(entry_path(cache, KEYS[number]), times=(0, 10**9 - seconds_ago + number))


# What is stored comes back


@pytest.mark.parametrize("kind", ["folder", "object store"])
@pytest.mark.parametrize("num_images", [0, 1, 6])
def test_what_was_stored_comes_back_unchanged(tmp_path, kind, num_images):
    cache = Cache.at(str(tmp_path / "new" / "cache") if kind == "folder" else f"memory://bucket{tmp_path}")
    decoded = make_decoded(num_images, seed=num_images)
    assert load(cache, KEYS[0]) is None
    store(cache, KEYS[0], decoded)
    loaded = load(cache, KEYS[0])
    assert loaded == decoded
    assert loaded.table.schema.equals(decoded.table.schema, check_metadata=True)
    assert [column.num_chunks for column in loaded.table.columns] == [1, 1, 1]
    loaded.table.validate(full=True)
    assert load(cache, KEYS[1]) is None
    assert usage(cache).num_entries == clear(cache).num_entries == 1
    assert (load(cache, KEYS[0]), usage(cache)) == (None, Usage(0, 0))


def test_what_decoding_makes_of_bad_images_comes_back(cache):
    keys, labels = pa.array([b"\xff.png", b"b.png"], pa.binary()), pa.array([0, 1], pa.int32())
    decoded = decode_images(keys, labels, [b"no image", b""], Target(4, 5, "RGB"))
    store(cache, KEYS[0], decoded)
    assert load(cache, KEYS[0]) == decoded


def test_an_entry_is_a_stream_that_any_reader_of_arrow_opens(cache):
    store(cache, KEYS[0], make_decoded())
    with pa.ipc.open_stream(entry_path(cache)) as reader:
        assert reader.read_all().equals(make_decoded().table)


def test_a_local_entry_is_mapped_and_outlives_its_file(cache):
    decoded = make_decoded(100_000)
    store(cache, KEYS[0], decoded)
    before = pa.total_allocated_bytes()
    loaded = load(cache, KEYS[0])
    assert pa.total_allocated_bytes() - before < 10_000
    clear(cache)
    assert loaded == decoded


def test_a_cache_crosses_a_pickle_and_works_in_processes_side_by_side(cache):
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        list(pool.map(store, [cache] * 64, KEYS[:4] * 16, [make_decoded(2000, seed) for seed in range(4)] * 16))
    assert pickle.loads(pickle.dumps(cache)) == cache
    assert [load(cache, KEYS[seed]) for seed in range(4)] == [make_decoded(2000, seed) for seed in range(4)]
    assert len(names_in(cache)) == 5


# What may not be kept


@pytest.mark.parametrize(
    ("fault", "is_kept"),
    [(Fault("unreadable", "Permission denied"), False), (Fault("not_a_file", "not a regular file"), False),
     (Fault("damaged", "MemoryError"), False), (Fault("damaged", "OSError: decoder error: out of memory error"), False),
     (Fault("damaged", "OSError: image file is truncated"), True), (Fault("empty", "the file has no bytes"), True),
     (Fault("unidentified", "cannot identify image file"), True), (Fault("too_large", "2 bytes, more than 1"), True)],
)  # fmt: skip
def test_a_shard_is_kept_unless_a_fault_may_pass(cache, fault, is_kept):
    store(cache, KEYS[0], make_decoded(faults=[(1, Fault("empty", "no bytes")), (7, fault)]))
    assert (load(cache, KEYS[0]) is not None) == is_kept


# Damage


def damaged_copies(content):
    chance = random.Random(0)
    for at in [*range(64), *chance.sample(range(len(content)), 200), *range(len(content) - 40, len(content))]:
        yield content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    for length in (0, 1, 11, 12, 13, len(content) // 2, len(content) - 12, len(content) - 1):
        yield content[:length]
    yield from (content + b"\0", content * 2, content[8:], bytes(len(content)), b"ARROW1\0\0" + content)


def test_no_damage_is_trusted(cache, caplog):
    store(cache, KEYS[0], make_decoded())
    content = entry_path(cache).read_bytes()
    for damaged in damaged_copies(content):
        entry_path(cache).write_bytes(damaged)
        caplog.clear()
        assert load(cache, KEYS[0]) is None
        assert not entry_path(cache).exists()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "expected an entry of the cache as it was written, got " in caplog.text
        assert caplog.messages[0].count("\n") == 0
    store(cache, KEYS[0], make_decoded())
    assert load(cache, KEYS[0]) == make_decoded()


def as_stream(metadata, batches):
    sink = pa.BufferOutputStream()
    schema = pa.schema([("key", pa.string())], metadata=metadata)
    with pa.ipc.new_stream(sink, schema) as writer:
        for keys in batches:
            writer.write_batch(pa.record_batch([pa.array(keys)], schema=schema))
    return sink.getvalue().to_pybytes()


METADATA = {"key": KEYS[0], "faults": "[]", "num_resized": "0"}
OTHER_CONTENTS = {
    "nothing": b"", "no stream": b"garbage" * 100, "no batch": as_stream(METADATA, []),
    "no metadata": as_stream(None, [["a"]]), "no faults": as_stream({"key": KEYS[0]}, [["a"]]),
    "odd faults": as_stream({**METADATA, "faults": "[1]"}, [["a"]]),
    "odd count": as_stream({**METADATA, "num_resized": "x"}, [["a"]]),
    "another key": as_stream({**METADATA, "key": KEYS[1]}, [["a"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CONTENTS)
def test_what_has_a_checksum_and_is_no_entry_is_not_trusted(cache, caplog, name):
    content = OTHER_CONTENTS[name]
    entry_path(cache).write_bytes(content + struct.pack("<8sI", b"ibcache1", binascii.crc32(content)))
    assert load(cache, KEYS[0]) is None
    assert not entry_path(cache).exists()
    assert len(caplog.messages) == 1


def test_nothing_is_removed_from_a_folder_that_is_no_cache(tmp_path):
    cache = Cache(str(tmp_path))
    entry_path(cache).write_text("mine")
    assert load(cache, KEYS[0]) is None
    assert entry_path(cache).read_text() == "mine"


def test_an_entry_under_another_key_is_not_trusted(cache, caplog):
    store(cache, KEYS[0], make_decoded())
    entry_path(cache).rename(entry_path(cache, KEYS[1]))
    assert load(cache, KEYS[1]) is None
    assert "got the entry of another key; decoding again" in caplog.text


def test_damage_that_cannot_be_removed_is_written_over(cache, caplog):
    entry_path(cache).mkdir()
    assert load(cache, KEYS[0]) is None
    store(cache, KEYS[0], make_decoded())
    assert len(caplog.messages) == 1
    entry_path(cache).rmdir()
    store(cache, KEYS[0], make_decoded())
    assert load(cache, KEYS[0]) == make_decoded()


# What goes wrong


def test_a_full_disk_is_one_warning_and_leaves_nothing(cache, caplog):
    for key in KEYS[:3]:
        temporary_beside(f"{cache.root}/{key}.arrow").symlink_to("/dev/full")
        store(cache, key, make_decoded(10_000))
    assert len(caplog.messages) == 1
    assert "expected to use it, got " in caplog.text
    assert "No space left on device" in caplog.text
    assert names_in(cache) == [MARKER_FILE]


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_that_is_gone_is_one_warning(cache, caplog, is_file):
    shutil.rmtree(cache.root)
    if is_file:
        Path(cache.root).write_text("a file")
    for key in KEYS[:3]:
        assert load(cache, key) is None
        store(cache, key, make_decoded())
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("root", ["nosuch://bucket/cache", "s3://"])
def test_a_uri_that_cannot_be_opened_is_an_error_before_work_and_a_warning_later(caplog, root):
    with pytest.raises(CacheError, match=r"^--cache: expected a URI .*, got "):
        prepare(Cache.at(root))
    assert load(Cache(root), KEYS[0]) is None
    store(Cache(root), KEYS[0], make_decoded())
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "folder/file", f"{KEYS[0]}.arrow", f"{MARKER_FILE}/file"])
def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path, caplog, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    cache = Cache(str(tmp_path))
    with pytest.raises(CacheError, match=r"^--cache /.*: expected .*(empty folder|folder to write to), got "):
        prepare(cache)
    store(cache, KEYS[1], make_decoded())
    assert len(caplog.messages) == 1
    for command in (usage, clear):
        with pytest.raises(CacheError, match=r"^(--cache )?/.*: expected "):
            command(cache)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_another_program_s_cache_is_refused(tmp_path):
    (tmp_path / MARKER_FILE).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# This file is by pytest.\n")
    with pytest.raises(CacheError, match=r"^--cache .*: expected .* CACHEDIR\.TAG"):
        prepare(Cache(str(tmp_path)))


@pytest.mark.parametrize(
    ("root", "other"),
    [("{tmp}/data", "{tmp}/data"), ("{tmp}/data/cache", "{tmp}/data"), ("{tmp}/link/new/cache", "{tmp}/data"),
     ("{tmp}", "{tmp}/data"), ("s3://bucket/data/cache", "s3://bucket/data?region=eu-west-1"),
     ("s3://bucket", "s3://bucket/data")],
)  # fmt: skip
def test_a_cache_in_or_around_the_dataset_or_the_results_is_refused(tmp_path, root, other):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    cache = Cache.at(root.format(tmp=tmp_path))
    with pytest.raises(CacheError, match=r"^--cache .*: expected a folder apart from "):
        prepare(cache, ["/elsewhere", other.format(tmp=tmp_path)])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "link"]


@pytest.mark.parametrize("leave", ["nothing", "empty folder", "half a marker", "cache"])
def test_a_new_folder_an_empty_one_and_a_cache_are_prepared(tmp_path, leave):
    root = tmp_path / "a" / "b"
    if leave != "nothing":
        root.mkdir(parents=True)
    if leave == "half a marker":
        (root / f".{MARKER_FILE}.17.tmp").write_text("Sig")
    cache = Cache(str(root))
    prepare(cache)
    if leave == "cache":
        prepare(cache)
    assert (root / MARKER_FILE).read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")


# The limit


def test_the_least_recently_used_go_first_and_the_limit_holds(cache):
    store(cache, KEYS[0], make_decoded())
    one_bytes = usage(cache).num_bytes
    limited = Cache(cache.root, 10 * one_bytes + 100)
    store_aged(limited, range(10), 1000)
    assert usage(cache).num_entries == 10
    assert load(limited, KEYS[0]) is not None  # now used last
    store_aged(limited, range(10, 12), 0)
    assert usage(cache).num_bytes <= limited.limit_bytes
    kept = {number for number in range(12) if entry_path(cache, KEYS[number]).exists()}
    assert {0, 10, 11} < kept
    assert kept == {0, *range(min(kept - {0}), 12)}
    assert len(kept) >= 9


@pytest.mark.parametrize("num_kept", [1, 3])
def test_the_limit_holds_after_every_store(cache, num_kept):
    store_aged(cache, [0], 0)
    limited = Cache(cache.root, num_kept * usage(cache).num_bytes + 50)
    for number in range(1, 12):
        store_aged(limited, [number], 0)
        assert usage(cache).num_bytes <= limited.limit_bytes
        assert entry_path(cache, KEYS[number]).exists()
    assert not entry_path(cache).exists()


def test_what_is_larger_than_the_limit_is_not_kept_and_removes_nothing(cache):
    store(cache, KEYS[0], make_decoded())
    limited = Cache(cache.root, usage(cache).num_bytes)
    store(limited, KEYS[1], make_decoded(1000))
    assert names_in(cache) == [f"{KEYS[0]}.arrow", MARKER_FILE]


def test_only_entries_are_removed_for_others(cache):
    folder = Path(cache.root)
    foreign = ["notes.txt", f"{KEYS[0]}.txt", f"x{KEYS[1]}.arrow", f".{KEYS[2]}.arrow.tmp", "a.arrow"]
    for name in foreign:
        (folder / name).write_text("mine" * 1000)
    (folder / f".{KEYS[3]}.arrow.12.tmp").write_bytes(bytes(5000))  # what a killed process left
    os.utime(folder / f".{KEYS[3]}.arrow.12.tmp", (0, 0))
    limited = Cache(cache.root, 6000)
    store_aged(limited, range(20), 0)
    assert usage(cache).num_bytes <= 6000
    clear(cache)
    assert names_in(cache) == sorted([*foreign, MARKER_FILE])


# The command


def test_the_command_shows_and_clears(cache):
    for key in KEYS[:3]:
        store(cache, key, make_decoded(100_000))
    num_mib = sum(entry_path(cache, key).stat().st_size for key in KEYS[:3]) / 2**20
    results = [click.testing.CliRunner().invoke(main, [name, cache.root]) for name in ("show", "clear", "show")]
    assert [result.stdout for result in results] == [
        f"{cache.root}: 3 shards, {num_mib:.1f} MiB\n", f"{cache.root}: removed 3 shards, {num_mib:.1f} MiB\n",
        f"{cache.root}: 0 shards, 0.0 MiB\n"]  # fmt: skip


@pytest.mark.parametrize("command", ["show", "clear"])
def test_the_command_wants_a_cache(tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    result = click.testing.CliRunner().invoke(main, [command, str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path}: expected a cache of this program, got none; check the name\n"
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "Missing argument 'FOLDER'"),
        (["clear", "a", "b"], "Got unexpected extra argument (b)"),
        (["drop", "a"], "No such command 'drop'"),
        (["--all"], "No such option '--all'"),
    ],
)
def test_bad_usage_of_the_command_is_one_line(words, message):
    result = click.testing.CliRunner().invoke(main, words)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}; try --help\n")
