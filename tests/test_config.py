import dataclasses
import math
import re
from datetime import UTC, datetime

import numpy as np
import pytest

from pipeline.config import MAX_SIDE, Config
from pipeline.errors import OptionError

# Option, what it expects, and the values that it refuses; where a message shows a value otherwise, with what it says.
FOLDER, SHARE = "the name of a folder in the dataset", "a number between 0 and 1"
RATE, BATCH = "auto, or a positive number", "a multiple of --lanes 8"
BY_OPTION = [
    ("data", "a name, folder or URI", {"": "nothing"}),
    ("out", "a folder or URI", {"": "nothing"}),
    ("classes", "each class once", {("3", "7", "3"): "3,7,3", ("3", "", "7"): "3,,7", ("",): "nothing"}),
    ("train_split", FOLDER, {"": "''", "a/b": "'a/b'", ".": "'.'"}),
    ("valid_split", FOLDER, {"..": "'..'", "/": "'/'"}),
    ("valid_split", "another folder than --train-split", {"train": "train for both"}),
    ("exclude_classes", "each class once", {("3", "3"): "3,3"}),
    ("incomplete_classes", "error or drop", ("keep",)),
    ("address", "the cluster's own address", ("http://127.0.0.1:8265", "10.0.0.1:8265", "ray://h:10001", "h:10001")),
    ("address", "auto, local or a host and a port", {"10.0.0.1": "'10.0.0.1'", "h:99999": "'h:99999'", "h:x": "'h:x'"}),
    ("address", "auto, local or a host and a port", {":6379": "':6379'", "h:1 ": "'h:1 '", "h:0": "'h:0'"}),
    ("data", "a text", {None: "None", 1.5: "1.5", b"a": "b'a'", True: "True"}),
    ("train_split", "a text", {None: "None", ("a", "b"): "('a', 'b')"}),
    ("mode", "a text", {None: "None"}),
    *((name, "a text", {"": "nothing"}) for name in ("cache", "scratch", "address", "label_column", "image_column")),
    ("size", "a text", {(28, 28): "(28, 28)"}),
    ("classes", "names of classes", {"3": "'3'", 3: "3", None: "None", b"3": "b'3'"}),
    ("exclude_classes", "a text", {("3", None): "None", ("3", 7.5): "7.5"}),
    ("epochs", "a whole number", {"3": "'3'", None: "None", 2.5: "2.5", True: "True"}),
    ("actors", "a whole number", {"2": "'2'", 2.0: "2.0"}),
    ("valid_fraction", "a number", {"0.2": "'0.2'", True: "True", (0.2,): "(0.2,)"}),
    ("learning_rate", "a number", {"auto": "'auto'"}),
    ("learning_rate", RATE, (10**400,)),
    ("cache_gib", "a number", {"1": "'1'"}),
    ("overwrite", "True or False", {1: "1", "yes": "'yes'", None: "None"}),
    ("valid_fraction", SHARE, (0.0, 1.0, 20.0, -0.1, math.nan)),
    ("mode", "one of auto, L, RGB", ("CMYK", "rgb")),
    ("epochs", "0 or more", (-1,)),
    ("learning_rate", RATE, (0.0, -0.1, math.inf, math.nan)),
    ("seed", "0 to 2^63 - 1", (-1, 2**63)),
    ("target_accuracy", "a number above 0, up to 1", (0.0, 98.0, math.nan)),
    ("patience", "1 epoch or more", (0,)),
    ("max_seconds", "a positive number", (0.0, -5.0, math.inf, math.nan)),
    ("lanes", "1 to 1024", (0, 1025)),
    ("batch_size", BATCH, {0: "0; the nearest is 8", -8: "-8; the nearest is 8", 4: "4; the nearest is 8"}),
    ("batch_size", BATCH, {100: "100; the nearest is ", 130: "130; the nearest is 128"}),
    ("shard_images", "auto, or 1 or more", (0,)),
    ("actors", "auto, or 1 or more", (0, -2)),
    ("actors", "at most one for each of 8 lanes", (9,)),
    ("device", "one of auto, cpu, cuda", ("tpu",)),
    ("gpus_per_actor", "a number above 0, up to 1", (0.0, 2.0, math.nan)),
]
BAD_SIZES = ["", "0", "4097", "x", "28x", "x28", "28x28x3", "0x28", "28x0", "-1x28", "28X28", "28 x 28", "28,28",
             "²x2", "٣x٣", "4097x1", "1x4097", "1e3x5", "Auto"]  # fmt: skip
REFUSED = [
    ({name: value}, f"--{name.replace('_', '-')}: expected {expected}, got {shown}")
    for name, expected, values in BY_OPTION
    for value, shown in (values.items() if isinstance(values, dict) else zip(values, values, strict=True))
] + [
    ({"batch_size": 128, "lanes": 3}, "--batch-size: expected a multiple of --lanes 3, got 128; the nearest is 129"),
    ({"overwrite": True, "resume": True}, "--resume: expected no --overwrite beside it, got both"),
    *(({"size": size}, f"--size: expected auto, or HxW with sides of 1 to 4096, got {size}") for size in BAD_SIZES),
]
ACCEPTED = [
    {"classes": ("3", "7")}, {"classes": ("3",)}, {"address": "10.0.0.1:6379"}, {"address": "auto"},
    {"address": "local"}, {"address": "head.example.org:6379"}, {"address": "[::1]:6379"}, {"address": "ray://h:6379"},
    {"train_split": "training", "valid_split": "holdout"},
    {"train_split": "valid", "valid_split": "train"}, {"valid_fraction": 1e-9}, {"valid_fraction": 0.999},
    {"mode": "L"}, {"mode": "RGB"}, {"epochs": 0}, {"learning_rate": 1e-300}, {"seed": 2**63 - 1},
    {"target_accuracy": 1.0}, {"patience": 1}, {"max_seconds": 0.001}, {"lanes": 1, "batch_size": 1},
    {"lanes": 1024, "batch_size": 1024, "actors": 1024}, {"actors": 8}, {"shard_images": 1},
    {"device": "cuda", "gpus_per_actor": 0.5}, {"overwrite": True}, {"resume": True},
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_value_that_cannot_be_used_is_refused_in_one_line_by_its_option(options, message):
    with pytest.raises(OptionError, match=rf"\A(?=[^\n]+; [^\n]+\Z){re.escape(message)}"):  # with what to do
        Config(**options)


def test_a_size_of_thousands_of_digits_is_refused_like_any_other():
    with pytest.raises(OptionError, match="--size: expected auto, or HxW"):
        Config(size="9" * 5000 + "x28")


@pytest.mark.parametrize("options", ACCEPTED)
def test_the_last_good_values_are_accepted(options):
    config = Config(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("size", "height_width"),
    [("auto", None), ("28x28", (28, 28)), ("1x2", (1, 2)), ("480x640", (480, 640)), ("4096x1", (MAX_SIDE, 1))],
)
def test_a_size_is_height_then_width(size, height_width):
    assert Config(size=size).height_width == height_width


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 8), (12, 8), (20, 8), (127, 8), (1000, 7), (5, 1024), (-3, 2)])
def test_the_batch_size_that_a_refusal_names_is_accepted(batch_size, lanes):
    with pytest.raises(OptionError, match="the nearest is") as refusal:
        Config(batch_size=batch_size, lanes=lanes)
    nearest = int(re.search(r"the nearest is (\d+)", str(refusal.value)).group(1))
    assert Config(batch_size=nearest, lanes=lanes).batch_size == nearest
    assert abs(nearest - batch_size) <= lanes / 2 or nearest == lanes


def test_results_go_to_a_folder_named_by_the_time_unless_said_otherwise():
    before, out, after = datetime.now(UTC), Config().out, datetime.now(UTC)
    started = datetime.strptime(out, "results/%Y-%m-%dT%H-%M-%S.%fZ").replace(tzinfo=UTC)
    assert before.replace(microsecond=0) <= started <= after


def test_a_config_cannot_be_changed_past_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError, match="lanes"):
        Config().lanes = 0


def test_a_changed_copy_is_checked_again():
    with pytest.raises(OptionError, match="--lanes: expected 1 to 1024, got 0"):
        dataclasses.replace(Config(), lanes=0)


def test_what_stands_for_a_text_is_taken(tmp_path):
    config = Config(data=tmp_path, out=tmp_path / "out", classes=[3, 7], size=28)
    assert (config.data, config.out, config.classes) == (str(tmp_path), str(tmp_path / "out"), ("3", "7"))
    assert config.height_width == (28, 28)
    config = Config(epochs=np.int64(3), learning_rate=np.float32(0.5), size=np.int64(28), classes=np.array(["3", "7"]))
    assert [type(value) for value in (config.epochs, config.learning_rate, *config.classes)] == [int, float, str, str]
    assert (config.epochs, config.learning_rate, config.size) == (3, 0.5, "28x28")
    assert Config(size="28").height_width == (28, 28)
