"""What the driver needs of Ray, as far as it can be seen without Ray."""

import os
import subprocess
import sys

from conftest import ROOT


def test_pyarrow_does_not_import_pandas_and_others_can(tmp_path):
    (tmp_path / "pandas.py").write_text("print('pandas is imported')\n__version__ = '9.0'\n")
    program = (
        "from pipeline.driver_ray import leave_pandas_out; import pyarrow as pa; leave_pandas_out()\n"
        "pa.array(['a']), pa.scalar(1), pa.array([1]).to_numpy(); print('not yet'); import pandas"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "not yet\npandas is imported\n"
