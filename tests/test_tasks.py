"""What the driver needs of Ray, as far as it can be seen without Ray."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_pyarrow_does_not_import_pandas_and_others_can(tmp_path):
    (tmp_path / "pandas.py").write_text("print('pandas is imported')\n__version__ = '9.0'\n")
    program = (
        "from pipeline.driver.tasks import leave_pandas_out; import pyarrow as pa; leave_pandas_out()\n"
        "pa.array(['a']), pa.scalar(1), pa.array([1]).to_numpy(); print('not yet'); import pandas"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "not yet\npandas is imported\n"


@pytest.mark.parametrize(("has_training", "is_loaded"), [(False, False), (True, True)])
def test_torch_computes_without_what_only_training_needs_and_finds_it_later(has_training, is_loaded):
    program = (
        f"import sys; from pipeline.driver import tasks; tasks._import_torch(has_training={has_training})\n"
        "print('torch._decomp' in sys.modules)\n"
        "from pipeline.compute import actor; from pipeline.compute.classifiers import nearest_mean; import torch\n"
        "sums_KD, _ = nearest_mean.class_sums(torch.tensor([[2], [3]], dtype=torch.uint8), torch.tensor([0, 0]), 1)\n"
        "import torch._meta_registrations; print(int(sums_KD), torch.Generator().initial_seed() > 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{is_loaded}\n5 True\n"
