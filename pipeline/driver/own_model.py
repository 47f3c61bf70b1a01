"""The user's own model, as the driver sees it: a file that is read once, a program that is looked at before all else.

Input: the options, actors that load the program, and the listing. Output: a `Model`. Invariant: the driver never runs
what is in the file; what is wrong with it is one line, before the results' folder is touched.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pipeline.config import Config
from pipeline.data import uris
from pipeline.data.files import enumerate_names
from pipeline.data.storage import open_root, reason
from pipeline.driver.actors import Actor
from pipeline.driver.state import ImageCounts
from pipeline.driver.waiting import Ref, wait_all
from pipeline.errors import ModelError, without_secrets
from pipeline.model import Model, ModelInput, Probed, Wanted, match_classes
from pipeline.target import Target

logger = logging.getLogger(__name__)

# A batch that a model was exported for and nobody asked for; smaller ones cost more calls than they save.
_SMALL_BATCH = 8
# Of the time, spent in the model, from which on it is what the job waits for.
_LIMIT_SHARE = 0.8


@dataclass
class ModelFile:
    """A file with a program: its bytes, until they are placed, their SHA-256, and the names of its outputs."""

    content: bytes
    sha256: str
    names: tuple[str, ...] | None

    def place(self) -> Ref:
        """Place the bytes where all actors find them, and forget them here."""
        ref = ray.put(np.frombuffer(self.content, np.uint8))
        self.content = b""
        return ref


def read_model(config: Config) -> ModelFile | None:
    """Read what `--model` and `--model-classes` name; None without a model.

    Raises:
        ModelError: If they cannot be read.
    """
    if config.model is None:
        return None
    content = _read("--model", config.model)
    names = None if config.model_classes is None else _read_names(config.model_classes)
    return ModelFile(content, hashlib.sha256(content).hexdigest(), names)


def _read_names(given: str) -> tuple[str, ...]:
    """Read a name a line; empty lines at the end are none."""
    shown = f"--model-classes {without_secrets(given)}"
    try:
        text = _read("--model-classes", given).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ModelError(f"{shown}: expected text in UTF-8, got {exc.reason}; give a name a line") from exc
    # Not by `splitlines`, which ends a line at what a name may hold.
    names = io.StringIO(text, newline=None).read().rstrip("\n").split("\n")
    if "" in names:
        raise ModelError(
            f"{shown}: expected a name in each line, got none in line {names.index('') + 1}; give a name for each of "
            "the model's outputs, in their order"
        )
    return tuple(names)


def _read(option: str, given: str) -> bytes:
    root = uris.absolute_root(option, given, ModelError)
    store, path = open_root(option, root, ModelError)
    found: Any
    try:
        found = store.find(path)
        if found is not None and not found.is_folder:
            return store.read_range(path, 0, found.size)
        words = "nothing there" if found is None else "a folder"
    except OSError as exc:
        words = reason(exc)
    raise ModelError(f"{option} {without_secrets(given)}: expected a file, got {words}; check the name")


def probe_model(
    config: Config,
    file: ModelFile,
    actors: list[Actor],
    classes: tuple[str, ...],
    target: Target,
    on_tick: Callable[[], bool],
) -> Model:
    """Have the first actor look at the model, and match its outputs with the dataset's classes.

    Raises:
        ModelError: If it cannot be used.
    """
    is_classifier = config.model_output == "logits"
    wanted = Wanted(
        output=config.model_output,
        size=config.model_height_width,
        default_size=(target.height, target.width),
        mean=config.channel_values("model_mean"),
        std=config.channel_values("model_std"),
        batch_size=config.model_batch_size,
        num_names=len(file.names or classes) if is_classifier else None,
        names_from="classes of the dataset" if file.names is None else "names in --model-classes",
    )
    [probed] = wait_all([actors[0].probe_model.remote(wanted)], "the model", on_tick)
    model = _settle(config, file, probed, wanted, classes)
    if not probed.is_exact:
        logger.warning(
            "--model: expected the same bits of an image's output in any place of a batch, got others in the last "
            "digits; they are those of this run, and another number of actors may change them"
        )
    if probed.batch_size < _SMALL_BATCH and config.model_batch_size is None:
        logger.warning(
            "--model: expected a batch of any size, got a program for %d images at a time, which is slow; export it "
            "with a dynamic batch, as the README shows, or give --model-batch-size %d to be told no more",
            probed.batch_size, probed.batch_size,
        )  # fmt: skip
    if model.missing_classes:
        logger.warning(
            "--model-classes: expected all classes of the dataset, got none of %d of them, whose images are never "
            "right: %s", len(model.missing_classes), enumerate_names(model.missing_classes),
        )  # fmt: skip
    return model


def _settle(config: Config, file: ModelFile, probed: Probed, wanted: Wanted, classes: tuple[str, ...]) -> Model:
    places, extra = tuple(range(probed.num_outputs)), tuple[str, ...]()
    if wanted.num_names is None:
        places = ()
    elif file.names is not None:
        places, extra = match_classes(file.names, classes)
    return Model(
        sha256=file.sha256,
        output=config.model_output,
        input=ModelInput(
            height=probed.height,
            width=probed.width,
            mode="L" if probed.channels == 1 else "RGB",
            resize=config.model_resize,
            crop_pct=config.crop_pct,
            interpolation=config.model_interpolation,
        ),
        mean=wanted.mean,
        std=wanted.std,
        batch_size=probed.batch_size,
        num_outputs=probed.num_outputs,
        places=places,
        extra_classes=extra,
        missing_classes=tuple(name for name in classes if file.names is not None and name not in file.names),
        feature_dtype=config.feature_dtype,
    )


def second_input(target: Target, model: Model) -> ModelInput | None:
    """Return what images become for the model, beside the target; None where that is the same."""
    wanted = model.input
    is_same = (wanted.height, wanted.width, wanted.mode) == (target.height, target.width, target.mode)
    is_plain = (wanted.resize, wanted.crop_pct, wanted.interpolation) == ("squash", 1.0, "bilinear")
    return None if is_same and is_plain else wanted


def describe_model(
    config: Config, model: Model | None, counts: ImageCounts, seconds: Mapping[str, float]
) -> dict[str, Any] | None:
    """Say for `run.json` what the model is, how it was run, and how fast; None without one."""
    if model is None or config.model is None:
        return None
    # While images came; what was spent on the last ones of all, when none came any more, counts too.
    share = min(1.0, max((busy_s for _, busy_s in counts.runs), default=0.0) / (seconds["decode"] + seconds["means"]))
    return {
        "file": without_secrets(config.model),
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in model.identity.items()
            if name != "places"
        },
        "num_images": sum(number for number, _ in counts.runs),
        "images_per_s": sum(number / busy_s for number, busy_s in counts.runs if busy_s > 0),
        "busy_share": share,
        "limit": "model" if share >= _LIMIT_SHARE else "decoding",
    }
