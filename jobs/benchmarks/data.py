"""The datasets of the benchmark's workloads, made in a working folder.

Input: a folder of images, or nothing. Output: folders of `train/<class>/` and `valid/<class>/`, the same as tar or
Parquet files, or arrays. Invariant: the same request makes the same files; a folder under its final name is complete.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.request import Images, class_names, image_paths, labelled_paths

SPLITS = ("train", "valid")
_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
_SIDES = ("left", "right")
_MIN_MEGAPIXELS, _MAX_MEGAPIXELS = 0.1, 4.0
_JPEG_QUALITY = 90
_VALID_EVERY = 5
_FILE_IMAGES = 10_000
_ROW_GROUP_IMAGES = 1000
_NOISE_IMAGES = 4096
_CLASS_SIDE, _CLASS_NOISE = 64, 64.0


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder if it does not exist; it gets its final name when it is complete."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


def link_images(source: Path, folder: Path, num_images: int) -> None:
    """Make a dataset of `num_images` hard links to the files of `source`, in the proportions of its classes.

    Every link is opened, read and decoded by itself; links save disk space. After the first round the files of `source`
    are in the system's page cache, and so are the links.
    """
    groups = [(split, name) for split in SPLITS for name in class_names(str(source))]
    by_group = {group: image_paths(str(source), *group) for group in groups}
    total = sum(len(paths) for paths in by_group.values())
    num_before = 0
    for (split, name), paths in by_group.items():
        target = folder / split / name
        target.mkdir(parents=True)
        # From cumulative counts, so that the groups add up to `num_images`.
        first, num_before = num_before * num_images // total, num_before + len(paths)
        for number in range(num_before * num_images // total - first):
            path = paths[number % len(paths)]
            link = target / f"{number // len(paths):03d}-{Path(path).name}"
            try:
                os.link(path, link)
            except OSError:  # another file system, or no more links to this file
                shutil.copyfile(path, link)


def make_photographs(folder: Path, num_images: int) -> None:
    """Make JPEG files of 0.1 to 4 megapixels from scikit-learn's two sample photographs.

    Four classes, the left and the right half of each photograph. An image is a random crop around a random point of
    its half, at least a third as wide and high as the photograph, with another brightness and enlarged to a random
    number of pixels; neighbouring classes overlap, so that some images are nearest to another class. Every fifth one
    is for validation.
    """
    num_processes = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.starmap(_make_share, [(folder, range(first, num_images, num_processes)) for first in range(num_processes)])


def _make_share(folder: Path, numbers: range) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in numbers:
        # One random stream per image, so that the result does not depend on the number of processes.
        random = np.random.default_rng(number)
        photograph, side = (number // 2) % len(_PHOTOGRAPHS), number % 2
        image = photographs[photograph]
        width, height = (int(length * random.uniform(0.33, 0.6)) for length in image.size)
        middle = image.width * (side + random.uniform()) / 2
        left = int(min(max(middle - width / 2, 0), image.width - width))
        top = int(random.integers(0, image.height - height + 1))
        num_pixels = 1e6 * random.uniform(_MIN_MEGAPIXELS, _MAX_MEGAPIXELS)
        scale = (num_pixels / (width * height)) ** 0.5
        size = (round(width * scale), round(height * scale))
        crop = image.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        brightness = random.uniform(0.5, 1.0)
        split = "valid" if number // 4 % _VALID_EVERY == 0 else "train"
        name = f"{_PHOTOGRAPHS[photograph].removesuffix('.jpg')}-{_SIDES[side]}"
        target = folder / split / name
        target.mkdir(parents=True, exist_ok=True)
        crop.point(lambda value, by=brightness: value * by).save(target / f"{number:06d}.jpg", quality=_JPEG_QUALITY)


def write_tars(source: Path, folder: Path) -> None:
    """Pack a dataset as WebDataset does: `<number>.<ending>` beside `<number>.cls`, which holds the class's name.

    Source: https://github.com/webdataset/webdataset#the-webdataset-format
    """
    for split in SPLITS:
        (folder / split).mkdir()
        for index, rows in enumerate(_rows(source, split)):
            with tarfile.open(folder / split / f"{index:05d}.tar", "w") as tar:
                for number, (path, name) in enumerate(rows):
                    for ending, data in ((Path(path).suffix, Path(path).read_bytes()), (".cls", name.encode())):
                        member = tarfile.TarInfo(f"{index * _FILE_IMAGES + number:09d}{ending}")
                        member.size = len(data)
                        tar.addfile(member, BytesIO(data))


def write_parquet(source: Path, folder: Path) -> None:
    """Write a dataset as Hugging Face's library does: a struct of `bytes` and `path`, and a class label.

    Source: https://huggingface.co/docs/hub/datasets-image#parquet-format
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = class_names(str(source))
    label = {"names": classes, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    schema = pa.schema(fields, metadata=metadata)
    for split in SPLITS:
        (folder / split).mkdir()
        for index, rows in enumerate(_rows(source, split)):
            images = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path, _ in rows]
            table = pa.table([images, [classes.index(name) for _, name in rows]], schema=schema)
            pq.write_table(table, folder / split / f"{index:05d}.parquet", row_group_size=_ROW_GROUP_IMAGES)


def _rows(source: Path, split: str) -> Iterator[list[tuple[str, str]]]:
    """Yield a split's paths with their classes, shuffled by a fixed seed, the rows of one file at a time."""
    import numpy as np

    classes = class_names(str(source))
    paths, labels_N = labelled_paths(str(source), split)
    order = np.random.default_rng(0).permutation(len(paths))
    for start in range(0, len(paths), _FILE_IMAGES):
        yield [(paths[row], classes[labels_N[row]]) for row in order[start : start + _FILE_IMAGES]]


def write_arrays(source: Path, folder: Path) -> None:
    """Decode a dataset of images of one size into arrays: `<split>_images.npy`, uint8 [N, D], and `<split>_labels`."""
    import numpy as np
    from PIL import Image

    for split in SPLITS:
        paths, labels_N = labelled_paths(str(source), split)
        images_ND = np.stack([np.asarray(Image.open(path)).reshape(-1) for path in paths])
        np.save(folder / f"{split}_images.npy", images_ND)
        np.save(folder / f"{split}_labels.npy", labels_N)


def make_noise(folder: Path, num_classes: int, num_values: int) -> None:
    """Make arrays as `write_arrays` does, of noise around an image of noise a class: 4,096 for training or more."""
    import numpy as np

    rng = np.random.default_rng(0)
    means_KD = rng.integers(64, 192, (num_classes, num_values), np.uint8)
    for split, num_images in zip(
        SPLITS, (_NOISE_IMAGES if num_values > 10_000 else 4 * _NOISE_IMAGES, 500), strict=True
    ):
        labels_N = rng.permutation(np.arange(num_images) % num_classes)
        images_ND = means_KD[labels_N]
        for image_D in images_ND:
            image_D += rng.integers(-64, 64, num_values, np.int8).view(np.uint8)  # which wraps round to what is meant
        np.save(folder / f"{split}_images.npy", images_ND)
        np.save(folder / f"{split}_labels.npy", labels_N)


def make_classes(folder: Path, num_images: int, num_classes: int = 1000) -> None:
    """Make JPEG files of 64x64 pixels of many classes: 8x8 noise a class, enlarged, and noise an image.

    Every fifth image of a class is for validation.
    """
    num_processes = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        shares = [range(first, num_classes, num_processes) for first in range(num_processes)]
        pool.starmap(_make_some_classes, [(folder, num_images, num_classes, labels) for labels in shares])


def _make_some_classes(folder: Path, num_images: int, num_classes: int, labels: range) -> None:
    import numpy as np
    from PIL import Image

    for label in labels:
        # One random stream per class, so that the result does not depend on the number of processes.
        random = np.random.default_rng(label)
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        mean_HWC = np.asarray(small.resize((_CLASS_SIDE, _CLASS_SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
        for number in range(label, num_images, num_classes):
            split = "valid" if number // num_classes % _VALID_EVERY == 0 else "train"
            target = folder / split / f"{label:04d}"
            target.mkdir(parents=True, exist_ok=True)
            pixels_HWC = mean_HWC + random.normal(0, _CLASS_NOISE, mean_HWC.shape)
            image = Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))
            image.save(target / f"{number:06d}.jpg", quality=_JPEG_QUALITY)


def images_request(data: Path, size: tuple[int, int] | None = None) -> Images:
    """Make the peers' request: the size (height, width) and mode of the first image, or the given size."""
    from PIL import Image

    with Image.open(labelled_paths(str(data), "train")[0][0]) as image:
        height, width = size or (image.height, image.width)
        return Images(str(data), height, width, "L" if image.mode == "L" else "RGB", is_resized=size is not None)


def count_images(data: Path) -> int:
    """Count the images of both splits."""
    return sum(len(labelled_paths(str(data), split)[0]) for split in SPLITS)


FORMS: dict[str, Callable[[Path, Path], Any]] = {"tar": write_tars, "parquet": write_parquet}
