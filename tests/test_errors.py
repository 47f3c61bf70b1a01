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
