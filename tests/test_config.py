import dataclasses
import math
import re
from datetime import UTC, datetime

import pytest

from pipeline.config import MAX_SIDE, Config
from pipeline.errors import OptionError

REFUSED = [
    ({"data": ""}, r"--data: expected a name, folder or URI, got nothing"),
    ({"out": ""}, r"--out: expected a folder or URI, got nothing"),
    ({"classes": ("3",)}, r"--classes: expected at least two classes, got 3;"),
    ({"classes": ("3", "7", "3")}, r"--classes: expected each class once, got 3,7,3;"),
    ({"classes": ("3", "", "7")}, r"--classes: expected each class once, got 3,,7;"),
    ({"classes": ("",)}, r"--classes: expected each class once"),
    ({"train_split": ""}, r"--train-split: expected the name of a folder in the dataset, got '';"),
    ({"train_split": "a/b"}, r"--train-split: expected the name of a folder in the dataset, got 'a/b';"),
    ({"train_split": "."}, r"--train-split: expected the name of a folder in the dataset, got '\.';"),
    ({"valid_split": ".."}, r"--valid-split: expected the name of a folder in the dataset, got '\.\.';"),
    ({"valid_split": "/"}, r"--valid-split: expected the name of a folder in the dataset, got '/';"),
    ({"valid_split": "train"}, r"--valid-split: expected another folder than --train-split, got train for both;"),
    ({"valid_fraction": 0.0}, r"--valid-fraction: expected a number between 0 and 1, got 0\.0;"),
    ({"valid_fraction": 1.0}, r"--valid-fraction: expected a number between 0 and 1, got 1\.0;"),
    ({"valid_fraction": 20.0}, r"--valid-fraction: expected a number between 0 and 1, got 20\.0;"),
    ({"valid_fraction": -0.1}, r"--valid-fraction: expected a number between 0 and 1, got -0\.1;"),
    ({"valid_fraction": math.nan}, r"--valid-fraction: expected a number between 0 and 1, got nan;"),
    ({"mode": "CMYK"}, r"--mode: expected one of auto, L, RGB, got CMYK;"),
    ({"mode": "rgb"}, r"--mode: expected one of auto, L, RGB, got rgb;"),
    ({"epochs": -1}, r"--epochs: expected 0 or more, got -1;"),
    ({"learning_rate": 0.0}, r"--learning-rate: expected auto, or a positive number, got 0\.0;"),
    ({"learning_rate": -0.1}, r"--learning-rate: expected auto, or a positive number, got -0\.1;"),
    ({"learning_rate": math.inf}, r"--learning-rate: expected auto, or a positive number, got inf;"),
    ({"learning_rate": math.nan}, r"--learning-rate: expected auto, or a positive number, got nan;"),
    ({"seed": -1}, r"--seed: expected 0 to 2\^63 - 1, got -1;"),
    ({"seed": 2**63}, r"--seed: expected 0 to 2\^63 - 1, got 9223372036854775808;"),
    ({"target_accuracy": 0.0}, r"--target-accuracy: expected a number above 0, up to 1, got 0\.0;"),
    ({"target_accuracy": 98.0}, r"--target-accuracy: expected a number above 0, up to 1, got 98\.0;"),
    ({"target_accuracy": math.nan}, r"--target-accuracy: expected a number above 0, up to 1, got nan;"),
    ({"patience": 0}, r"--patience: expected 1 epoch or more, got 0;"),
    ({"max_seconds": 0.0}, r"--max-seconds: expected a positive number, got 0\.0;"),
    ({"max_seconds": -5.0}, r"--max-seconds: expected a positive number, got -5\.0;"),
    ({"max_seconds": math.inf}, r"--max-seconds: expected a positive number, got inf;"),
    ({"max_seconds": math.nan}, r"--max-seconds: expected a positive number, got nan;"),
    ({"lanes": 0}, r"--lanes: expected 1 to 1024, got 0;"),
    ({"lanes": 1025}, r"--lanes: expected 1 to 1024, got 1025;"),
    ({"batch_size": 0}, r"--batch-size: expected a multiple of --lanes 8, got 0; the nearest is 8"),
    ({"batch_size": -8}, r"--batch-size: expected a multiple of --lanes 8, got -8; the nearest is 8"),
    ({"batch_size": 4}, r"--batch-size: expected a multiple of --lanes 8, got 4; the nearest is 8"),
    ({"batch_size": 100}, r"--batch-size: expected a multiple of --lanes 8, got 100; the nearest is (96|104)"),
    ({"batch_size": 130}, r"--batch-size: expected a multiple of --lanes 8, got 130; the nearest is 128"),
    ({"batch_size": 128, "lanes": 3}, r"--batch-size: expected a multiple of --lanes 3, got 128; the nearest is 129"),
    ({"shard_images": 0}, r"--shard-images: expected auto, or 1 or more, got 0;"),
    ({"actors": 0}, r"--actors: expected auto, or 1 or more, got 0;"),
    ({"actors": -2}, r"--actors: expected auto, or 1 or more, got -2;"),
    ({"actors": 9}, r"--actors: expected at most one for each of 8 lanes, got 9; raise --lanes"),
    ({"device": "tpu"}, r"--device: expected one of auto, cpu, cuda, got tpu;"),
    ({"gpus_per_actor": 0.0}, r"--gpus-per-actor: expected a number above 0, up to 1, got 0\.0;"),
    ({"gpus_per_actor": 2.0}, r"--gpus-per-actor: expected a number above 0, up to 1, got 2\.0;"),
    ({"gpus_per_actor": math.nan}, r"--gpus-per-actor: expected a number above 0, up to 1, got nan;"),
    ({"overwrite": True, "resume": True}, r"--resume: expected no --overwrite beside it, got both;"),
]
BAD_SIZES = ["", "28", "x", "28x", "x28", "28x28x3", "0x28", "28x0", "-1x28", "28X28", "28 x 28", "28,28", "²x2", "٣x٣",
             "4097x1", "1x4097", "1e3x5", "Auto"]  # fmt: skip
ACCEPTED = [
    {"classes": ("3", "7")},
    {"train_split": "training", "valid_split": "holdout"},
    {"train_split": "valid", "valid_split": "train"},
    {"valid_fraction": 1e-9},
    {"valid_fraction": 0.999},
    {"mode": "L"},
    {"mode": "RGB"},
    {"epochs": 0},
    {"learning_rate": 1e-300},
    {"seed": 2**63 - 1},
    {"target_accuracy": 1.0},
    {"patience": 1},
    {"max_seconds": 0.001},
    {"lanes": 1, "batch_size": 1},
    {"lanes": 1024, "batch_size": 1024, "actors": 1024},
    {"actors": 8},
    {"shard_images": 1},
    {"device": "cuda", "gpus_per_actor": 0.5},
    {"overwrite": True},
    {"resume": True},
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_value_that_cannot_be_used_is_refused_by_its_option(options, message):
    with pytest.raises(OptionError, match=message):
        Config(**options)


@pytest.mark.parametrize("size", BAD_SIZES)
def test_a_size_that_is_no_size_is_refused(size):
    with pytest.raises(
        OptionError, match=re.escape(f"--size: expected auto, or HxW with sides of 1 to 4096, got {size}")
    ):
        Config(size=size)


def test_a_size_of_thousands_of_digits_is_refused_like_any_other():
    with pytest.raises(OptionError, match=r"--size: expected auto, or HxW"):
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


@pytest.mark.parametrize("options", [options for options, _ in REFUSED] + [{"size": size} for size in BAD_SIZES])
def test_every_refusal_is_one_line_that_says_what_to_do(options):
    with pytest.raises(OptionError, match=r"\A--[a-z-]+: expected [^\n]+, got [^\n]*; [^\n]+\Z"):
        Config(**options)


def test_results_go_to_a_folder_named_by_the_time_unless_said_otherwise():
    before, out, after = datetime.now(UTC), Config().out, datetime.now(UTC)
    started = datetime.strptime(out, "results/%Y-%m-%dT%H-%M-%S.%fZ").replace(tzinfo=UTC)
    assert before.replace(microsecond=0) <= started <= after


def test_a_config_cannot_be_changed_past_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError, match="lanes"):
        Config().lanes = 0


def test_a_changed_copy_is_checked_again():
    with pytest.raises(OptionError, match=r"--lanes: expected 1 to 1024, got 0"):
        dataclasses.replace(Config(), lanes=0)
