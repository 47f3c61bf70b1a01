"""A model of ResNet-18's size, exported for the job, and the loop that one writes without it.

Run from `jobs/` as `python -m benchmarks.model NAME REQUEST`.

Input: the name of a loop and an `Images` request as JSON. Output: an `Answer` as JSON, the last line written.
Invariant: the same random weights everywhere.

Axes: N images, B images of a batch, K classes, F features.
"""

# Every peer's time includes the imports here: heavy ones stand inside the functions.
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.request import Answer, Images, class_names, labelled_paths, serve

SIDE, BATCH_SIZE = 224, 32
_WIDTHS, _NUM_CLASSES = (64, 128, 256, 512), 1000


def make_resnet18(num_outputs: int | None = None) -> Any:
    """Make the network of K. He et al., "Deep residual learning for image recognition", CVPR 2016, of 18 layers.

    Returns:
        Its 512 features, or as many outputs as asked for.
    """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, num_inputs: int, num_values: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(num_inputs, num_values, 3, stride, 1, bias=False), nn.BatchNorm2d(num_values), nn.ReLU(),
                nn.Conv2d(num_values, num_values, 3, 1, 1, bias=False), nn.BatchNorm2d(num_values),
            )  # fmt: skip
            self.way = nn.Sequential()
            if stride > 1 or num_inputs != num_values:
                self.way = nn.Sequential(
                    nn.Conv2d(num_inputs, num_values, 1, stride, bias=False), nn.BatchNorm2d(num_values)
                )

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = self.body(values) + self.way(values)
            return added.relu()

    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    num_inputs = _WIDTHS[0]
    for width in _WIDTHS:
        layers += [Block(num_inputs, width, 1 if width == num_inputs else 2), Block(width, width, 1)]
        num_inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if num_outputs is not None:
        layers.append(nn.Linear(num_inputs, num_outputs))
    return nn.Sequential(*layers).eval()


def export_models(folder: Path, num_classes: int) -> None:
    """Write `resnet18.pt2`, 512 features of 224x224 RGB, and `free.pt2`, logits of 64x64 RGB that cost nothing."""
    import torch
    from torch import nn

    free = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(12, num_classes)).eval()
    for name, net, side in (("resnet18", make_resnet18(), SIDE), ("free", free, 64)):
        n = {0: torch.export.Dim("n")}
        exported = torch.export.export(net, (torch.rand(2, 3, side, side),), dynamic_shapes=(n,))
        torch.export.save(exported, folder / f"{name}.pt2")


def model_loop(images: Images) -> Answer:
    """Compute features of all images by a `DataLoader` of two workers and the model in eager mode; nearest means.

    Source: https://docs.pytorch.org/docs/stable/data.html#multi-process-data-loading
    """
    import torch
    from torch.utils.data import DataLoader

    net, num_classes = make_resnet18(), len(class_names(images.data))

    @torch.inference_mode()
    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        files: Any = _Files(split, images)
        loader = DataLoader(files, batch_size=BATCH_SIZE, num_workers=os.cpu_count() or 1)
        rows, labels = zip(*((net(images_BCHW), labels_B) for images_BCHW, labels_B in loader), strict=True)
        return torch.cat(rows), torch.cat(labels)

    train_NF, train_N = features("train")
    valid_NF, valid_N = features("valid")
    means_KF = torch.stack([train_NF[train_N == label].mean(0) for label in range(num_classes)])
    num_correct = int((torch.cdist(valid_NF, means_KF).argmin(1) == valid_N).sum())
    return Answer(len(train_N) + len(valid_N), num_correct, len(valid_N), float(train_NF.double().mean()))


class _Files:
    """The files of a split as the map-style dataset of a `DataLoader`: float32 [3, H, W], 0 to 1, and labels."""

    def __init__(self, split: str, images: Images) -> None:
        import numpy as np

        paths, self._labels_N = labelled_paths(images.data, split)
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        import numpy as np
        import torch
        from PIL import Image

        image = Image.open(os.fsdecode(self._paths[row])).convert("RGB")
        pixels_HWC = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).copy()
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).float().div_(255), int(self._labels_N[row])


LOOPS: dict[str, Callable[[Images], Answer]] = {"model_loop": model_loop}


if __name__ == "__main__":
    serve(LOOPS, Images)
