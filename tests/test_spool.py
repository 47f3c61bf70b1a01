"""Values that wait in memory or on disk."""

import pytest

from pipeline.compute.spool import Spool
from pipeline.errors import ClusterError


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_values_come_back_by_their_numbers(tmp_path, is_on_disk):
    kept = Spool(str(tmp_path) if is_on_disk else None)
    values = [{"a": [1, 2]}, "text" * 10_000, None, (3, "b")]
    numbers = [kept.put(value) for value in values]
    assert [kept.get(number) for number in reversed(numbers)] == values[::-1]
    assert kept.get(kept.put("later")) == "later"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(ClusterError, match=r"--scratch .*gone: expected room .* got No such file or directory; give"):
        Spool(str(tmp_path / "gone"))


def test_a_full_disk_is_named():
    kept = Spool("/dev/shm")
    kept._file.close()
    no_room = pytest.raises(ClusterError, match="got No space left on device")
    with open("/dev/full", "r+b", buffering=0) as kept._file, no_room:  # noqa: PTH123
        kept.put("x")
