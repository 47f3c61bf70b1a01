"""Images with the same pixels: planted groups, whatever the files, the archive, the actors and the buckets are."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from builders import encode, pack_tar
from PIL import Image

from pipeline.config import Config
from pipeline.cuts import Shard
from pipeline.driver import duplicates, job, waiting
from pipeline.errors import ActorLostError
from pipeline.results.duplicates import exact_tables, merge_duplicates
from pipeline.results.tables import DUPLICATES_SCHEMA

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

NUM_GROUPS = 50
# By turns: the splits and the classes of a group's images, each in a file of another format.
PLACES = (
    ("train/2", "train/2"),
    ("train/2", "valid/2"),
    ("valid/10", "valid/10", "train/10"),
    ("train/10", "train/10", "train/10", "valid/10"),
    ("valid/2", "valid/2"),
)
CONFLICTS = (("train/2", "train/10"), ("valid/10", "train/2", "valid/10"))
SUGGESTED = {"2": "10", "10": "2"}


def evaluate(data, out, **options):
    return job.evaluate(Config(data=str(data), out=str(out), epochs=0, report=False, device="cpu", **options))


def encode_as(pixels, number):
    """Encode the same pixels as one of five kinds of file."""
    grey = Image.fromarray(pixels)
    kinds = [("png", grey), ("bmp", grey), ("png", grey.convert("P")), ("pgm", grey), ("png", grey.convert("RGB"))]
    name, image = kinds[number % len(kinds)]
    return name, encode(image, "PPM" if name == "pgm" else name.upper())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """300 images that are there once, files that are none, and 50 groups; returns the folder and the groups' keys."""
    root, random = tmp_path_factory.mktemp("planted"), np.random.default_rng(11)
    numbers = iter(random.permutation(1000).tolist())
    for place in ("train/2", "train/10", "valid/2", "valid/10"):
        (root / place).mkdir(parents=True)
        for number in range(75):
            content = b"" if number % 25 == 0 else encode(random.integers(0, 256, (6, 6), np.uint8))
            (root / place / f"{next(numbers):04d}.png").write_bytes(content)
    groups = []
    for group in range(NUM_GROUPS):
        places = CONFLICTS[group] if group < len(CONFLICTS) else PLACES[group % len(PLACES)]
        pixels = random.integers(0, 256, (6, 6), np.uint8)
        keys = []
        for number, place in enumerate(places):
            # Every third group is copies of one file.
            ending, content = encode_as(pixels, 0 if group % 3 == 0 else group + number)
            keys.append(f"{place}/{next(numbers):04d}.{ending}")
            (root / keys[-1]).write_bytes(content)
        groups.append(keys)
    return root, groups


@pytest.fixture(scope="module")
def reference(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("planted out") / "out"
    return evaluate(planted[0], out), read(out, "duplicates"), read(out, "suspects")


def read(out, table):
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def listed(key):
    """Order keys as the listing does: training first, then by class, then by key."""
    split, name, _ = key.split("/")
    return split == "valid", int(name), key


def test_all_planted_groups_are_found_and_no_other(planted, reference):
    run, rows, _ = reference
    expected = sorted((sorted(keys, key=listed) for keys in planted[1]), key=lambda keys: listed(keys[0]))
    assert [(row["group"], row["key"]) for row in rows] == [
        (number, key) for number, keys in enumerate(expected) for key in keys
    ]
    assert all(row["key"].startswith(f"{row['split']}/{row['class']}/") for row in rows)
    assert {(row["kind"], row["distance"], row["ratio"]) for row in rows} == {("exact", 0.0, None)}
    assert run["num_skipped"] == 12


def test_counts_and_conflicts_follow_from_the_groups(planted, reference):
    run, _, suspects = reference
    own_splits = [[key.split("/")[0] for key in keys] for keys in planted[1]]
    assert run["duplicates"] == {
        "num_exact_groups": NUM_GROUPS,
        "num_exact_images": sum(map(len, planted[1])),
        "num_exact_twins": sum(splits.count("valid") for splits in own_splits if "train" in splits),
        "num_conflicts": 5,
    }
    assert run["neighbors"]["num_suspects"] == len(suspects) > 5
    conflicts = sorted([*planted[1][0], *planted[1][1]], key=listed)
    assert [row["key"] for row in suspects[: len(conflicts)]] == conflicts
    scored = [(row["suggested_class"], row["score"]) for row in suspects[: len(conflicts)]]
    assert scored == [(SUGGESTED[row["class"]], 1) for row in suspects[: len(conflicts)]]


@pytest.mark.parametrize("num_actors", [2, 4])
def test_the_number_of_actors_and_of_shards_to_a_task_does_not_change_a_bit(
    planted, reference, tmp_path, num_actors, monkeypatch
):
    monkeypatch.setattr(duplicates, "_BLOCK_SHARDS", 3)
    run = evaluate(planted[0], tmp_path / "out", actors=num_actors, shard_images=17)
    assert run["results_sha256"] == reference[0]["results_sha256"]


@pytest.mark.parametrize("bucket_images", [200, 7])
def test_several_buckets_give_the_rows_of_one(planted, reference, tmp_path, monkeypatch, bucket_images):
    monkeypatch.setattr(duplicates, "_BUCKET_IMAGES", bucket_images)
    run = evaluate(planted[0], tmp_path / "out", shard_images=60)
    assert run["results_sha256"] == reference[0]["results_sha256"]
    assert run["duplicates"] == reference[0]["duplicates"]


def test_shards_from_the_cache_give_the_same_groups(planted, reference, tmp_path):
    for name in ("first", "second"):
        run = evaluate(planted[0], tmp_path / name, cache=str(tmp_path / "cache"))
        assert run["results_sha256"] == reference[0]["results_sha256"]
    assert run["num_shards_from_cache"] == run["num_shards"]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_archives_give_the_rows_of_the_folder(planted, reference, tmp_path, kind):
    for split in ("train", "valid"):
        keys = sorted((p.relative_to(planted[0]).as_posix() for p in planted[0].glob(f"{split}/*/*")), key=listed)
        for part, some in enumerate((keys[:31], keys[31:])):
            path = tmp_path / f"{split}-{part}.{kind}"
            if kind == "tar":
                path.write_bytes(pack_tar((key.partition("/")[2], (planted[0] / key).read_bytes()) for key in some))
                continue
            images = [{"bytes": (planted[0] / key).read_bytes(), "path": key.partition("/")[2]} for key in some]
            pq.write_table(pa.table({"image": images, "label": [key.split("/")[1] for key in some]}), path)
    out = tmp_path.parent / f"{tmp_path.name} out"
    run = evaluate(tmp_path, out, shard_images=13)
    for table, expected in zip(("duplicates", "suspects"), reference[1:], strict=True):
        rows = read(out, table)
        for row in rows:
            archive, *_, name, file = row["key"].split("/")  # in Parquet with the row between
            row["key"] = f"{archive.partition('-')[0]}/{name}/{file}"
        assert rows == expected
    assert run["duplicates"] == reference[0]["duplicates"]


def test_a_copy_of_a_split_is_a_twin_of_every_image(small_dataset, tmp_path):
    shutil.copytree(small_dataset / "valid", tmp_path / "in" / "train")
    shutil.copytree(small_dataset / "valid", tmp_path / "in" / "valid")
    run = evaluate(tmp_path / "in", tmp_path / "out")
    assert run["duplicates"]["num_exact_twins"] == 36
    assert read(tmp_path / "out", "suspects") == []


@pytest.mark.parametrize(
    ("labels", "suggested"),
    [
        ([0, 0, 0], {}),
        ([1, 0], {0: 0, 1: 1}),
        ([0, 1, 2], {0: 1, 1: 0, 2: 0}),
        ([2, 2, 1, 1, 0], {0: 1, 1: 1, 2: 2, 3: 2, 4: 1}),
        ([0, 0, 0, 2, 1, 2], {0: 2, 1: 2, 2: 2, 3: 0, 4: 0, 5: 0}),
    ],
)
def test_the_most_frequent_of_the_other_classes_is_suggested(labels, suggested):
    rows = np.arange(100, 100 + len(labels))
    images = pa.table({"key": [b"\xff"] * len(labels), "label": pa.array(labels, pa.int32())})
    _, suspects, counts = exact_tables(
        np.stack([np.full(len(rows), 100), rows]), images, 102, ("a", "b", "c"), ("train", "valid")
    )
    assert {row["row"] - 100: "abc".index(row["suggested_class"]) for row in suspects.to_pylist()} == suggested
    assert {row["key"] for row in suspects.to_pylist()} <= {"\\xff"}
    assert counts["num_conflicts"] == len(suggested)
    assert counts["num_exact_twins"] == len(labels) - 2


def test_groups_of_all_tables_are_numbered_in_their_order():
    def table(kind, groups, ratio=None):
        rows = [{"kind": kind, "group": group, "key": str(group), "distance": 0.0, "ratio": ratio} for group in groups]
        return pa.Table.from_pylist(rows, schema=DUPLICATES_SCHEMA)

    exact = [table("exact", [2, 2, 9, 9]), table("exact", [0, 0, 5, 5, 5])]
    near = [table("near", [9, 9], 0.2), pa.concat_tables([table("near", [3, 3], 0.1), table("near", [4, 4], 0.2)])]
    numbered = pa.concat_tables(merge_duplicates(exact, near)).to_pylist()
    assert [row["group"] for row in numbered] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert [row["key"] for row in numbered] == list("002255599334499")


def test_digests_that_are_lost_have_all_shards_fed_again():
    lost = ray.remote(max_retries=0)(lambda: os._exit(1)).remote()
    grouping = duplicates.Grouping(num_shards=1, num_images=2)
    grouping.add(Shard(0, "train", 0, 2, 0, 0), lost)
    [(_, size)] = grouping.groups
    with pytest.raises(ActorLostError, match="expected its input"):
        waiting.get_result(size, "groups")


def test_digits_have_no_image_twice_as_numpy_finds(tmp_path):
    from sklearn.datasets import load_digits

    num_unique = len(np.unique(load_digits().data, axis=0))
    run = evaluate("digits", tmp_path / "out")
    assert run["duplicates"]["num_exact_images"] == 1797 - num_unique == 0
