import numpy as np
import pytest
import torch

from pipeline.compute.epoch import EpochSums


@pytest.mark.parametrize("num_steps", [1, 64, 130])
def test_the_sums_of_an_epoch_are_those_of_numpy(num_steps):
    random = np.random.default_rng(num_steps)
    sums = EpochSums([3, 4], num_steps, 5, torch.device("cpu"))
    total, num_correct = np.zeros(2), 0
    for step in range(num_steps):
        counts = [5, 5] if step + 1 < num_steps else [4, 0]
        losses, is_correct = random.random(sum(counts), np.float32), random.random(sum(counts)) < 0.5
        sums.add_step(torch.from_numpy(losses), torch.from_numpy(is_correct), counts)
        total += [part.sum(dtype=np.float64) for part in np.split(losses, [counts[0]])]
        num_correct += is_correct.sum()
    record = sums.record(1, 7, 0.5, {}, {}, np.zeros((2, 2), np.int64))
    assert list(record.lane_losses) == [3, 4]
    np.testing.assert_allclose(list(record.lane_losses.values()), total, rtol=1e-12)
    assert (record.num_train_correct, record.num_steps, sums.num_steps_done) == (num_correct, num_steps, num_steps)
