"""The options of a job, checked.

Input: the options as the command line parsed them. Output: a frozen `Config` in which every value can be used. Checks
that need the data or the cluster stand where these are known.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from numbers import Integral, Real
from os import PathLike
from typing import Any

from pipeline.errors import OptionError, quoted

INCOMPLETE_CLASSES = ("error", "drop")
NEIGHBORS_OF = ("auto", "valid", "all")
SCORES = ("auto", "top", "all")
MAX_NEIGHBORS = 1000
OUTPUTS = ("logits", "embedding")
RESIZES = ("squash", "crop")
INTERPOLATIONS = ("bilinear", "bicubic")
FEATURE_DTYPES = ("float32", "float16")
# Of pixels from 0 to 1, by channel: what most models for photographs were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# As timm's, where a model says nothing else.
_CROP_PCT = {"squash": 1.0, "crop": 0.875}
# An image may be resized to so many times the model's size, before its middle is cut out.
_MIN_CROP_PCT = 0.1
DEVICES = ("auto", "cpu", "cuda")
MODES = ("auto", "L", "RGB")
# By a field's annotation, what it expects and how to give it.
_TYPES = {
    "str": ("a text", "give it as on the command line"),
    "bool": ("True or False", "give one of them"),
    "int": ("a whole number", "give it as a number"),
    "float": ("a number", "give it as a number"),
    "tuple[str, ...]": ("names of classes", "give them as a tuple"),
}
# One image of more pixels than this would weigh as much as a whole shard of small ones.
MAX_SIDE = 4096
_LARGEST_FLOAT32 = 3.4e38


@dataclass(frozen=True)
class Config:
    """All options of one job; `jobs/evaluate.py --help` and the README say what each means.

    Raises:
        OptionError: At construction, if a value cannot be used.
    """

    data: str = "digits"
    out: str = field(default_factory=lambda: f"results/{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%fZ}")
    classes: tuple[str, ...] = ()
    exclude_classes: tuple[str, ...] = ()
    label_column: str | None = None
    image_column: str | None = None
    train_split: str = "train"
    valid_split: str = "valid"
    valid_fraction: float | None = None
    incomplete_classes: str = "error"
    size: str = "auto"
    mode: str = "auto"
    draft: bool = True
    model: str | None = None
    model_output: str = "logits"
    model_classes: str | None = None
    model_size: str = "auto"
    model_mean: str = "0"
    model_std: str = "1"
    model_resize: str = "squash"
    model_crop_pct: float | None = None
    model_interpolation: str = "bilinear"
    model_batch_size: int | None = None
    feature_dtype: str = "float32"
    epochs: int = 40
    neighbors: int | None = None
    neighbors_of: str = "auto"
    scores: str = "auto"
    scores_file: str | None = None
    learning_rate: float | None = None
    batch_size: int = 64
    seed: int = 0
    target_accuracy: float | None = None
    patience: int | None = None
    max_seconds: float | None = None
    actors: int | None = None
    device: str = "auto"
    gpus_per_actor: float = 1.0
    lanes: int = 8
    shard_images: int | None = None
    address: str | None = None
    min_nodes: int = 1
    wait_seconds: float = 300.0
    cache: str | None = None
    cache_gib: float | None = None
    read_concurrency: int | None = None
    scratch: str = field(default_factory=tempfile.gettempdir)
    report: bool = True
    example: str | None = None
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        self._take_types()
        self._check_data()
        self._check_model()
        self._check_training()
        self._check_shape_of_work()

    def _take_types(self) -> None:
        """Take what stands for a text or a number, as a path or NumPy's own; anything else is an error."""
        for each in fields(self):
            value, (kind, *or_none) = getattr(self, each.name), str(each.type).split(" | ")
            if not (value is None and or_none):
                object.__setattr__(self, each.name, _as_type(_option(each.name), kind, value))
        for name in ("size", "model_size"):
            if (size := getattr(self, name)).isascii() and size.isdigit():
                object.__setattr__(self, name, f"{size}x{size}")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """The target's height and width in pixels, or None for `auto`."""
        return _height_width(self.size)

    @property
    def model_height_width(self) -> tuple[int, int] | None:
        """Height and width of the model's input in pixels, or None for `auto`."""
        return _height_width(self.model_size)

    @property
    def crop_pct(self) -> float:
        """Which share of the sides of a resized image the model is given."""
        return _CROP_PCT[self.model_resize] if self.model_crop_pct is None else self.model_crop_pct

    def channel_values(self, name: str) -> tuple[float, ...]:
        """The numbers of `model_mean` or `model_std`: one for all channels, or one for each of three."""
        text = getattr(self, name)
        if text == "imagenet":
            return IMAGENET_MEAN if name == "model_mean" else IMAGENET_STD
        try:
            values = tuple(float(word) for word in text.split(","))
        except ValueError:
            values = ()
        is_wrong = len(values) not in (1, 3) or not all(map(math.isfinite, values))
        if is_wrong or (name == "model_std" and min(values) <= 0):
            raise OptionError(
                f"{_option(name)}: expected imagenet, or one number or three, of std above 0, got {text}; as "
                "0.485,0.456,0.406"
            )
        return values

    def wants_class(self, name: str) -> bool:
        """Say whether a class is asked for."""
        return name not in self.exclude_classes and (not self.classes or name in self.classes)

    def _check_data(self) -> None:
        for name in ("cache", "scratch", "address", "label_column", "image_column", "model_classes"):
            given = getattr(self, name)
            _expect(given != "", f"{_option(name)}: expected a text, got nothing; leave it out for the default")
        _expect(bool(self.data), "--data: expected a name, folder or URI, got nothing; say what to evaluate")
        _expect(bool(self.out), "--out: expected a folder or URI, got nothing; say where the results go")
        for option, names in (("--classes", self.classes), ("--exclude-classes", self.exclude_classes)):
            _expect(
                len(set(names)) == len(names) and all(names),
                f"{option}: expected each class once, got {','.join(names) or 'nothing'}; name each one time, as 3,7",
            )
        if both := [name for name in self.exclude_classes if name in self.classes]:
            raise OptionError(
                f"--exclude-classes: expected no class of --classes, got {quoted(both[0])}; name it in one of them"
            )
        for option, split in (("--train-split", self.train_split), ("--valid-split", self.valid_split)):
            _expect(
                bool(split) and "/" not in split and split not in (".", ".."),
                f"{option}: expected the name of a folder in the dataset, got {split!r}; as train or valid",
            )
        _expect(
            self.train_split != self.valid_split,
            f"--valid-split: expected another folder than --train-split, got {self.valid_split} for both; "
            "images that were trained on say nothing about new ones",
        )
        _expect(
            self.valid_fraction is None or 0 < self.valid_fraction < 1,
            f"--valid-fraction: expected a number between 0 and 1, got {self.valid_fraction}; 0.2 holds out a fifth",
        )
        _expect(
            self.incomplete_classes in INCOMPLETE_CLASSES,
            f"--incomplete-classes: expected error or drop, got {self.incomplete_classes}; choose one",
        )
        _expect(self.mode in MODES, f"--mode: expected one of {', '.join(MODES)}, got {self.mode}; choose one")
        _expect(
            _is_size(self.size),
            f"--size: expected auto, or HxW with sides of 1 to {MAX_SIDE}, got {self.size}; as 28x28, or 28 for both",
        )

    def _check_model(self) -> None:
        given = {each.name: getattr(self, each.name) for each in fields(self)
                 if each.name.startswith("model_") or each.name == "feature_dtype"}  # fmt: skip
        defaults = {each.name: each.default for each in fields(self)}
        idle = [name for name, value in given.items() if value != defaults[name]]
        _expect(
            self.model is not None or not idle,
            f"{_option(idle[0]) if idle else ''}: expected --model beside it, got none; name the file of the model",
        )
        _expect(self.model != "", "--model: expected a file or URI, got nothing; as model.pt2")
        for name, known in (
            ("model_output", OUTPUTS), ("model_resize", RESIZES), ("model_interpolation", INTERPOLATIONS),
            ("feature_dtype", FEATURE_DTYPES),
        ):  # fmt: skip
            value = getattr(self, name)
            _expect(value in known, f"{_option(name)}: expected one of {', '.join(known)}, got {value}; choose one")
        _expect(
            _is_size(self.model_size),
            f"--model-size: expected auto, or HxW with sides of 1 to {MAX_SIDE}, got {self.model_size}; as 224x224",
        )
        _expect(
            self.model_crop_pct is None or _MIN_CROP_PCT <= self.model_crop_pct <= 1,
            f"--model-crop-pct: expected {_MIN_CROP_PCT} to 1, got {self.model_crop_pct}; 0.875 cuts 224 pixels out of "
            "256",
        )
        _expect(
            self.model_batch_size is None or 1 <= self.model_batch_size <= MAX_SIDE,
            f"--model-batch-size: expected 1 to {MAX_SIDE}, got {self.model_batch_size}; leave it out for 32",
        )
        _expect(
            self.model_classes is None or self.model_output == "logits",
            "--model-classes: expected --model-output logits, got embedding; features have no classes, leave it out",
        )
        _expect(
            self.feature_dtype == "float32" or self.model_output == "embedding",
            "--feature-dtype: expected --model-output embedding beside it, got logits; leave it out",
        )
        self.channel_values("model_mean")
        self.channel_values("model_std")

    def _check_training(self) -> None:
        _expect(self.epochs >= 0, f"--epochs: expected 0 or more, got {self.epochs}; 0 leaves SGD out")
        _expect(
            self.learning_rate is None or 0 < self.learning_rate <= _LARGEST_FLOAT32,
            f"--learning-rate: expected auto, or a positive number, got {self.learning_rate}; auto fits the images",
        )
        _expect(
            self.neighbors is None or 0 <= self.neighbors <= MAX_NEIGHBORS,
            f"--neighbors: expected auto, or 0 to {MAX_NEIGHBORS}, got {self.neighbors}; 0 searches for none",
        )
        _expect(
            self.neighbors_of in NEIGHBORS_OF,
            f"--neighbors-of: expected one of {', '.join(NEIGHBORS_OF)}, got {self.neighbors_of}; choose one",
        )
        _expect(self.scores in SCORES, f"--scores: expected one of {', '.join(SCORES)}, got {self.scores}; choose one")
        _expect(
            self.scores_file != "", "--scores: expected a word or a file, got nothing; leave it out for the default"
        )
        _expect(0 <= self.seed < 2**63, f"--seed: expected 0 to 2^63 - 1, got {self.seed}; choose another")
        _expect(
            self.target_accuracy is None or 0 < self.target_accuracy <= 1,
            f"--target-accuracy: expected a number above 0, up to 1, got {self.target_accuracy}; 0.98 stops at 98 %",
        )
        _expect(
            self.patience is None or self.patience >= 1,
            f"--patience: expected 1 epoch or more, got {self.patience}; leave it out to train for all epochs",
        )
        _expect(
            self.max_seconds is None or 0 < self.max_seconds < math.inf,
            f"--max-seconds: expected a positive number, got {self.max_seconds}; leave it out for no limit",
        )

    def _check_shape_of_work(self) -> None:
        _expect(1 <= self.lanes <= 1024, f"--lanes: expected 1 to 1024, got {self.lanes}; the default is 8")
        nearest = max(1, round(self.batch_size / self.lanes)) * self.lanes
        _expect(
            self.batch_size >= 1 and self.batch_size % self.lanes == 0,
            f"--batch-size: expected a multiple of --lanes {self.lanes}, got {self.batch_size}; "
            f"the nearest is {nearest}",
        )
        _expect(
            self.shard_images is None or self.shard_images >= 1,
            f"--shard-images: expected auto, or 1 or more, got {self.shard_images}; auto fits the dataset",
        )
        _expect(
            self.read_concurrency is None or 1 <= self.read_concurrency <= 1024,
            f"--read-concurrency: expected auto, or 1 to 1024, got {self.read_concurrency}; auto is 128",
        )
        _expect(
            self.actors is None or self.actors >= 1,
            f"--actors: expected auto, or 1 or more, got {self.actors}; auto fits the cluster",
        )
        _expect(
            self.actors is None or self.actors <= self.lanes,
            f"--actors: expected at most one for each of {self.lanes} lanes, got {self.actors}; raise --lanes",
        )
        _expect(
            self.device in DEVICES,
            f"--device: expected one of {', '.join(DEVICES)}, got {self.device}; choose one",
        )
        _expect(
            0 < self.gpus_per_actor <= 1,
            f"--gpus-per-actor: expected a number above 0, up to 1, got {self.gpus_per_actor}; "
            "an actor computes on one GPU, and 0.5 lets two actors share it",
        )
        _expect(
            self.cache_gib is None or (self.cache is not None and 0 < self.cache_gib < math.inf),
            f"--cache-gib: expected a positive number beside --cache, got {self.cache_gib}; leave it out for no limit",
        )
        address = self.address or ""
        _expect(
            "://" not in address.removeprefix("ray://") and not address.endswith((":8265", ":10001")),
            f"--address: expected the cluster's own address, got {address}, which is that of its dashboard or of Ray's "
            "client; give the one that `ray start` printed, as 10.0.0.1:6379",
        )
        host, _, port = address.removeprefix("ray://").rpartition(":")
        is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
        _expect(
            address in ("", "auto", "local") or (is_port and host != "" and not re.search(r"\s", address)),
            f"--address: expected auto, local or a host and a port, got {address!r}; as 10.0.0.1:6379",
        )
        _expect(
            self.min_nodes >= 1,
            f"--min-nodes: expected 1 or more, got {self.min_nodes}; leave it out to take the cluster as it is",
        )
        _expect(
            0 <= self.wait_seconds < math.inf,
            f"--wait-seconds: expected 0 or more, got {self.wait_seconds}; 0 takes the cluster as it is or fails",
        )
        _expect(
            not (self.overwrite and self.resume),
            "--resume: expected no --overwrite beside it, got both; --resume keeps what --overwrite removes",
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_type(option: str, kind: str, value: Any) -> Any:
    """Return a value as the type that an annotation names."""
    is_bool = isinstance(value, bool)
    match kind:
        case "str" if isinstance(value, (str, PathLike, Integral)) and not is_bool:
            return str(value)
        case "bool" if is_bool:
            return value
        case "int" if isinstance(value, Integral) and not is_bool:
            return int(value)
        case "float" if isinstance(value, Real) and not is_bool:
            return value if isinstance(value, int) else float(value)
        case "tuple[str, ...]" if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
            return tuple(_as_type(option, "str", name) for name in value)
    expected, advice = _TYPES[kind]
    raise OptionError(f"{option}: expected {expected}, got {value!r}; {advice}")


def _height_width(size: str) -> tuple[int, int] | None:
    if size == "auto":
        return None
    height, _, width = size.partition("x")
    return int(height), int(width)


def _is_size(text: str) -> bool:
    sides = text.split("x")
    is_pair = len(sides) == 2 and all(side.isascii() and side.isdigit() and len(side) <= 4 for side in sides)
    return text == "auto" or (is_pair and all(1 <= int(side) <= MAX_SIDE for side in sides))


def _expect(is_met: bool, message: str) -> None:
    if not is_met:
        raise OptionError(message)
