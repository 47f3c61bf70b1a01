"""The README's recipes for models of timm and torchvision, with random weights: nothing is downloaded."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import ROOT
from PIL import Image
from test_job import evaluate

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
RECIPES = re.findall(r"```py\n(import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images of several sizes, in colour, of 1,000 classes of which two have images."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, numbers in (("train", range(2)), ("valid", range(6))):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in numbers:
                shape = (int(random.integers(90, 400)), int(random.integers(90, 400)), 3)
                grid = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
                grid.resize(shape[1::-1], Image.Resampling.BICUBIC).save(root / split / name / f"{number}.png")
    return root


def follow(recipe, library, monkeypatch, folder):
    """Do what a recipe says, in a folder, with random weights."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names = {}
    code = recipe.replace("pretrained=True", "pretrained=False").replace("weights=weights", "weights=None")
    exec(compile(code, f"README.md, {library}", "exec"), names)
    return names


def check(root, folder, names, transform):
    """Compare the job's probabilities with those of plain torch and the library's own transform."""
    (folder / "classes.txt").write_text("\n".join(["a", "b", *(f"other {number}" for number in range(998))]))
    options = {"model": "model.pt2", "model_classes": "classes.txt", "scores": "all", **names["options"]}
    evaluate(root, folder / "out", epochs=0, neighbors=0, **options)
    for row in pq.read_table(folder / "out" / "predictions").to_pylist():
        with torch.inference_mode():
            logits_O = names["net"](transform(Image.open(root / row["key"]).convert("RGB"))[None])[0]
        expected = torch.log_softmax(logits_O, 0).numpy()
        np.testing.assert_allclose(np.log(row["model_scores"]), expected, atol=2e-5)


def test_the_recipe_for_timm_is_what_timm_does(photographs, tmp_path, monkeypatch):
    timm_data = pytest.importorskip("timm.data", reason="timm needs a torchvision of this torch's version")
    names = follow(RECIPES[0], "timm", monkeypatch, tmp_path)
    transform = timm_data.create_transform(**timm_data.resolve_data_config(names["cfg"]))
    check(photographs, tmp_path, names, transform)


def test_the_recipe_for_torchvision_is_what_torchvision_does(photographs, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="needs a torchvision of this torch's version")
    names = follow(RECIPES[1], "torchvision", monkeypatch, tmp_path)
    check(photographs, tmp_path, names, names["weights"].transforms())


def test_there_is_a_recipe_for_each():
    assert [recipe.splitlines()[0] for recipe in RECIPES] == ["import timm, torch", "import torch, torchvision"]
