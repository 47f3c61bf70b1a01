"""Actors without Ray: alone in this process, and several in processes of their own that meet."""

import io
import itertools
import os
import pickle
import random
import select
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from builders import encode
from test_lanes import order_in_a_loop
from torch.nn.functional import cross_entropy

from pipeline import plan as plans
from pipeline.compute import exchange
from pipeline.compute.actor import LaneActor
from pipeline.compute.exchange import TOKEN_BYTES
from pipeline.config import Config
from pipeline.data.files import Location
from pipeline.data.listing import Listing
from pipeline.decoding.shards import Loader, load_shard, shard_owners
from pipeline.errors import ActorLostError, EvaluationError
from pipeline.plan import make_plan
from pipeline.results.figures import epoch_metric
from pipeline.target import Target

HOST = "127.0.0.1"
TOKEN = bytes(range(TOKEN_BYTES))
CLASSES = ("a", "b", "c")
NUM_TRAIN, NUM_VALID = 203, 41
TARGET = Target(4, 5, "L")
# Images that cannot be decoded: among others a whole shard of each split, the first and the last image.
HOLES = {"train": frozenset((0, 6, 7, 8, 9, 10, 202, *range(3, 203, 24))), "valid": frozenset((*range(10), 20, 40))}
ANSWER_SECONDS = 60
CHUNK_BYTES = 5 * TARGET.num_values  # so that a lane has several chunks


@pytest.fixture(autouse=True)
def _as_in_processes(monkeypatch, one_thread):
    """Small chunks and one thread, as in the other processes; an actor sets the threads of its process."""
    monkeypatch.setattr("pipeline.plan._CHUNK_BYTES", CHUNK_BYTES)


def serve():
    """Run one actor at a time: calls come on standard input, answers go to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    plans._CHUNK_BYTES = CHUNK_BYTES
    actor = None
    while True:
        try:
            method, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if method == "start":
                if actor:
                    actor.close()
                *plan_and_rank, scratch = args
                actor, answer = LaneActor(*plan_and_rank, is_on_gpu=False, scratch=scratch), None
            else:
                answer = getattr(actor, method)(*args)
        except EvaluationError as exc:
            answer = exc
        pickle.dump(answer, answers)
        answers.flush()


@pytest.fixture(scope="module")
def processes():
    """A function that gives so many living processes that serve; they end, by their ids, after this module."""
    started = []

    def give(number):
        living = [process for process in started if process.poll() is None][:number]
        command = [sys.executable, "-W", "error", __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        new = [subprocess.Popen(command, **pipes) for _ in range(number - len(living))]
        started.extend(new)
        return living + new

    yield give
    for process in started:
        process.kill()
        process.communicate()


def call(process, method, *args):
    """Send a call; what is returned waits for the answer."""
    process.stdin.write(pickle.dumps((method, args)))
    process.stdin.flush()
    return partial(receive, process)


def receive(process):
    ready, _, _ = select.select([process.stdout], [], [], ANSWER_SECONDS)
    assert ready, f"no answer in {ANSWER_SECONDS} s"
    answer = pickle.load(process.stdout)
    if isinstance(answer, Exception):
        raise answer
    return answer


def as_group(actor):
    """An actor in this process, called as those in others are."""
    return [lambda method, *args: partial(getattr(actor, method), *args)]


def alone(plan, scratch=None):
    """One actor in this process that holds all lanes."""
    return as_group(LaneActor(plan, 0, 1, is_on_gpu=False, scratch=scratch))


def together(started, plan, scratch=None):
    """Actors in processes, in one group."""
    asked = [call(process, "start", plan, rank, len(started), scratch) for rank, process in enumerate(started)]
    assert [answer() for answer in asked] == [None] * len(started)
    group = [partial(call, process) for process in started]
    ask_all(group, "join_group", TOKEN, *ask_all(group, "listen", HOST))
    return group


def ask_all(group, method, *args):
    return [answer() for answer in [actor(method, *args) for actor in group]]


@cache
def make_images(split):
    """Noise with stripes that tell the class: PNG files, pixels [N, D], labels [N]."""
    numbers = np.random.default_rng(len(split))
    labels_N = np.sort(np.arange(NUM_TRAIN if split == "train" else NUM_VALID) % 3)
    noise_NHW = numbers.integers(0, 150, (len(labels_N), TARGET.height, TARGET.width))
    images_NHW = noise_NHW + 80 * (np.arange(TARGET.width) % 3 == labels_N[:, None, None])
    files = [encode(image_HW) for image_HW in images_NHW.astype(np.uint8)]
    return files, images_NHW.reshape(len(labels_N), -1), labels_N


@cache
def make_job(num_actors=1, holes=None, **options):
    """The plan, and for every shard, by rank, the tables that actors get; `holes` are other ones of training."""
    missing = {**HOLES, "train": HOLES["train"] if holes is None else holes}
    location, tables = Location("uri", "memory://data"), {}
    store, root = location.store
    for split in ("train", "valid"):
        files, _, labels_N = make_images(split)
        for row, data in enumerate(files):
            content = b"" if row in missing[split] else data
            store.write(f"{root}/{split}/{row}.png", lambda stream, content=content: stream.write(content))
        keys = pa.array([b"%s/%d.png" % (split.encode(), row) for row in range(len(labels_N))])
        tables[split] = pa.table({"key": keys, "label": pa.array(labels_N, pa.int32())})
    listing = Listing(location, CLASSES, tables["train"], tables["valid"], "valid", {})
    config = Config(**{"shard_images": 3, "batch_size": 32, "epochs": 2, "neighbors": 0, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cuts._MIN_PART_IMAGES", 6)
        plan, cut = make_plan(config, listing, TARGET, 12 * len(CLASSES))
    loader = Loader(location, TARGET, CLASSES, plan.assignment, num_actors, None)
    decoded = []
    for shard in cut:
        is_train = shard.split == "train"
        ranks = shard_owners(plan.assignment, num_actors, shard) if is_train else [shard.part % num_actors]
        rows = tables[shard.split].slice(shard.start, shard.num_images)
        given, _, made = load_shard(loader, shard, rows, None)
        assert len(made.table) + len(made.faults) == shard.num_images
        decoded.append((shard, dict(zip(ranks, given, strict=True))))
    return plan, decoded


def feed(group, decoded):
    for shard, tables in decoded:
        where = (shard.start,) if shard.split == "train" else (shard.part, shard.offset)
        for rank, table in tables.items():
            group[rank](f"add_{shard.split}", *where, table)()


def run(group, plan, decoded, num_epochs=2):
    """Do a whole job: means by actor, the history, parameters after each epoch by actor, the scored parts."""
    feed(group, decoded)
    means = ask_all(group, "finish_means")
    ask_all(group, "begin_training")
    epochs = [ask_all(group, "train_epoch", epoch) for epoch in range(1, num_epochs + 1)]
    return {
        "means": means,
        "history": [replace(epoch_metric([record for record, _ in epoch]), seconds=0) for epoch in epochs],
        "params": [[params_P for _, params_P in epoch] for epoch in epochs],
        "parts": score(group, plan),
    }


def prepared(plan, decoded, params_P=None):
    """One actor that has its images, the means, and is about to train, or has these parameters."""
    [actor] = alone(plan)
    feed([actor], decoded)
    actor("finish_means")()
    begin(actor, params_P)
    return actor


def begin(actor, params_P=None):
    """Begin to train, or go on with these parameters."""
    actor("begin_training")()
    if params_P is not None:
        actor("load_params", 0, params_P)()


def score(group, plan):
    return [group[part % len(group)]("score_part", part)() for part in range(len(plan.part_sizes))]


@cache
def reference():
    """A whole job of one actor."""
    torch.set_num_threads(1)
    return run(alone(make_job()[0]), *make_job())


def assert_same(got, expected):
    """Compare two whole jobs bit by bit."""
    for means in got["means"]:
        np.testing.assert_equal(means, expected["means"][0])
    assert got["history"] == expected["history"]
    np.testing.assert_equal([params[0] for params in got["params"]], [params[0] for params in expected["params"]])
    assert_same_parts(got["parts"], expected["parts"])


def assert_same_parts(got, expected):
    assert len(got) == len(expected)
    for part, other in zip(got, expected, strict=True):
        assert part.keys.equals(other.keys)
        np.testing.assert_equal({**vars(part), "keys": None}, {**vars(other), "keys": None})


def kept(split, rows=None):
    """Pixels and labels of the images that can be decoded, of all or of some rows."""
    _, images_ND, labels_N = make_images(split)
    rows = [row for row in (range(len(labels_N)) if rows is None else rows) if row not in HOLES[split]]
    return images_ND[rows], labels_N[rows]


def centre():
    """The mean training image, 0 to 1."""
    return (kept("train")[0] / 255).mean(0)


def train_in_a_loop(plan, num_epochs):
    """Train as the design says, in float64 and with autograd; the parameters, and of the last epoch its figures."""
    params_P = torch.zeros(3 * TARGET.num_values + 3).double()
    steps = []
    lane_rows = plan.batch_size // plan.num_lanes
    rows = [row for row in range(NUM_TRAIN) if row not in HOLES["train"]]
    mean_squared_norm = ((kept("train")[0] / 255 - centre()) ** 2).sum(1).mean()
    for epoch in range(1, num_epochs + 1):
        orders = [order_in_a_loop(plan, rows, lane, epoch, plan.num_chunks) for lane in range(plan.num_lanes)]
        losses, norms, num_correct = 0.0, [], 0
        for start in range(0, max(map(len, orders)), lane_rows):
            images_BD, labels_B = kept("train", [row for order in orders for row in order[start : start + lane_rows]])
            params_P.requires_grad_()
            logits_BK = torch.tensor(images_BD / 255 - centre()) @ params_P[:-3].view(3, -1).T + params_P[-3:]
            loss = cross_entropy(logits_BK, torch.tensor(labels_B))
            (gradient_P,) = torch.autograd.grad(loss, params_P)
            losses += float(loss.detach()) * len(labels_B)
            num_correct += int((logits_BK.argmax(1).numpy() == labels_B).sum())
            norms.append(float(gradient_P.norm()))
            params_P = (params_P - 4 / (mean_squared_norm + 1) * gradient_P).detach()
            steps.append(params_P.numpy())
    num_images = sum(map(len, orders))
    # Unrolled, the weights of the polynomial decay by 2: t (t+1) for step t.
    weights = [t * (t + 1) for t in range(1, len(steps) + 1)]
    both_2P = np.concatenate([params_P.numpy(), np.average(steps, axis=0, weights=weights)])
    return both_2P, losses / num_images, num_correct / num_images, np.mean(norms), len(norms)


def test_the_job_has_shards_without_an_image_and_lanes_of_chunks_and_parts_of_shards():
    plan, decoded = make_job()
    lost = [(shard.split, shard.num_images - len(table)) for shard, tables in decoded for table in tables.values()]
    assert set(lost) == set(itertools.product(("train", "valid"), range(4)))
    assert (plan.num_lanes, plan.num_chunks, len(plan.part_sizes)) == (8, 6, 7)
    assert any(len(table) == 0 for shard, tables in make_job(3)[1] for table in tables.values() if len(tables) > 1)


def test_the_means_are_those_of_numpy_without_the_skipped_images():
    images_ND, labels_N = kept("train")
    [(counts_K, means_KD)] = reference()["means"]
    assert (counts_K.dtype, counts_K.tolist()) == (np.int64, np.bincount(labels_N).tolist())
    expected_KD = [(images_ND[labels_N == label] / 255).mean(0) for label in range(3)]
    np.testing.assert_allclose(means_KD, expected_KD, rtol=1.2e-7)


@pytest.mark.parametrize("batch_size", [8, 32, 512])
@pytest.mark.parametrize("holes", [False, True])
def test_training_is_that_of_a_plain_loop(monkeypatch, batch_size, holes):
    if not holes:
        monkeypatch.setitem(HOLES, "train", frozenset())
    plan, decoded = make_job(holes=HOLES["train"], batch_size=batch_size)
    got = run(alone(plan), plan, decoded)
    params_2P, loss, accuracy, norm, num_steps = train_in_a_loop(plan, 2)
    np.testing.assert_allclose(got["params"][1][0], params_2P, atol=1e-5)
    last = got["history"][1]
    assert (last.epoch, last.num_steps, last.train_accuracy) == (2, num_steps, accuracy)
    assert (last.train_loss, last.gradient_norm) == pytest.approx((loss, norm), rel=1e-4)


def test_validation_is_that_of_the_parameters_after_the_epoch():
    images_ND, labels_N = kept("valid")
    for row, [params_2P] in zip(reference()["history"], reference()["params"], strict=True):
        params_P = np.split(params_2P, 2)[1]
        weights_KD = torch.tensor(params_P[:-3], dtype=torch.float64).view(3, -1)
        logits_NK = torch.tensor(images_ND / 255 - centre()) @ weights_KD.T
        logits_NK += torch.tensor(params_P[-3:])
        assert row.valid_loss == pytest.approx(float(cross_entropy(logits_NK, torch.tensor(labels_N))), rel=1e-5)
        is_correct_N = logits_NK.argmax(1).numpy() == labels_N
        assert row.valid_accuracy == is_correct_N.mean()
        by_class = [is_correct_N[labels_N == label].mean() for label in range(3)]
        assert row.valid_mean_class_accuracy == pytest.approx(np.mean(by_class))


def test_parts_hold_every_decoded_image_once_in_the_listings_order():
    parts = reference()["parts"]
    expected = [f"valid/{row}.png" for row in range(NUM_VALID) if row not in HOLES["valid"]]
    assert [key for part in parts for key in part.keys.to_pylist()] == expected
    assert np.concatenate([part.labels for part in parts]).tolist() == kept("valid")[1].tolist()


def test_parts_are_scored_as_a_loop_does():
    images_ND, labels_N = kept("valid")
    means_KD, params_P = reference()["means"][0][1].astype(np.float64), np.split(reference()["params"][1][0], 2)[1]
    differences_NKD = images_ND[:, None] / 255 - means_KD
    logits_NK = (images_ND / 255 - centre()) @ params_P[:-3].reshape(3, -1).T + params_P[-3:]
    odds_NK = np.exp(logits_NK)
    expected = {
        "nearest_mean_l1": np.abs(differences_NKD).mean(2),
        "nearest_mean_rms": np.sqrt((differences_NKD**2).mean(2)),
        "sgd_linear": odds_NK / odds_NK.sum(1, keepdims=True),
    }
    for name, scores_NK in expected.items():
        parts = reference()["parts"]
        chosen_N = scores_NK.argmax(1) if name == "sgd_linear" else scores_NK.argmin(1)
        np.testing.assert_allclose(np.concatenate([part.scores[name] for part in parts]), scores_NK, rtol=1e-5)
        np.testing.assert_array_equal(np.concatenate([part.predictions[name] for part in parts]), chosen_N)
        counts_KK = np.zeros((3, 3), int)
        np.add.at(counts_KK, (labels_N, chosen_N), 1)
        np.testing.assert_array_equal(sum(part.confusions[name] for part in parts), counts_KK)


@pytest.mark.parametrize("num_actors", [2, 3])
def test_several_actors_give_the_bits_of_one(processes, num_actors):
    plan, decoded = make_job(num_actors)
    got = run(together(processes(num_actors), plan), plan, decoded)
    assert_same(got, reference())
    of_rank_0_alone = [rank > 0 for rank in range(num_actors)]
    assert [[params_P is None for params_P in params] for params in got["params"]] == [of_rank_0_alone] * 2


def test_images_on_disk_give_the_bits_of_memory_and_leave_nothing(tmp_path):
    plan, decoded = make_job()
    actor = LaneActor(plan, 0, 1, is_on_gpu=False, scratch=str(tmp_path))
    assert actor.describe() == ("cpu", "disk")
    assert_same(run(as_group(actor), plan, decoded), reference())
    assert list(tmp_path.iterdir()) == []


def test_several_actors_give_the_bits_of_one_from_disk(processes, tmp_path):
    plan, decoded = make_job(2)
    assert_same(run(together(processes(2), plan, str(tmp_path)), plan, decoded), reference())
    assert list(tmp_path.iterdir()) == []


def test_how_the_listing_is_cut_does_not_change_a_bit():
    plan, decoded = make_job(shard_images=100)
    assert_same(run(alone(plan), plan, decoded), reference())


def test_an_actor_whose_lane_was_left_empty_takes_part(processes):
    options = {"holes": frozenset(range(2, NUM_TRAIN, 3)), "lanes": 3, "batch_size": 48, "shard_images": 100}
    plan, decoded = make_job(3, **options)
    assert {len(tables[2]) for shard, tables in decoded if shard.split == "train"} == {0}
    assert_same(run(together(processes(3), plan), plan, decoded), run(alone(plan), *make_job(1, **options)))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_shards_arrive_does_not_change_a_bit(seed):
    plan, decoded = make_job()
    shuffled = random.Random(seed).sample(decoded, len(decoded))
    assert shuffled != decoded
    assert_same(run(alone(plan), plan, shuffled), reference())


def test_several_actors_give_the_bits_of_one_in_another_order(processes):
    plan, decoded = make_job(2)
    assert_same(run(together(processes(2), plan), plan, decoded[::-1]), reference())


def test_training_goes_on_from_the_parameters_of_an_epoch():
    plan, decoded = make_job()
    [actor] = alone(plan)
    feed([actor], decoded)
    actor("finish_means")()
    params_P = reference()["params"][0][0].copy()
    params_P.setflags(write=False)
    begin(actor, params_P)
    record, after_P = actor("train_epoch", 2)()
    np.testing.assert_equal(after_P, reference()["params"][1][0])
    np.testing.assert_equal(params_P, reference()["params"][0][0])
    assert actor("count_steps")() == record.num_steps


def test_another_epoch_has_another_order():
    plan, decoded = make_job()
    [actor] = alone(plan)
    feed([actor], decoded)
    actor("finish_means")()
    ends = []
    for epoch in (1, 2, 1):
        actor("begin_training")()
        ends.append(actor("train_epoch", epoch)()[1])
    np.testing.assert_equal(ends[0], ends[2])
    assert not np.array_equal(ends[0], ends[1])


def test_records_hold_what_the_actors_own_lanes_and_parts_gave(processes):
    plan, decoded = make_job(3)
    group = together(processes(3), plan)
    feed(group, decoded)
    ask_all(group, "finish_means")
    ask_all(group, "begin_training")
    records = [record for record, _ in ask_all(group, "train_epoch", 1)]
    assert [sorted(record.lane_losses) for record in records] == [[0, 1], [2, 3], [4, 5, 6, 7]]
    parts = range(len(plan.part_sizes))
    assert [sorted(record.part_losses) for record in records] == [list(parts)[rank::3] for rank in range(3)]
    assert sum(record.num_train for record in records) == len(kept("train")[1])
    assert len({(record.num_steps, record.gradient_norm) for record in records}) == 1


def test_without_training_parts_have_distances_alone_and_no_training_image_is_kept():
    plan, decoded = make_job(epochs=0)
    actor = LaneActor(plan, 0, 1, is_on_gpu=False)
    group = as_group(actor)
    feed(group, decoded)
    np.testing.assert_equal(actor.finish_means(), reference()["means"][0])
    assert "_train" not in vars(actor)
    for part, expected in zip(score(group, plan), reference()["parts"], strict=True):
        assert list(part.scores) == ["nearest_mean_l1", "nearest_mean_rms"]
        np.testing.assert_equal(part.scores["nearest_mean_l1"], expected.scores["nearest_mean_l1"])


def test_what_an_actor_is_given_stays_as_it_is():
    plan, decoded = make_job()
    given = [table for _, tables in decoded for table in tables.values()]
    before = [table["image"].to_pylist() for table in given]
    run([alone(plan)[0]], plan, decoded)
    assert [table["image"].to_pylist() for table in given] == before


def test_a_part_is_forgotten_once_it_is_scored():
    plan, decoded = make_job()
    actor = prepared(plan, decoded)
    actor("score_part", 0)()
    with pytest.raises(KeyError, match="0"):
        actor("score_part", 0)()


def test_a_part_without_a_decoded_image_is_empty():
    plan, decoded = make_job()
    empty = [
        (shard, tables if shard.split == "train" else {rank: table[:0] for rank, table in tables.items()})
        for shard, tables in decoded
    ]
    actor = prepared(plan, empty)
    for part in score([actor], plan):
        assert (len(part.keys), len(part.labels)) == (0, 0)
        assert {scores_NK.shape for scores_NK in part.scores.values()} == {(0, 3)}
        assert {int(counts_KK.sum()) for counts_KK in part.confusions.values()} == {0}


def has_unread(process):
    """Say whether something has come to a process that it has not read."""
    ports = {f":{each.laddr.port:04X}" for each in psutil.Process(process.pid).net_connections() if each.raddr}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(local[-5:] in ports and not queues.endswith(":00000000") for _, local, _, _, queues, *_ in rows)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks for what was sent in /proc")
@pytest.mark.parametrize("method", ["finish_means", "train_epoch"])
def test_a_killed_peer_is_a_lost_actor_and_no_hang(processes, method):
    plan, decoded = make_job(2)
    started = processes(2)
    group = together(started, plan)
    feed(group, decoded)
    if method == "train_epoch":
        ask_all(group, "finish_means")
        ask_all(group, "begin_training")
    answer = group[0](method, *([1] if method == "train_epoch" else []))
    while not has_unread(started[1]):  # then the first has sent its own, and waits for the other's
        assert started[0].poll() is None
    started[1].kill()
    began = time.monotonic()
    with pytest.raises(ActorLostError, match=r"^actor 0: expected the other actors") as caught:
        answer()
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    started[1].wait(10)


@pytest.mark.parametrize("rank", [0, 1])
def test_peers_that_do_not_come_are_lost_actors(monkeypatch, rank):
    monkeypatch.setattr(exchange, "TIMEOUT_SECONDS", 1.0)
    actor = LaneActor(make_job()[0], rank, 2, is_on_gpu=False)
    own_address, nobody = actor.listen(HOST), (HOST, 1)
    addresses = (own_address, nobody) if rank == 0 else (nobody, own_address)
    with pytest.raises(ActorLostError, match=f"^actor {rank}: expected 2 actors") as caught:
        actor.join_group(TOKEN, *addresses)
    assert "\n" not in str(caught.value)
    actor.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine, or a torch, without CUDA")
def test_a_pretended_gpu_computes_on_the_cpu():
    plan, decoded = make_job()
    actor = LaneActor(plan, 0, 1, is_on_gpu=True)
    assert actor.describe() == ("cpu", "memory")
    assert_same(run(as_group(actor), plan, decoded), reference())


def test_an_actor_computes_on_one_thread():
    torch.set_num_threads(2)
    alone(make_job()[0])
    assert torch.get_num_threads() == 1


def test_slices_of_tables_are_taken_for_what_they_are():
    plan, decoded = make_job()
    [actor] = alone(plan)
    for shard, tables in decoded:
        [table] = tables.values()
        storage = table["image"].chunk(0).storage
        inverted = pa.FixedSizeListArray.from_arrays(255 - storage.flatten().to_numpy(), storage.type.list_size)
        images = pa.ExtensionArray.from_storage(table["image"].type, inverted)
        others = table.set_column(table.column_names.index("image"), "image", images)
        around = pa.concat_tables([others, table, others]).combine_chunks()
        feed([actor], [(shard, {0: around.slice(len(table), len(table))})])
    actor("finish_means")()
    begin(actor, reference()["params"][1][0])
    assert_same_parts(score([actor], plan), reference()["parts"])


def test_actors_keep_nothing_of_the_tables_that_they_were_given():
    plan, decoded = make_job()
    [actor] = alone(plan)
    for shard, tables in decoded:
        [table] = tables.values()
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        memory = bytearray(stream.getvalue())
        feed([actor], [(shard, {0: pa.ipc.open_stream(pa.py_buffer(memory)).read_all()})])
        memory[:] = bytes(len(memory))  # as when the object store gives the memory to others
    actor("finish_means")()
    begin(actor, reference()["params"][1][0])
    assert_same_parts(score([actor], plan), reference()["parts"])


if __name__ == "__main__":
    serve()
