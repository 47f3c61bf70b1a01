"""Training as it stands, written and read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import HISTORY

from pipeline.errors import OutputError
from pipeline.results.checkpoint import Checkpoint, delete_checkpoint, read_checkpoint, write_checkpoint
from pipeline.results.writing import write_table

FINGERPRINT = {"listing": "abc", "--learning-rate": 0.1, "--seed": 2**63 - 1}
CHECKPOINT = Checkpoint(FINGERPRINT, HISTORY, np.zeros(3, np.float32))


def test_a_checkpoint_comes_back_bit_for_bit(output):
    params_P = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    params_P[:4] = [-0.0, np.inf, np.nan, 1e-45]
    write_checkpoint(output, Checkpoint(FINGERPRINT, HISTORY, params_P))
    got = read_checkpoint(output, dict(FINGERPRINT))
    assert (got.fingerprint, got.history) == (FINGERPRINT, HISTORY)
    assert (got.params.dtype, got.params.tobytes()) == (np.float32, params_P.tobytes())


def test_there_is_no_checkpoint_before_an_epoch_or_after_its_deletion(output):
    assert read_checkpoint(output, FINGERPRINT) is None
    delete_checkpoint(output)
    write_checkpoint(output, CHECKPOINT)
    delete_checkpoint(output)
    assert read_checkpoint(output, FINGERPRINT) is None


@pytest.mark.parametrize(
    ("name", "value", "expected", "got"),
    [("listing", "x", "the files", "others"), ("--learning-rate", 0.2, "--learning-rate 0.1", 0.2),
     ("--seed", 0, "--seed 9223372036854775807", 0), ("--lanes", 8, "--lanes None", 8),
     ("--model", "12ab", "the --model", "others")],
)  # fmt: skip
def test_a_checkpoint_of_other_files_or_options_is_refused(output, name, value, expected, got):
    write_checkpoint(output, CHECKPOINT)
    with pytest.raises(OutputError, match=f"^--resume: expected {expected}, .* got {got};"):
        read_checkpoint(output, {**FINGERPRINT, name: value})


def test_what_a_run_was_begun_with_is_needed_to_resume_it_and_its_images_are_not_yet_known(output):
    begun = {**FINGERPRINT, "images": "34cd"}
    write_checkpoint(output, replace(CHECKPOINT, fingerprint=begun))
    assert read_checkpoint(output, FINGERPRINT).fingerprint == begun
    write_checkpoint(output, replace(CHECKPOINT, fingerprint={**begun, "--model": "12ab"}))
    with pytest.raises(OutputError, match=r"^--resume: expected the --model, .* got others;"):
        read_checkpoint(output, FINGERPRINT)


@pytest.mark.parametrize("content", [b"", b"no Parquet at all", None])
def test_what_is_no_checkpoint_is_said_in_one_line(output, content):
    if content is None:
        write_table(output, "checkpoint", pa.table({"params": [1.0]}))
    else:
        (Path(output.root) / "checkpoint.parquet").write_bytes(content)
    with pytest.raises(OutputError, match=r"checkpoint\.parquet: expected a checkpoint") as caught:
        read_checkpoint(output, FINGERPRINT)
    assert "\n" not in str(caught.value)
