"""Models as users export them: small networks of torch, saved by `torch.export`, and the digits as tensors."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from builders import ROOT
from PIL import Image
from torch import nn

DIGITS = ROOT / "pipeline" / "data" / "digits.parquet"


def save(net, path, shape=(1, 8, 8), batch=None, inputs=None, training=False):
    """Export a network for images of a shape [C, H, W], for any batch or one of a fixed size; return the path."""
    inputs = (torch.rand(batch or 2, *shape),) if inputs is None else inputs
    dynamic = tuple({0: torch.export.Dim("n")} for _ in inputs) if batch is None else None
    exported = torch.export.export(net.train(training), inputs, dynamic_shapes=dynamic)
    torch.export.save(exported, path)
    return Path(path)


def save_bytes(net, **options):
    """Do the same in memory; return the file's bytes."""
    buffer = io.BytesIO()
    buffer.name = "model.pt2"
    inputs = options.pop("inputs", None) or (torch.rand(options.get("batch") or 2, *options.pop("shape", (1, 8, 8))),)
    dynamic = None if options.get("batch") else tuple({0: torch.export.Dim("n")} for _ in inputs)
    net.train(options.get("training", False))
    torch.export.save(torch.export.export(net, inputs, dynamic_shapes=dynamic), buffer)
    return buffer.getvalue()


@cache
def digits(split):
    """The sample's images of a split, uint8 [N, 8, 8], their labels, int64 [N], and keys, in the order of the files."""
    rows = [row for row in pq.read_table(DIGITS).to_pylist() if row["key"].startswith(split)]
    images = np.stack([np.array(Image.open(io.BytesIO(row["image"]))) for row in rows])
    labels = torch.tensor([int(row["key"].split("/")[1]) for row in rows])
    return torch.from_numpy(images), labels, [row["key"] for row in rows]


def to_inputs(images_NHW):
    """Pixels as a network takes them: float32 [N, 1, H, W], 0 to 1."""
    return images_NHW[:, None].float().div(255)


def train_digits(num_epochs=12):
    """A small convolutional network, as it was after some epochs on the digits: its body, and the body with a head."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
    )  # fmt: skip
    net = nn.Sequential(body, nn.Linear(64, 10))
    images_NHW, labels_N, _ = digits("train")
    inputs_N1HW, optimizer = to_inputs(images_NHW), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(labels_N)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs_N1HW[rows]), labels_N[rows]).backward()
            optimizer.step()
    return body.eval(), net.eval()
