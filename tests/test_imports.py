"""pandas is left out by who does not use it, and by nobody else."""

import os
import subprocess
import sys

import pytest
from builders import ROOT

_CONVERT = "pa.array(['a']), pa.scalar(1), pa.array([1]).to_numpy(); print('converted'); import pandas"


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        (f"leave_pandas_out(); leave_pandas_out(); {_CONVERT}", "converted\npandas is imported\n"),
        (f"pa.array([0]); leave_pandas_out(); {_CONVERT}", "pandas is imported\nconverted\n"),  # it is too late
        (_CONVERT, "pandas is imported\nconverted\n"),
    ],
)
def test_pyarrow_does_not_import_pandas_and_others_can(tmp_path, program, shown):
    (tmp_path / "pandas.py").write_text("print('pandas is imported')\n__version__ = '0.1'\n")
    program = f"import pyarrow as pa; from pipeline.driver.imports import leave_pandas_out; {program}"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == shown
