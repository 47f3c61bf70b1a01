import time

import pytest

from pipeline.driver.state import Clock


def test_a_clock_adds_up_its_phases():
    clock = Clock()
    for phase in ("decode", "train", "decode", "write"):
        time.sleep(0.02)
        assert clock.since_entered() >= 0.02
        clock.enter(phase)
    seconds = clock.read()
    assert list(seconds) == ["start", "decode", "train", "write", "total"]
    assert seconds["decode"] >= 0.04
    assert min(seconds["start"], seconds["train"]) >= 0.02
    assert sum(seconds.values()) - seconds["total"] == pytest.approx(seconds["total"], abs=1e-3)


def test_a_clock_that_is_read_goes_on():
    clock = Clock()
    first = clock.read()
    time.sleep(0.01)
    second = clock.read()
    assert second["start"] >= first["start"] + 0.01
    assert clock.began.endswith("+00:00")
