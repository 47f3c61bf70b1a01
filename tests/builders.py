"""What several test files build: folders, tars and stores of named files, images, scans, and the command itself."""

import io
import itertools
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.store import MemoryStore
from PIL import Image

from pipeline.config import Config
from pipeline.data.archives import find_archives
from pipeline.data.files import Location, display, read_images
from pipeline.data.formats import reader_of
from pipeline.data.listing import Listing, list_dataset
from pipeline.data.storage import BucketStore, LocalStore
from pipeline.plan import make_plan
from pipeline.results.figures import EpochMetric, accuracies
from pipeline.results.tables import (
    DUPLICATES_SCHEMA,
    SKIPPED_SCHEMA,
    SUSPECTS_SCHEMA,
    choose_top,
    confusion_table,
    history_table,
    means_table,
    metrics_table,
    predictions_table,
    weights_table,
)
from pipeline.results.writing import write_run, write_table
from pipeline.target import Target

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
LOCAL = LocalStore()
# The keys of a dataset of two classes, sorted by class and key.
KEYS = [f"{split}/{name}/{number}.png" for split in ("train", "valid") for name in ("3", "7") for number in (1, 10, 2)]
ALL_TRAIN = Config(valid_fraction=1e-9)  # of a dataset without splits, all images are of train, in fact


# Files


def write_files(folder, names, content=None):
    """Write a file for each name, which holds its own name unless `content` is given; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) if content is None else content)
    return folder


def write_folder(folder, keys):
    """Write a file for each key, which holds its own key; return the folder's location."""
    return Location("folder", str(write_files(folder, keys)))


def write_dataset(kind, folder, keys):
    """Lay files out as a folder, or in a bucket; return the location."""
    return write_bucket(keys) if kind == "bucket" else write_folder(folder, keys)


def write_bucket(names, content=None):
    """Put files into a bucket in memory, which every test has for itself; return its location."""
    return fill_bucket({name: name.encode() if content is None else content for name in names})


def put_in_bucket(folder):
    """Put the files of a folder into it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return fill_bucket({str(path.relative_to(folder)): path.read_bytes() for path in paths})


def fill_bucket(contents):
    """Put contents by name into it."""
    location = Location("uri", "memory://bucket/data")
    store, root = location.store
    for name, content in contents.items():
        store.write(f"{root}/{name}", lambda stream, content=content: stream.write(content))
    return location


def pack_tar(members, tar_format=tarfile.GNU_FORMAT, **fields):
    """Write a tar of names and contents, by tarfile; return its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def keys_of(table):
    """Return the keys of a listing's table as text."""
    return [os.fsdecode(key) for key in table["key"].to_pylist()]


def read_keys(location, *keys):
    """Read some files of a dataset: their bytes, or faults."""
    return list(read_images(location, pa.array([os.fsencode(key) for key in keys], pa.binary())))


# Images


def encode(image, image_format="PNG", **options):
    """Encode an image, or pixels [H, W] or [H, W, 3]; return the file's bytes."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, image_format, **options)
    return stream.getvalue()


def write_images(root, sizes, classes, make_pixels):
    """Write `sizes[split]` PNG files of every class below `root`, the pixels by `make_pixels(label)`; return `root`."""
    for split, num_images in sizes.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(num_images):
                Image.fromarray(make_pixels(label)).save(root / split / name / f"{number}.png")
    return root


def naive_pixels(root, split, name):
    """Decode a class of `noisy_dataset`, one image after another, to 0 to 1."""
    return [np.array(Image.open(path)) / 255 for path in sorted((root / split / name).iterdir())]


def naive_num_correct(root):
    """Count the images of `noisy_dataset` that are nearest to their own class's mean."""
    classes = ("2", "10", "b")
    means = [np.mean(naive_pixels(root, "train", name), axis=0) for name in classes]
    return sum(
        int(np.argmin([np.abs(image - mean).mean() for mean in means]) == label)
        for label, name in enumerate(classes)
        for image in naive_pixels(root, "valid", name)
    )


# Archives


class CountingStore(BucketStore):
    """A bucket in memory that holds one file, and notes the size of every read in `sizes`."""

    def __init__(self, name, data):
        super().__init__(MemoryStore(), "bucket")
        self.sizes = []
        self.write(f"bucket/{name}", lambda stream: stream.write(data))

    def read_range(self, path, start, stop):
        data = super().read_range(path, start, stop)
        self.sizes.append(len(data))
        return data


class Scanned(NamedTuple):
    """What a scan of one archive found."""

    scan: object
    index: dict
    archive: object


def scan_archive(path, config, store=LOCAL):
    """Find one archive by its full path and scan it."""
    (archive,) = find_archives(store, str(path), "", config, Counter())
    return Scanned(*reader_of(archive).scan(store, archive, config), archive)


def read_archive(scanned, split="train", rows=None, store=LOCAL):
    """Read the bytes of a split's images, or of some of its rows."""
    rows = scanned.index[split] if rows is None else rows
    return list(reader_of(scanned.archive).read_rows(store, scanned.archive, rows, 4))


def rows_of(scanned, split="train"):
    """Names below the archive, classes and bytes of a split's images."""
    index = scanned.index[split]
    keys = [display(key).removeprefix(f"{scanned.archive.name}/") for key in index["key"].to_pylist()]
    classes = [scanned.scan.class_names[label] for label in index["label"].to_pylist()]
    return list(zip(keys, classes, read_archive(scanned, split), strict=True))


def pack_archives(dataset, folder, kind):
    """Write the same images in the same order as two archives a split."""
    listing = list_dataset(Location("folder", str(dataset)), Config())
    for split in ("train", "valid"):
        names = [listing.classes[label] for label in listing.split(split)["label"].to_pylist()]
        keys = [key.decode() for key in listing.split(split)["key"].to_pylist()]
        rows = [(name, key, (dataset / key).read_bytes()) for name, key in zip(names, keys, strict=True)]
        for part, some in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            path = folder / f"{split}-{part}.{'parquet' if kind == 'parquet' else 'tar'}"
            if kind == "parquet":
                columns = {"label": [name for name, *_ in some], "image": [data for *_, data in some]}
                pq.write_table(pa.table(columns), path, row_group_size=7)
            elif kind == "webdataset":
                pairs = [((f"{n}.png", data), (f"{n}.cls", name.encode())) for n, (name, _, data) in enumerate(some)]
                path.write_bytes(pack_tar(itertools.chain(*pairs)))
            else:
                path.write_bytes(pack_tar((key, data) for _, key, data in some))


# Plans


def key_listing(num_train, num_valid):
    """List images of one class, all of the same key."""

    def table(num_images):
        return pa.table({"key": [b"key"] * num_images, "label": pa.array([0] * num_images, pa.int32())})

    return Listing(Location("folder", "/"), ("3", "7"), table(num_train), table(num_valid), "valid", {})


def plan_of(sizes=(10_000, 5_000), side=28, **options):
    """Make the plan and the shards of so many square grey images to train on and to validate on."""
    return make_plan(Config(**options), key_listing(*sizes), Target(side, side, "L"), 24)


# Results

RESULT_CLASSES = ("3", "7", "ä")
RESULT_CLASSIFIERS = ("nearest_mean_l1", "nearest_mean_rms", "sgd_linear")
RESULT_TARGET = Target(2, 3, "RGB")
RESULT_TABLES = (
    "metrics",
    "confusion",
    "predictions/part-00000",
    "means",
    "weights",
    "history",
    "skipped",
    "duplicates",
    "suspects",
)
HISTORY = [
    EpochMetric(1, 97, 0.1 + 0.2, 1 / 3, 1e-300, 0.9, 0.8, 1e17 / 3, 1.5),
    EpochMetric(2, 97, 0.25, 0.5, 0.75, 1.0, 0.0, 0.125, 2.5),
]


def make_tables():
    """Lay out small tables of every kind, by their names."""
    classes, classifiers = RESULT_CLASSES, RESULT_CLASSIFIERS
    confusion_KK = np.array([[4, 0, 1], [2, 3, 0], [0, 1, 1]])
    labels_N, predictions_N = np.array([0, 1, 2, 2]), np.array([0, 0, 2, 1])
    scores_NK = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 0.75], [0, 0, 1]], np.float32)
    keys = pa.array([f"valid/{classes[label]}/{row % 2}.png" for row, label in enumerate(labels_N)])
    predictions, scores = dict.fromkeys(classifiers, predictions_N), dict.fromkeys(classifiers, scores_NK)
    skipped = [["k", "l"], ["train"] * 2, ["3", "7"], ["empty"] * 2, ["no bytes"] * 2]
    duplicates = [["exact"] * 2, [0, 0], ["k", "l"], ["train"] * 2, ["3", "7"], [0.0, 0.0], [None, None]]
    suspects = [["k", "l"], ["train"] * 2, ["3", "7"], ["7", "3"], [1.0, 1.0]]
    means_KD = np.arange(54, dtype=np.float32).reshape(3, 18)
    return {
        "metrics": metrics_table([row for name in classifiers for row in accuracies(name, classes, confusion_KK)]),
        "confusion": confusion_table(classes, dict.fromkeys(classifiers, confusion_KK)),
        "predictions/part-00000": predictions_table(classes, keys, labels_N, predictions, scores),
        "means": means_table(classes, RESULT_TARGET.sides, np.arange(1, 4), means_KD),
        "weights": weights_table(classes, RESULT_TARGET.sides, np.arange(57, dtype=np.float32), np.zeros(18)),
        "history": history_table(HISTORY),
        "skipped": pa.table(skipped, schema=SKIPPED_SCHEMA),
        "duplicates": pa.table(duplicates, schema=DUPLICATES_SCHEMA),
        "suspects": pa.table(suspects, schema=SUSPECTS_SCHEMA),
    }


def write_finished(output, keys, labels, predictions, scores=None, is_top=False, classes=RESULT_CLASSES, **fields):
    """Write a finished run of three classes as `compare` reads it: predictions in two files, and `run.json`.

    With `is_top` it has the best scores alone, as runs of many classes have.
    """

    def lay_out(scores_NK, labels_N):
        return choose_top(scores_NK, labels_N, are_distances=False) if is_top else scores_NK

    middle = len(keys) // 2
    labels_N = np.array(labels)
    for part, rows in enumerate((slice(None, middle), slice(middle, None))):
        table = predictions_table(
            classes,
            pa.array(keys[rows], pa.string()),
            labels_N[rows],
            {name: np.array(own)[rows] for name, own in predictions.items()},
            {name: lay_out(np.array(own, np.float32)[rows], labels_N[rows]) for name, own in (scores or {}).items()},
        )
        write_table(output, f"predictions/part-{part:05d}", table)
    metrics = [{"classifier": name} for name in predictions]
    run = {"dataset": {"root": "/data", "classes": classes}, "metrics": metrics, "num_valid": len(keys), "options": {}}
    write_run(output, {**run, **fields})
    return output.root


# Processes


def command(*args, stderr=subprocess.PIPE, **environment):
    """Start the command as a user does, in a process group of its own, marked so that its processes can be found."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def processes_with(name, value):
    """Find the living processes in whose environment a variable has a value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def end_processes(processes):
    """End processes by their ids."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
