"""A program that torch exported, without Ray: what is refused, and that batches change no bit."""

import io
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import save_bytes
from torch import nn

from pipeline.compute.program import Runner, load_program, prepare, probe
from pipeline.compute.threads import Threads
from pipeline.errors import ModelError
from pipeline.model import Model, ModelInput, Wanted, match_classes

CPU = torch.device("cpu")
NAMES = 10


@pytest.fixture(autouse=True)
def _as_in_an_actor(one_thread):
    """One thread inside torch."""


class Body(nn.Module):
    """A network of a function of its one input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(64, NAMES)
        self.function = function

    def forward(self, images):
        return self.function(self.linear, images)


class Pair(nn.Module):
    """A network of two inputs."""

    def forward(self, images, others):
        return (images + others).flatten(1)


def logits(linear, images_N1HW):
    return linear(images_N1HW.flatten(1))


def wanted(**changes):
    given = {"output": "logits", "size": None, "default_size": (8, 8), "mean": (0.0,), "std": (1.0,),
             "batch_size": None, "num_names": NAMES, "names_from": "classes of the dataset"}  # fmt: skip
    return Wanted(**{**given, **changes})


def look_at(content, **changes):
    return probe(load_program(content, CPU), wanted(**changes), CPU)


def small_net(channels=1):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def exported():
    return save_bytes(small_net())


def of_another_torch():
    """A file whose layout is of a version that this torch does not know."""
    old, new = io.BytesIO(save_bytes(Body(logits))), io.BytesIO()
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("model.json"):
                content = re.sub(rb'"major": \d+', b'"major": 99', content)
            target.writestr(name, content)
    return new.getvalue()


def scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(small_net(), torch.rand(2, 1, 8, 8)), buffer)
    return buffer.getvalue()


def pickled():
    buffer = io.BytesIO()
    torch.save(small_net().state_dict(), buffer)
    return buffer.getvalue()


BROKEN = {
    "no zip": (lambda: b"hello", {}, "expected a program that torch .* exported, got .*not a zip"),
    "weights alone": (pickled, {}, "expected a program that torch .* exported, got weights alone, or a file"),
    "of another torch": (of_another_torch, {}, "expected a program that torch .* with this version"),
    "two inputs": (
        lambda: save_bytes(Pair(), inputs=(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))),
        {}, r"expected one input, float32 \[N, C, H, W\], got float32 .* and float32",
    ),
    "bytes as input": (
        lambda: save_bytes(
            Body(lambda linear, one: logits(linear, one.float())), inputs=(torch.zeros(2, 1, 8, 8, dtype=torch.uint8),)
        ),
        {}, r"expected one input, float32 \[N, C, H, W\], got uint8",
    ),
    "four channels": (lambda: save_bytes(small_net(4), shape=(4, 8, 8)), {}, r"expected an input of 1 or 3 channels"),
    "flat images": (
        lambda: save_bytes(Body(lambda linear, one: linear(one)), inputs=(torch.rand(2, 64),)),
        {}, r"expected one input, float32 \[N, C, H, W\], got float32 \[s\d+, 64\]",
    ),
    "two outputs": (
        lambda: save_bytes(Body(lambda linear, one: (logits(linear, one), one))), {}, "expected one output, a row",
    ),
    "a map as output": (lambda: save_bytes(nn.Conv2d(1, 10, 3)), {}, "expected one output, a row of numbers"),
    "classes as output": (
        lambda: save_bytes(Body(lambda linear, one: logits(linear, one).argmax(1, keepdim=True))),
        {}, "expected one output, a row of numbers for each image, got int64",
    ),
    "another number of outputs": (
        lambda: save_bytes(small_net()), {"num_names": 3},
        "expected an output for each of 3 classes of the dataset, got 10; give --model-classes",
    ),
    "NaN": (lambda: save_bytes(Body(lambda linear, one: logits(linear, one).log())), {}, "expected numbers for a bat"),
    "features too large": (
        lambda: save_bytes(Body(lambda linear, one: 1e9 * logits(linear, one))),
        {"output": "embedding", "num_names": None}, "expected outputs of at most 65504, got NaN or larger",
    ),
    "dropout": (
        lambda: save_bytes(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)), training=True),
        {}, r"expected the same output of an image .* call model.eval\(\) before the export",
    ),
    "batch norm that learns": (
        lambda: save_bytes(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)), training=True),
        {}, "expected the same output of an image in a batch of another size",
    ),
    "images that see each other": (
        lambda: save_bytes(Body(lambda linear, one: logits(linear, one - one.mean(0, keepdim=True)))),
        {}, "expected the same output of an image",
    ),
    "another size": (
        lambda: save_bytes(Body(logits)), {"size": (16, 16)}, "--model-size: expected 8x8, for which the model was exp",
    ),
    "another batch": (
        lambda: save_bytes(small_net(), batch=4), {"batch_size": 8}, "--model-batch-size: expected 4, with which",
    ),
    "three means for one channel": (
        lambda: save_bytes(small_net()), {"mean": (0.1, 0.2, 0.3)}, "--model-mean: expected a number for each of 1 ch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_one_line(kind):
    make, changes, match = BROKEN[kind]
    with pytest.raises(ModelError, match=match) as caught:
        look_at(make(), **changes)
    assert str(caught.value).startswith("--model")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_no_exported_program():
    with pytest.raises(ModelError, match="expected a program that torch"):
        look_at(scripted())


def test_a_model_says_its_size_channels_and_outputs(exported):
    found = look_at(exported, default_size=(99, 99))
    assert (found.height, found.width, found.channels, found.num_outputs) == (8, 8, 1, 10)
    assert (found.batch_size, found.is_exact) == (32, True)


def test_a_fixed_batch_is_taken():
    assert look_at(save_bytes(small_net(), batch=3)).batch_size == 3


def test_a_model_of_any_size_takes_the_given_one_or_that_of_the_baselines():
    class Pooled(nn.Module):
        def forward(self, images_NCHW):
            return images_NCHW.mean((2, 3))

    buffer, any_size = io.BytesIO(), {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    torch.export.save(torch.export.export(Pooled(), (torch.rand(2, 3, 9, 7),), dynamic_shapes=(any_size,)), buffer)
    for changes, size in (({}, (8, 8)), ({"size": (16, 24)}, (16, 24))):
        found = look_at(buffer.getvalue(), num_names=3, **changes)
        assert (found.height, found.width, found.channels) == (*size, 3)


def make_runner(content, num_threads, output="logits", batch_size=8):
    model = Model("", output, ModelInput(8, 8, "L"), (0.25,), (0.5,), batch_size, 10, tuple(range(10)))
    return Runner(load_program(content, CPU), model, CPU, Threads(num_threads))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("pieces", [[61], [1] * 61, [7, 20, 0, 33, 1]])
def test_how_images_arrive_changes_no_bit(exported, num_threads, pieces):
    images_ND = torch.randint(0, 256, (61, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    runner, taken = make_runner(exported, num_threads), []
    for piece in images_ND.split(pieces):
        runner.put(piece, taken.append)
    runner.flush()
    runner.flush()
    assert sorted(len(each) for each in taken) == sorted(pieces)
    outputs_NO = torch.cat(taken)
    inputs_N1HW = (images_ND.view(-1, 1, 8, 8).float() / 255 - 0.25) / 0.5
    with torch.inference_mode():
        torch.testing.assert_close(outputs_NO, small_net()(inputs_N1HW), rtol=1e-5, atol=1e-6)
        program = load_program(exported, CPU)
        alone_NO = [program.call(torch.cat((one[None], torch.zeros(7, 1, 8, 8))))[0] for one in inputs_N1HW]
    assert torch.equal(outputs_NO, torch.stack(alone_NO))
    assert runner.num_images == 61


def test_outputs_that_are_no_numbers_end_the_job():
    content = save_bytes(
        Body(lambda linear, one: logits(linear, one) / (one.amax((1, 2, 3)) - one.amin((1, 2, 3)))[:, None])
    )
    runner = make_runner(content, 1)
    with pytest.raises(ModelError, match=r"expected outputs of at most .*, got NaN or larger ones for an image"):
        runner.put(torch.full((8, 64), 9, dtype=torch.uint8), lambda outputs: None)


def test_what_a_program_raises_for_some_images_is_one_line():
    def look_up(linear, images_N1HW):
        rows_N = 100 * (images_N1HW.amax((1, 2, 3)) == images_N1HW.amin((1, 2, 3))).long()
        return logits(linear, images_N1HW) + linear.bias[rows_N][:, None]  # of ten

    runner = make_runner(save_bytes(Body(look_up)), 1)
    with pytest.raises(ModelError, match=r"expected it to take images, float32 \[8, 1, .*, got IndexError: "):
        runner.put(torch.full((8, 64), 9, dtype=torch.uint8), lambda outputs: None)


def test_pixels_are_prepared_as_torchvision_does():
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = [
        [
            (channel / np.float32(255) - np.float32(mean[c])) / np.float32(std[c])
            for c, channel in enumerate(image.transpose(2, 0, 1).astype(np.float32))
        ]
        for image in pixels_NHWC
    ]  # fmt: skip
    got = prepare(torch.from_numpy(pixels_NHWC).flatten(1), (4, 5, 3), mean, std, 5)
    assert torch.equal(got[:3], torch.from_numpy(np.array(expected)))
    assert not got[3:].any()
    assert prepare(torch.zeros(2, 64, dtype=torch.uint8), (8, 8, 1), (0,), (1,), 2).stride() == (64, 64, 8, 1)


def test_classes_are_matched_by_their_names():
    places, extra = match_classes(["zebra", "b", "a", "yak"], ["a", "b", "c"])
    assert (places, extra) == ((3, 1, 0, 4), ("zebra", "yak"))


@pytest.mark.parametrize(
    ("names", "match"),
    [(["a", "b", "a"], "expected every name once, got a 2 times"), (["x", "y"], "expected names of the dataset's")],
)
def test_names_that_cannot_be_matched_are_refused(names, match):
    with pytest.raises(ModelError, match=match):
        match_classes(names, ["a", "b"])


def test_what_changes_an_output_is_in_the_identity_of_a_model():
    model = Model("a", "logits", ModelInput(8, 8, "L"), (0.0,), (1.0,), 32, 10, tuple(range(10)))
    changes = {
        "sha256": "b",
        "mean": (0.5,),
        "batch_size": 64,
        "input": ModelInput(8, 8, "L", "crop"),
        "places": (1, 0),
    }
    assert all(replace(model, **{name: value}).identity != model.identity for name, value in changes.items())
    assert replace(model).identity == model.identity
