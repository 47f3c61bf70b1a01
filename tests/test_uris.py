"""What users type for a place: nothing of it is dropped, and what has no meaning is one line."""

from pathlib import Path

import pytest

from pipeline.data import files, uris
from pipeline.data.uris import Uri, absolute_root
from pipeline.errors import CacheError, DataError, OutputError
from pipeline.results.writing import Output


@pytest.mark.parametrize(
    ("text", "parts"),
    [("s3://b/a/c/", Uri("s3", None, "b", "a/c", ())), ("s3://b", Uri("s3", None, "b", "", ())),
     ("S3://b/data#2", Uri("s3", None, "b", "data#2", ())), ("gs://b/a b/é[1]", Uri("gs", None, "b", "a b/é[1]", ())),
     ("s3://b/50%", Uri("s3", None, "b", "50%", ())), ("s3://b/50%25%zz", Uri("s3", None, "b", "50%%zz", ())),
     ("s3://b/a%20c%3Fd%23", Uri("s3", None, "b", "a c?d#", ())), ("s3://b/%C3%A9", Uri("s3", None, "b", "é", ())),
     ("s3://b/a?region=x&scheme=http", Uri("s3", None, "b", "a", (("region", "x"), ("scheme", "http")))),
     ("s3://b/a?region=x%26y", Uri("s3", None, "b", "a", (("region", "x&y"),))),
     ("s3://k%40:s%2Ft@b/a@c", Uri("s3", ("k@", "s/t"), "b", "a@c", ())),
     ("s3://b/a:c", Uri("s3", None, "b", "a:c", ())), ("s3://b/a...", Uri("s3", None, "b", "a...", ())),
     ("gs://anonymous@b/a", Uri("gs", ("anonymous", ""), "b", "a", ())),
     ("abfss://c@account.dfs.core.windows.net/a", Uri("abfss", None, "c@account.dfs.core.windows.net", "a", ())),
     ("abfss://c:key%3D@account/a", Uri("abfss", ("", "key="), "c@account", "a", ())),
     ("az://c/a", Uri("az", None, "c", "a", ()))],
)  # fmt: skip
def test_a_uri_has_the_parts_that_were_typed(text, parts):
    assert uris.parse("--data", text) == parts


@pytest.mark.parametrize(
    ("uri", "words"),
    [("s3://[b/p", "name a bucket"), ("s3://key:\u00bdhidden\u2100@b /p", "name a bucket"), ("s3://", "name a bucket"),
     ("s3:///p", "name a bucket"), ("s3://key:hid/den@b/p", "%2F"), ("s3://b/what?", "%3F"),
     ("s3://b/what?no", "%3F"), ("s3://b/p?region=x&no", "%3F"), ("s3://b/p?=x", "%3F"),
     ("s3://b/a//c", "an empty one"), ("s3://b//a", "an empty one"), ("s3://b/./a", "an empty one"),
     ("s3://b/a/..", "an empty one")],
)  # fmt: skip
@pytest.mark.parametrize("option", ["--data", "--out"])
def test_a_uri_whose_parts_cannot_be_told_is_one_line(uri, words, option):
    locate = files.locate if option == "--data" else Output.at
    with pytest.raises((DataError, OutputError), match=f"^{option}: expected .*, got .*; .*{words}|{words}") as caught:
        locate(uri)
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [("file:///a/b", "/a/b"), ("file://localhost/a", "/a"), ("file:///a#b?c", "/a#b?c"), ("file:///a%20b%", "/a b%"),
     ("/a%20b", "/a%20b"), ("s3://b/a", "s3://b/a")],
)  # fmt: skip
def test_a_file_uri_is_the_path_that_it_names(text, path):
    assert uris.plain_path(text) == path


@pytest.mark.parametrize(
    ("inner", "outer", "is_inside"),
    [("s3://b/data/out?region=x", "s3://b/data", True), ("s3://b/data", "s3://b/data/?region=x", True),
     ("s3://b/database", "s3://b/data", False), ("s3://c/data/out", "s3://b/data", False),
     ("s3://b/data#2", "s3://b/data", False), ("s3://b/data", "s3://b/data#2", False), ("s3://b/a", "s3://b", True),
     ("s3://b/a%20b/c", "s3://b/a b", True), ("gs://b/data/out", "s3://b/data", False),
     ("s3://key:secret@b/data/out", "s3://b/data", True), ("s3://b/data/out", "s3://key:secret@b/data", True),
     ("gs://anonymous@b/data/out", "gs://b/data", True),
     ("abfss://one@account/data/out", "abfss://other@account/data", False),
     ("abfss://one:secret@account/data/out", "abfss://other:secret@account/data", False),
     ("/data/out", "s3://b/data", False), ("s3://b/data", "/", False), ("/data/out", "/data/", True),
     ("/data", "/data", True), ("/database", "/data", False), ("/data/../out", "/data", False)],
)  # fmt: skip
def test_what_is_inside_a_folder_or_uri(inner, outer, is_inside):
    assert uris.is_inside(inner, outer) is is_inside


def test_a_folder_is_inside_another_through_links_too(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    assert uris.is_inside(f"{tmp_path}/link/inner", f"{tmp_path}/real")
    assert uris.is_inside(f"{tmp_path}/real/inner/new", f"{tmp_path}/link")


@pytest.mark.parametrize(("option", "error_class"), [("--out", OutputError), ("--cache", CacheError)])
def test_errors_are_of_the_option_that_they_concern(option, error_class):
    with pytest.raises(error_class, match=f"^{option} ~no-such-user/x: expected .*, got no such user"):
        absolute_root(option, "~no-such-user/x", error_class)
    with pytest.raises(error_class, match=rf"^{option}: expected a URI .*, got s3://;"):
        absolute_root(option, "s3://", error_class)


def test_a_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    Path(tmp_path / "link").symlink_to("real")
    assert absolute_root("--out", f"{tmp_path}/link/", OutputError) == f"{tmp_path}/link"
