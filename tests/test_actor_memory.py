"""What an actor holds beside its images, at every moment of a job: measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import ROOT

from pipeline.compute.actor import LaneActor
from pipeline.plan import LaneAssignment, Plan
from pipeline.target import Target

_NUM_TRAIN, _NUM_VALID, _SHARD_IMAGES = 1000, 64, 500
_MOST = 3  # times the parameters


def make_actor(target, num_classes):
    """An actor of two threads, with nothing as yet."""
    lanes = LaneAssignment(_NUM_TRAIN, 8)
    plan = Plan(
        target=target,
        num_classes=num_classes,
        assignment=lanes,
        part_sizes=(_NUM_VALID,),
        has_training=True,
        batch_size=64,
        learning_rate=None,
        seed=0,
        gpus_per_actor=1.0,
    )
    return plan, LaneActor(plan, 0, 1, is_on_gpu=False, num_threads=2)


def make_shards(target, num_images, num_classes):
    """Tables of noise, with the row at which each begins."""
    random = np.random.default_rng(0)
    for start in range(0, num_images, _SHARD_IMAGES):
        rows_N = np.arange(min(_SHARD_IMAGES, num_images - start))
        images_NHWC = random.integers(0, 256, (len(rows_N), target.height, target.width, 3), np.uint8)
        columns = {
            "row": pa.array(rows_N, pa.int32()),
            "key": pa.array([str(row) for row in rows_N]),
            "class": pa.array((start + rows_N) % num_classes, pa.int32()),
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images_NHWC),
        }
        yield start, pa.table(columns)


def run(target, num_classes, step):
    """Do a whole job, as the driver asks for it; `step` is called with the name of each part of it, and does it."""
    plan, actor = step("start", lambda: make_actor(target, num_classes))

    def feed():
        for start, table in make_shards(target, _NUM_TRAIN, num_classes):
            actor.add_train(start, table)
        for start, table in make_shards(target, _NUM_VALID, num_classes):
            actor.add_valid(0, start, table)

    def in_pieces(give, take=lambda first, piece: None, size=1):
        first = 0
        while first < num_classes:
            piece = give(first)
            take(first, piece)
            first += piece.size // size

    both = 2 * (plan.num_values + 1)
    step("feed", feed)
    step("finish_means", actor.finish_means)
    step("means_from", lambda: in_pieces(actor.means_from, size=plan.num_values))
    step("begin_training", actor.begin_training)
    step("train_epoch", lambda: actor.train_epoch(1))
    step("params_from", lambda: in_pieces(actor.params_from, size=both))
    step("load_params", lambda: in_pieces(actor.params_from, actor.load_params, both))
    step("train_epoch again", lambda: actor.train_epoch(2))
    step("score_part", lambda: actor.score_part(0))
    return plan


def measure():
    """Print what each part of a job takes at most, as multiples of the parameters, as JSON."""
    run(Target(16, 16, "RGB"), 100, lambda name, do: do())
    target, num_classes, peaks = Target(64, 64, "RGB"), 1000, {}
    before = resident("VmRSS")

    def watch(name, do):
        Path("/proc/self/clear_refs").write_text("5")
        done = do()
        peaks[name] = resident("VmHWM") - before
        return done

    plan = run(target, num_classes, watch)
    num_bytes = 4 * num_classes * (plan.num_values + 1)
    return json.dumps({name: (peak - plan.held_bytes * (name != "start")) / num_bytes for name, peak in peaks.items()})


def resident(what):
    """Resident bytes of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by /proc")
def test_an_actor_holds_three_times_the_parameters_beside_its_images_at_most():
    command = [sys.executable, "-c", "import test_actor_memory; print(test_actor_memory.measure())"]
    # What is freed goes back at once: what allocators keep of it differs from run to run by half of the parameters.
    allocators = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "tests", env=allocators)
    peaks = json.loads(done.stdout)
    assert max(peaks.values()) <= _MOST, peaks
    assert peaks["train_epoch"] > 2  # the parameters and their mean, else this measures nothing
