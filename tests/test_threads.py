import threading
import time

import pytest
import torch

from pipeline.compute.threads import Threads


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 4, 100])
def test_every_task_is_done_once(number, num_tasks):
    done = []
    Threads(number).run(done.append, range(num_tasks))
    assert sorted(done) == list(range(num_tasks))


def test_threads_work_at_the_same_time_each_alone_inside_torch():
    barrier, counts = threading.Barrier(3, timeout=30), []
    torch.set_num_threads(1)

    def meet(_):
        barrier.wait()
        counts.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        Threads(3).run(meet, range(3))
    assert counts == [(1, True)] * 3


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_task_raises_is_raised_when_nothing_runs_any_more(number):
    done = []

    def work(task):
        if task == 0:
            raise ValueError("no")
        time.sleep(0.1)
        done.append(task)

    with pytest.raises(ValueError, match="no"):
        Threads(number).run(work, range(2))
    before = list(done)
    time.sleep(0.3)
    assert done == before
