"""The peers: other programs for nearest class means, and the limit (decoding alone).

Run from `jobs/` as `python -m benchmarks.peers NAME REQUEST`.

Input: the name of a peer and an `Images` request as JSON, on the command line. Output: an `Answer` as JSON, the last
line on standard output. Invariant: a peer runs in a new process, and is written in the fast way that the library's own
documentation shows.

Axes: N images, B images of a batch, K classes, D values of one image.
"""

# Every peer's time includes the imports here: heavy ones stand inside the functions.
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.request import Answer, Images, class_names, image_paths, labelled_paths, serve

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

_BLOCK_IMAGES = 512
# Larger batches cost less: 4,096 took two thirds of the CPU time of 512 on MNIST. There must be enough batches to keep
# every worker busy to the end.
_MAX_LOADER_IMAGES, _BATCHES_PER_WORKER = 4096, 16
_RAY_BLOCKS_PER_CPU = 8
# That of this job: `pipeline.data.ahead.DEFAULT_CONCURRENCY`.
_CONCURRENCY = 128


def plain_loop(images: Images) -> Answer:
    """Do the work in one process, as in a notebook.

    The model is chapter 4 of "Deep Learning for Coders with fastai and PyTorch", with any number of classes.
    """
    import numpy as np
    import torch

    def load(split: str, name: str) -> torch.Tensor:
        paths = image_paths(images.data, split, name)
        pixels = [torch.from_numpy(np.array(_open(path, images))) for path in paths]
        return (torch.stack(pixels).float() / 255).flatten(1)

    means, num_train, num_valid, num_correct = [], [], 0, 0
    for name in class_names(images.data):
        images_ND = load("train", name)
        means.append(images_ND.mean(0))
        num_train.append(len(images_ND))
    means_KD = torch.stack(means)
    for label, name in enumerate(class_names(images.data)):
        images_ND = load("valid", name)
        num_correct += int((_nearest(images_ND, means_KD) == label).sum())
        num_valid += len(images_ND)
    checksum = float(means_KD.double().mean(1) @ torch.tensor(num_train).double()) / sum(num_train)
    return Answer(sum(num_train) + num_valid, num_correct, num_valid, checksum)


def dataloader(images: Images) -> Answer:
    """Do the work with torch's `DataLoader`, one worker per core.

    `__getitems__` fetches a whole batch as one tensor, which costs less than one tensor per image and the default
    collation. Paths are an array, because the workers would copy a list page by page (reference counts).
    Source: https://docs.pytorch.org/docs/stable/data.html#torch.utils.data.Dataset and #multi-process-data-loading
    """
    import torch
    from torch.nn.functional import one_hot
    from torch.utils.data import DataLoader

    num_classes, num_workers = len(class_names(images.data)), os.cpu_count() or 1

    def load(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        files = _Files(split, images)
        size = max(1, min(_MAX_LOADER_IMAGES, len(files) // (_BATCHES_PER_WORKER * num_workers)))
        dataset: Any = files
        return iter(DataLoader(dataset, batch_size=size, num_workers=num_workers, collate_fn=_identity))

    sums_KD, counts_K = torch.zeros(num_classes, 1, dtype=torch.float64), torch.zeros(num_classes, dtype=torch.int64)
    for images_BD, labels_B in load("train"):
        one_hot_BK = one_hot(labels_B, num_classes)
        # Exact: whole numbers below 2^24 in float32.
        sums_KD = sums_KD + one_hot_BK.float().T @ images_BD.float()
        counts_K += one_hot_BK.sum(0)
    means_KD = (sums_KD / (255 * counts_K[:, None])).float()
    num_correct = num_valid = 0
    for images_BD, labels_B in load("valid"):
        num_correct += int((_nearest(images_BD.float() / 255, means_KD) == labels_B).sum())
        num_valid += len(labels_B)
    num_train = int(counts_K.sum())
    checksum = float(sums_KD.sum()) / (255 * num_train * sums_KD.shape[1])
    return Answer(num_train + num_valid, num_correct, num_valid, checksum)


class _Files:
    """The files of a split as the map-style dataset of a `DataLoader`."""

    def __init__(self, split: str, images: Images) -> None:
        import numpy as np

        paths, self._labels_N = labelled_paths(images.data, split)
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._images = images

    def __len__(self) -> int:
        return len(self._paths)

    def __getitems__(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np
        import torch

        pixels = [np.asarray(_open(os.fsdecode(self._paths[row]), self._images)) for row in rows]
        return torch.from_numpy(np.stack(pixels)).flatten(1), torch.from_numpy(self._labels_N[list(rows)])


def _identity(batch: Any) -> Any:
    return batch


def ray_data_read_images(images: Images) -> Answer:
    """Do the work with Ray Data as its documentation shows it: `read_images`, then `map_batches`, default settings.

    Source: https://docs.ray.io/en/latest/data/working-with-images.html
    """
    import ray.data
    from pyarrow.fs import S3FileSystem

    root, store = images.data, None
    if images.endpoint:
        root, store = f"s3://{images.bucket}", S3FileSystem(endpoint_override=images.endpoint, region="us-east-1")

    def read(split: str) -> Any:
        size = (images.height, images.width) if images.is_resized else None
        return ray.data.read_images(
            f"{root}/{split}", filesystem=store, size=size, mode=images.mode, include_paths=True
        )

    def names(batch: dict[str, Any]) -> list[str]:
        return [path.split("/")[-2] for path in batch["path"]]

    return _ray_data(images, read, names, preserve_order=False)


def ray_data_tuned(images: Images) -> Answer:
    """Do the same with the fastest settings that we found for small files.

    With `preserve_order` a read task reads its files one after another, not in eight threads. `partitioning` gives the
    label at less cost than `include_paths`. Other numbers of blocks made no difference; batches of a fixed size took
    nearly twice as long as whole blocks.
    Source: https://docs.ray.io/en/latest/data/execution-configurations.html
    """
    import ray.data
    from ray.data.datasource.partitioning import Partitioning, PartitionStyle

    def read(split: str) -> Any:
        folder = f"{images.data}/{split}"
        size = (images.height, images.width) if images.is_resized else None
        by_class = Partitioning(PartitionStyle.DIRECTORY, field_names=["class"], base_dir=folder)
        return ray.data.read_images(folder, size=size, mode=images.mode, partitioning=by_class)

    return _ray_data(images, read, lambda batch: batch["class"], preserve_order=True)


def ray_data_map_batches(images: Images) -> Answer:
    """Do the work with Ray Data from a list of paths; `map_batches` decodes with this program's own decoder.

    Ray Data fuses the two calls of `map_batches` into one task, so that no image is copied to the object store.
    Source: https://docs.ray.io/en/latest/data/transforming-data.html
    """
    import numpy as np
    import pyarrow as pa
    import ray.data

    from pipeline.decoding.images import Fault, decode_image
    from pipeline.target import Target

    classes = np.array(class_names(images.data))
    target = Target(images.height, images.width, "L" if images.mode == "L" else "RGB")

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = bytearray()
        for path in batch["path"]:
            decoded = decode_image(Path(path).read_bytes(), target)
            if isinstance(decoded, Fault):
                raise ValueError(f"{path}: {decoded.error}")
            pixels += decoded[0]
        return {"image": np.frombuffer(pixels, np.uint8).reshape(-1, target.num_values), "class": batch["class"]}

    def read(split: str) -> Any:
        paths, labels_N = labelled_paths(images.data, split)
        table = pa.table({"path": paths, "class": classes[labels_N]})
        num_blocks = min(_RAY_BLOCKS_PER_CPU * (os.cpu_count() or 1), len(paths))
        return ray.data.from_arrow(table, override_num_blocks=num_blocks).map_batches(decode)

    return _ray_data(images, read, lambda batch: batch["class"], preserve_order=False)


def _ray_data(
    images: Images,
    read: Callable[[str], Any],
    names: Callable[[dict[str, Any]], Sequence[str]],
    *,
    preserve_order: bool,
) -> Answer:
    """Sum and score the batches of a dataset of images; `names` gives the class names of a batch."""
    import logging

    import numpy as np
    import ray
    import ray.data

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = preserve_order
    labels_by_name = {name: label for label, name in enumerate(class_names(images.data))}
    num_classes = len(labels_by_name)

    def unpack(batch: dict[str, Any]) -> tuple[Any, Any]:
        labels_N = np.array([labels_by_name[name] for name in names(batch)])
        return batch["image"].reshape(len(labels_N), -1), labels_N

    def sum_classes(batch: dict[str, Any]) -> dict[str, Any]:
        images_ND, labels_N = unpack(batch)
        sums_KD = np.stack([images_ND[labels_N == label].sum(0, dtype=np.int64) for label in range(num_classes)])
        return {"sums": sums_KD[None], "counts": np.bincount(labels_N, minlength=num_classes)[None]}

    rows = read("train").map_batches(sum_classes).take_all()
    sums_KD, counts_K = sum(row["sums"] for row in rows), sum(row["counts"] for row in rows)
    means_KD = (sums_KD / (255 * counts_K[:, None])).astype(np.float32)

    def score(batch: dict[str, Any]) -> dict[str, Any]:
        images_ND, labels_N = unpack(batch)
        num_correct = 0
        for start in range(0, len(images_ND), _BLOCK_IMAGES):
            part = slice(start, start + _BLOCK_IMAGES)
            block_ND = images_ND[part].astype(np.float32) / 255
            # [N, 1, D] - [K, D] -> [N, K, D]
            distances_NK = np.abs(block_ND[:, None] - means_KD).mean(2)
            num_correct += int((distances_NK.argmin(1) == labels_N[part]).sum())
        return {"num_correct": [num_correct], "num_valid": [len(images_ND)]}

    rows = read("valid").map_batches(score).take_all()
    num_train, num_valid = int(counts_K.sum()), sum(row["num_valid"] for row in rows)
    checksum = float(sums_KD.sum()) / (255 * num_train * sums_KD.shape[1])
    return Answer(num_train + num_valid, sum(row["num_correct"] for row in rows), num_valid, checksum)


def daft_whole(images: Images) -> Answer:
    """Do the work with Daft: its own decoder and resizer, in threads.

    Source: https://docs.daft.ai/en/stable/modalities/images/
    """
    import numpy as np

    num_classes = len(class_names(images.data))
    sums_KD = np.zeros((num_classes, images.height * images.width * len(images.mode)), np.int64)
    counts_K = np.zeros(num_classes, np.int64)
    for images_BD, labels_B in _daft_batches(images, "train"):
        for label in np.unique(labels_B):
            sums_KD[label] += images_BD[labels_B == label].sum(0, dtype=np.int64)
        counts_K += np.bincount(labels_B, minlength=num_classes)
    means_KD = (sums_KD / (255 * counts_K[:, None])).astype(np.float32)
    num_correct = num_valid = 0
    for images_BD, labels_B in _daft_batches(images, "valid"):
        for start in range(0, len(images_BD), _BLOCK_IMAGES):
            block_ND = images_BD[start : start + _BLOCK_IMAGES].astype(np.float32) / 255
            distances_NK = np.abs(block_ND[:, None] - means_KD).mean(2)
            num_correct += int((distances_NK.argmin(1) == labels_B[start : start + _BLOCK_IMAGES]).sum())
        num_valid += len(labels_B)
    num_train = int(counts_K.sum())
    checksum = float(sums_KD.sum()) / (255 * num_train * sums_KD.shape[1])
    return Answer(num_train + num_valid, num_correct, num_valid, checksum)


def daft_decode(images: Images) -> Answer:
    """Decode all images with Daft, and nothing else."""
    import daft  # noqa: F401 - not a part of decoding

    begun = time.perf_counter()
    num_images = sum(len(labels_B) for split in ("train", "valid") for _, labels_B in _daft_batches(images, split))
    return Answer(num_images, phase_s=time.perf_counter() - begun, num_units=num_images)


def _daft_batches(images: Images, split: str) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Decode a split's files with Daft, from a list of paths; yields pixels, uint8 [B, D], and labels, int64 [B]."""
    import daft

    paths, labels_N = labelled_paths(images.data, split)
    settings = None
    if images.endpoint:
        paths = [f"s3://{images.bucket}{path.removeprefix(images.data)}" for path in paths]
        s3 = daft.io.S3Config(endpoint_url=images.endpoint, region_name="us-east-1", key_id="key", access_key="secret")
        settings = daft.io.IOConfig(s3=s3)
    pixels = daft.col("path").download(io_config=settings).decode_image(mode=images.mode)
    if images.is_resized:
        pixels = pixels.resize(images.width, images.height)
    # With one shape for all, the pixels of a batch are one array.
    pixels = pixels.cast(daft.DataType.image(images.mode, images.height, images.width))
    frame = daft.from_pydict({"path": paths, "label": labels_N}).select(daft.col("label"), pixels.alias("image"))
    for batch in frame.to_arrow_iter():
        storage = batch["image"].storage if hasattr(batch["image"], "storage") else batch["image"]
        yield storage.flatten().to_numpy().reshape(len(batch), -1), batch["label"].to_numpy()


def limit(images: Images) -> Answer:
    """Decode the files in full in plain processes, one per core, and do nothing else."""
    import numpy as np
    from PIL import Image

    def decode(paths: Sequence[str]) -> None:
        for path in paths:
            np.asarray(Image.open(path))

    return _in_processes(images, decode)


def client(images: Images) -> Answer:
    """Get the objects in plain processes, one per core, with the client and the threads of this job, and do no more."""

    def get(paths: Sequence[str]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import obstore
        from obstore.store import S3Store

        store = S3Store(
            images.bucket,
            config={"endpoint": images.endpoint, "region": "us-east-1", "skip_signature": True},
            client_options={"allow_http": True},
        )
        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            for _ in pool.map(lambda path: obstore.get(store, path[len(images.data) + 1 :]).bytes(), paths):
                pass

    return _in_processes(images, get)


def _in_processes(images: Images, work: Callable[[Sequence[str]], None]) -> Answer:
    """Do work on all files, in as many processes as there are cores."""
    paths = [path for split in ("train", "valid") for path in labelled_paths(images.data, split)[0]]
    num_processes = os.cpu_count() or 1
    started = time.perf_counter()
    pids = []
    for first in range(num_processes):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(paths[first::num_processes])
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    seconds = time.perf_counter() - started
    if any(statuses):
        raise ValueError(f"{images.data}: expected images that can be decoded, got another file; see the error above")
    return Answer(len(paths), phase_s=seconds, num_units=len(paths))


PEERS: dict[str, Callable[[Images], Answer]] = {
    "plain_loop": plain_loop,
    "dataloader": dataloader,
    "ray_data_read_images": ray_data_read_images,
    "ray_data_tuned": ray_data_tuned,
    "ray_data_map_batches": ray_data_map_batches,
    "daft": daft_whole,
    "daft_decode": daft_decode,
    "client": client,
    "limit": limit,
}


def _open(path: str, images: Images) -> Image.Image:
    """Decode an image in full, and convert it to the mode and size of the request."""
    from PIL import Image

    image: Image.Image = Image.open(path)
    if image.mode != images.mode:
        image = image.convert(images.mode)
    if images.is_resized:
        image = image.resize((images.width, images.height), Image.Resampling.BILINEAR)
    return image


def _nearest(images_ND: torch.Tensor, means_KD: torch.Tensor) -> torch.Tensor:
    """Find each image's nearest mean by L1, int64 [N]."""
    import torch

    # [N, 1, D] - [K, D] -> [N, K, D]
    blocks = images_ND.split(_BLOCK_IMAGES)
    return torch.cat([(block_ND[:, None] - means_KD).abs().mean(2).argmin(1) for block_ND in blocks])


if __name__ == "__main__":
    serve(PEERS, Images)
