import pickle

import pytest

from pipeline import errors

ALL_ERRORS = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("error_class", ALL_ERRORS)
def test_every_error_crosses_a_pickle_unchanged(error_class):
    copy = pickle.loads(pickle.dumps(error_class("--size: expected HxW, got 5; say 28x28")))
    assert type(copy) is error_class
    assert str(copy) == "--size: expected HxW, got 5; say 28x28"


@pytest.mark.parametrize("error_class", ALL_ERRORS)
def test_every_error_is_an_evaluation_error_of_one_line(error_class):
    assert issubclass(error_class, errors.EvaluationError)
    assert str(error_class("first\n  second")) == "first second"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/a", "s3://key:***@bucket/a"),
        ("of s3://key:a%2Fb+c==@bucket/a?region=x, got", "of s3://key:***@bucket/a?region=x, got"),
        ("got s3://key:a/b+c@bucket/a; Cannot parse URI: 's3://key:a/b+c@bucket/a'",
         "got s3://key:***@bucket/a; Cannot parse URI: 's3://key:***@bucket/a'"),
        ("S3://key:a/b@bucket/a", "S3://key:***@bucket/a"),
        ("s3://key:a@b@bucket/a", "s3://key:***@bucket/a"),
        ("abfss://:secret@account/a", "abfss://:***@account/a"),
        ("abfss://container:a/b==@account/a", "abfss://container:***@account/a"),
        ("abfss://c@account/a?client_secret=s/x&y=z, got", "abfss://c@account/a?client_secret=***&y=z, got"),
        ("abfss://container@account/a", "abfss://container@account/a"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("hdfs://host:9000/a@b", "hdfs://host:9000/a@b"),
        ("s3://b/a?scheme=http&endpoint_override=127.0.0.1:9000 and a@b", None),
        ("/local/a:b@c", None),
    ],
)  # fmt: skip
def test_a_secret_key_is_in_no_error(text, shown):
    assert str(errors.EvaluationError(text)) == (shown or text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("\u202eevil\x00", r"\u202eevil\x00"),
        ("\ufeffcat", r"\ufeffcat"),
        ("\udcff", r"\udcff"),
        ("a'b\"c ä 猫 \u05d0", None),
        ("\u0645\u06cc\u200c\u062e", None),
    ],
)
def test_nothing_that_a_terminal_obeys_is_in_an_error(text, shown):
    assert str(errors.EvaluationError(text)) == (shown or text)
