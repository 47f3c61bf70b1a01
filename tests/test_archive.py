"""Exported programs read without torch's own loader: the same bits, and None for what only that can read."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from models import save_bytes
from torch import nn
from torch.nn import functional

from pipeline.compute.archive import read_archive

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_in_an_actor(one_thread):
    """One thread inside torch."""


class Net(nn.Module):
    """A network of a function of its layers and its one input, [N, 3, 16, 16]."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), function
        self.register_buffer("shift", torch.rand(3, 1, 1).to(memory_format=torch.preserve_format))
        self.token = nn.Parameter(torch.rand(1, 1, 48))

    def forward(self, images):
        return self.function(self, self.layers, images)


def convolve(net, layers, images):
    return layers["last"](layers["body"](images - net.shift).mean((2, 3)))


def attend(net, layers, images):
    """What a vision transformer does: patches, a token before them, attention, and the token's own output."""
    patches = layers["patch"](images).flatten(2).transpose(1, 2)
    rows = torch.cat([net.token.expand(images.shape[0], -1, -1), patches], 1)
    query, key, value = layers["mix"](layers["norm"](rows)).chunk(3, 2)
    heads = [each.reshape(images.shape[0], -1, 4, 12).transpose(1, 2) for each in (query, key, value)]
    mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(images.shape[0], -1, 48)
    return layers["last"](functional.gelu(rows + mixed)[:, 0])


def resize(net, layers, images):
    large = functional.interpolate(images, scale_factor=2, mode="bilinear", antialias=False)
    some = functional.max_pool2d(functional.pad(large, (1, 1, 1, 1), value=float("-inf")), 3, 2)
    first, second = torch.split(some.flatten(1), [400, 368], 1)
    values, _ = torch.cat([first, second], 1).topk(10)
    return torch.where(values > 0.5, values, torch.full_like(values, torch.inf)).clamp(max=9).masked_fill(values < 0, 0)


def make(name):
    torch.manual_seed(0)
    if name == "attention":
        layers = {"patch": nn.Conv2d(3, 48, 4, 4), "mix": nn.Linear(48, 144), "norm": nn.LayerNorm(48)}
        return Net(attend, **layers, last=nn.Linear(48, 10))
    if name == "operations":
        return Net(resize)
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, groups=16),
        nn.Dropout(), nn.GroupNorm(4, 16), nn.Hardswish(), nn.MaxPool2d(2),
    )  # fmt: skip
    net = Net(convolve, body=body, last=nn.Linear(16, 10))
    return net.to(memory_format=torch.channels_last) if name == "channels last" else net


@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")  # torch, of strides when it saves
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("name", ["convolutions", "channels last", "attention", "operations"])
def test_what_is_read_computes_the_same_bits_as_what_torch_loads(name, batch):
    content = save_bytes(make(name), shape=(3, 16, 16), batch=batch)
    found = read_archive(content, CPU)
    assert found is not None
    assert found.shape[1:] == [3, 16, 16]
    assert found.shape[0] == batch or (batch is None and isinstance(found.shape[0], str))
    loaded = torch.export.load(io.BytesIO(content)).module()
    images = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(found.call(images), loaded(images))


def test_other_shapes_are_refused_as_torch_does():
    net, sizes = make("convolutions"), {0: torch.export.Dim("n", min=2, max=5)}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(net.eval(), (torch.rand(3, 3, 16, 16),), dynamic_shapes=(sizes,)), buffer)
    loaded, found = torch.export.load(buffer).module(), read_archive(buffer.getvalue(), CPU)
    for shape in ((2, 3, 16, 16), (5, 3, 16, 16)):
        assert found.call(torch.rand(shape)).shape == loaded(torch.rand(shape)).shape
    for shape in ((6, 3, 16, 16), (3, 3, 16, 17)):
        with pytest.raises((RuntimeError, AssertionError)):
            loaded(torch.rand(shape))
        with pytest.raises(ValueError, match="expected the shape"):
            found.call(torch.rand(shape))


def changed(content, name, change):
    """The same archive with one of its files, JSON, changed."""
    old, new = io.BytesIO(content), io.BytesIO()
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for each in source.namelist():
            content = source.read(each)
            if each.endswith(name):
                values = json.loads(content)
                change(values)
                content = json.dumps(values).encode()
            target.writestr(each, content)
    return new.getvalue()


def of_model(**fields):
    return lambda content: changed(content, "model.json", lambda values: values.update(fields))


def set_pickled(values):
    next(iter(values["config"].values()))["use_pickle"] = True


def set_operator(values):
    values["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.others.conv2d.default"


UNKNOWN = {
    "of another layout": of_model(schema_version={"major": 8, "minor": 21}),
    "of another torch": of_model(torch_version="2.99.0"),
    "with guards": of_model(guards_code=["L['images'].size()[0] % 2 == 0"]),
    "with pickled weights": lambda content: changed(content, "weights_config.json", set_pickled),
    "with operators of others": lambda content: changed(content, "model.json", set_operator),
    "cut off": lambda content: content[:-100],
    "no archive": lambda content: b"hello",
}


@pytest.fixture(scope="module")
def exported():
    return save_bytes(make("convolutions"), shape=(3, 16, 16))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_left_to_torch(kind, exported):
    assert read_archive(exported, CPU) is not None
    assert read_archive(UNKNOWN[kind](exported), CPU) is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, when it exports a branch
@pytest.mark.parametrize(
    "function",
    [
        lambda net, layers, images: (layers["last"](images.flatten(1)), images),
        lambda net, layers, images: layers["last"](images.flatten(1)).argmax(1),
        lambda net, layers, images: {"logits": layers["last"](images.flatten(1))},
        lambda net, layers, images: torch.cond(
            images.sum() > 0, lambda one: one + 1, lambda one: one - 1, (layers["last"](images.flatten(1)),)
        ),
    ],
    ids=["two outputs", "one axis", "a dict", "a branch"],
)
def test_programs_of_another_kind_are_left_to_torch(function):
    content = save_bytes(Net(function, last=nn.Linear(768, 10)), shape=(3, 16, 16))
    assert read_archive(content, CPU) is None


def test_nothing_is_imported_that_torch_imports_to_load(exported, tmp_path):
    (tmp_path / "model.pt2").write_bytes(exported)
    code = (
        "import pathlib, sys, torch\n"
        "from pipeline.compute.program import load_program\n"
        f"load_program(pathlib.Path({str(tmp_path / 'model.pt2')!r}).read_bytes(), torch.device('cpu'))\n"
        "print([name for name in ('sympy', 'torch._dynamo', 'torch._inductor', 'torch.export') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "['torch.export']"
