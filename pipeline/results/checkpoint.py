"""Training as it stands after an epoch, kept so that an interrupted run can be resumed.

Input: parameters, history and a fingerprint of what they depend on. Output: one Parquet file in the results' folder.
Invariant: a checkpoint is only read by a run with the same fingerprint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.storage import reason
from pipeline.errors import OutputError, without_secrets
from pipeline.results.figures import EpochMetric
from pipeline.results.writing import CHECKPOINT_FILE, Output, write_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Training as it stands after an epoch.

    Attributes:
        fingerprint: What must be equal for the training to go on: data, options, seed.
        history: A row an epoch.
        params: float32, as the actors take them again.
    """

    fingerprint: dict[str, Any]
    history: list[EpochMetric]
    params: npt.NDArray[np.float32]


def write_checkpoint(output: Output, checkpoint: Checkpoint) -> None:
    """Keep training as it stands; `--resume` goes on from here."""
    metadata = {
        "fingerprint": json.dumps(checkpoint.fingerprint),
        "history": json.dumps([asdict(row) for row in checkpoint.history]),
    }
    schema = pa.schema([("params", pa.float32())], metadata=metadata)
    table = pa.table([checkpoint.params], schema=schema)
    # As it is: parameters hardly repeat, and actors that train want the CPU.
    write = partial(pq.write_table, table, compression="none", use_dictionary=False)
    write_file(output, CHECKPOINT_FILE, write)


def read_checkpoint(output: Output, fingerprint: dict[str, Any]) -> Checkpoint | None:
    """Read where an unfinished training stood; None if it had not finished an epoch.

    Raises:
        OutputError: If it was begun on other data or with other options.
    """
    store, root = output.store
    path = f"{root}/{CHECKPOINT_FILE}"
    try:
        entry = store.find(path)
        if entry is None:
            return None
        table = pq.read_table(pa.BufferReader(store.read_range(path, 0, entry.size)))
        was: dict[str, Any] = json.loads(table.schema.metadata[b"fingerprint"])
    except (pa.ArrowInvalid, TypeError, KeyError, OSError) as exc:
        raise OutputError(
            f"{output.root}/{CHECKPOINT_FILE}: expected a checkpoint of this job, got {exc}; give --overwrite"
        ) from exc
    # What one of them has not counts too. The images are looked at once they are decoded.
    names = [name for name in dict.fromkeys([*fingerprint, *was]) if name != "images"]
    if different := [name for name in names if was.get(name) != fingerprint.get(name)]:
        name = different[0]
        expected, got = f"{name} {was.get(name)}", fingerprint.get(name)
        if name in ("listing", "--scores", "--model"):  # two digests tell nobody anything
            what = "files" if name == "listing" else name
            expected, got = f"the {what}", "others"
        raise OutputError(
            f"--resume: expected {expected}, with which {output.root} was begun, got {got}; "
            "run with the same data and options, or give --overwrite"
        )
    history = [EpochMetric(**row) for row in json.loads(table.schema.metadata[b"history"])]
    return Checkpoint(was, history, table["params"].to_numpy())


def delete_checkpoint(output: Output) -> None:
    """Remove what only an unfinished run needs."""
    store, root = output.store
    try:
        store.delete(f"{root}/{CHECKPOINT_FILE}")
    except OSError as exc:  # the results are whole all the same
        shown = without_secrets(output.root)
        logger.warning("%s/%s: expected to remove it, got %s", shown, CHECKPOINT_FILE, reason(exc))
