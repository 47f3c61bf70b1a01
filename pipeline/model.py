"""A model of the user's own, as all rooms know it: what it is given, what it answers, and what its outputs mean.

Input: the options, what the program in the file says of itself, and the dataset's classes. Output: a `Model`.
Invariant: nothing here computes or loads torch; what changes an output of the model is in `identity`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.errors import ModelError, quoted


@dataclass(frozen=True)
class ModelInput:
    """The pixels that a model is given.

    Attributes:
        height: In pixels.
        width: In pixels.
        mode: L or RGB, as the model has one channel or three.
        resize: `squash` resizes both sides, `crop` keeps the aspect ratio; the middle is cut out of both.
        crop_pct: Which share of the sides the middle is.
        interpolation: Of the resizing, with Pillow's filters.
        is_made: Whether these pixels are made; else a file is only decoded at a scale that would do for them.
    """

    height: int
    width: int
    mode: Literal["L", "RGB"]
    resize: str = "squash"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    is_made: bool = True

    @property
    def num_values(self) -> int:
        """Values of one image, which is also its size in bytes."""
        return self.height * self.width * len(self.mode)

    @property
    def shape(self) -> list[int]:
        """[H, W], or [H, W, 3] for RGB."""
        return [self.height, self.width] if self.mode == "L" else [self.height, self.width, 3]

    @property
    def scaled(self) -> tuple[int, int]:
        """Height and width that an image is resized to, or of `crop` at least, before the middle is cut out."""
        return math.floor(self.height / self.crop_pct), math.floor(self.width / self.crop_pct)


@dataclass(frozen=True)
class Wanted:
    """What the user says of a model, before it is looked at.

    Attributes:
        output: `logits` or `embedding`.
        size: Height and width of its input; None for those that it was exported with.
        default_size: What is taken where neither says it.
        mean: Taken off each channel of pixels from 0 to 1; one value for all, or one a channel.
        std: By which the rest is divided, likewise.
        batch_size: Images of a batch; None for the usual number.
        num_names: Names that its outputs are to have; None for an embedding.
        names_from: Where these names are from, for errors.
    """

    output: str
    size: tuple[int, int] | None
    default_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int | None
    num_names: int | None
    names_from: str


@dataclass(frozen=True)
class Probed:
    """What a model turned out to be: its input, its batches, the number of outputs of an image.

    `is_exact` says whether an output has the same bits wherever its image stands in the batch.
    """

    height: int
    width: int
    channels: int
    batch_size: int
    num_outputs: int
    is_exact: bool


@dataclass(frozen=True)
class Model:
    """A model that was looked at, for one dataset.

    Attributes:
        sha256: Of its file.
        output: `logits` or `embedding`.
        input: The pixels that it is given.
        mean: As in `Wanted`.
        std: Likewise.
        batch_size: Images of every batch; the last one is filled up.
        num_outputs: Logits or features of an image.
        places: For each logit the place of its class among those of the dataset, followed by `extra_classes`.
        extra_classes: Classes that the model knows and the dataset has not.
        missing_classes: Classes of the dataset that the model does not know, which it can never answer.
        feature_dtype: What features are kept as, `float32` or `float16`.
    """

    sha256: str
    output: str
    input: ModelInput
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    num_outputs: int
    places: tuple[int, ...] = ()
    extra_classes: tuple[str, ...] = ()
    missing_classes: tuple[str, ...] = ()
    feature_dtype: str = "float32"

    @property
    def has_features(self) -> bool:
        """Whether its outputs take the place of pixels."""
        return self.output == "embedding"

    @property
    def feature_bytes(self) -> int:
        """Bytes of an image's features."""
        return self.num_outputs * (2 if self.feature_dtype == "float16" else 4)

    @property
    def identity(self) -> dict[str, Any]:
        """All that its outputs depend on, beside the images."""
        wanted = {name: value for name, value in asdict(self.input).items() if name != "is_made"}
        return {**asdict(self), "input": wanted, "places": list(self.places)}


def match_classes(names: Sequence[str], classes: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Find the place of each of a model's classes among those of the dataset, followed by its further ones.

    Returns:
        The places, and the further classes in the model's order.

    Raises:
        ModelError: If a name is there twice, or none is of the dataset.
    """
    doubled = [name for name, number in Counter(names).items() if number > 1]
    if doubled:
        raise ModelError(
            f"--model-classes: expected every name once, got {quoted(doubled[0])} {names.count(doubled[0])} times; "
            "give a name a line, in the order of the model's outputs"
        )
    extra = [name for name in names if name not in set(classes)]
    if len(extra) == len(names):
        raise ModelError(
            f"--model-classes: expected names of the dataset's classes, as {quoted(classes[0])}, got none of them but "
            f"{quoted(names[0]) if names else 'nothing'}; give a name a line as the dataset spells it"
        )
    places = {name: place for place, name in enumerate([*classes, *extra])}
    return tuple(places[name] for name in names), tuple(extra)
