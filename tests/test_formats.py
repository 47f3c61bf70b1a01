from dataclasses import replace

import pytest

from pipeline.data.formats import FORMATS, format_of, reader_of
from pipeline.data.formats.index import Archive
from pipeline.errors import DataError

ARCHIVE = Archive("tar", "/data/a.tar", "a.tar", 0, None, None, None)


@pytest.mark.parametrize(
    ("path", "name"), [("x/a.TAR", "tar"), ("a.parquet", "parquet"), ("a.zip", None), ("tar", None)]
)
def test_a_format_is_told_by_the_ending(path, name):
    assert getattr(format_of(path), "name", None) == name


def test_every_format_has_a_reader_and_an_unknown_one_is_never_read_as_another():
    assert len({reader_of(replace(ARCHIVE, kind=each.name)) for each in FORMATS}) == len(FORMATS)
    with pytest.raises(DataError, match=r"/data/a\.tar: expected .*\(tar, parquet\), got zip"):
        reader_of(replace(ARCHIVE, kind="zip"))
