import pytest

from pipeline.config import Config
from pipeline.data.splits import are_held_out, hashes_of, natural_sort_key, split_in_path, valid_names


@pytest.mark.parametrize(
    ("path", "split"),
    [("train-00000-of-00001.parquet", "train"), ("data/test-0.tar", "test"), ("train/part-3.tar", "train"),
     ("imagenet-val-000000.tar", "val"), ("train2017.tar", "train"), ("train/test-0.tar", "test"),
     ("test/train_test.tar", "test"), ("constrained.tar", None), ("latest.tar", None), ("0001.tar", None)],
)  # fmt: skip
def test_a_split_is_a_word_of_the_path_nearest_to_the_file(path, split):
    assert split_in_path(path, Config()) == split


def test_a_name_with_a_digit_ends_where_another_digit_follows():
    config = Config(train_split="fold1", valid_split="fold10")
    assert [split_in_path(f"fold{number}-0.tar", config) for number in (1, 10, 100)] == ["fold1", "fold10", None]


def test_only_the_default_name_has_synonyms():
    assert valid_names(Config()) == ("valid", "val", "validation", "test")
    assert valid_names(Config(valid_split="test")) == ("test",)


def test_a_hash_holds_out_about_the_fraction():
    hashes = hashes_of((b"%d" % number for number in range(4000)), 4000)
    held_out = are_held_out(hashes, 0.25)
    assert held_out.sum() == pytest.approx(1000, abs=100)
    assert are_held_out(hashes, 0.5)[held_out].all()
    assert are_held_out(hashes, 1 - 2**-53).all()


@pytest.mark.parametrize(
    "names",
    [("1", "2", "10"), ("Class1", "class2", "class10"), ("a9b", "a10a", "a10b"), ("02", "2", "3"), ("3", "apple"),
     ("apple", "Banana", "cherry"), ("n1", "n1a", "n2"), ("A", "a"), ("1.5", "1.10")],
)  # fmt: skip
def test_numbers_in_names_sort_by_value(names):
    turned = names[::-1]
    assert sorted(turned, key=lambda name: natural_sort_key(name.encode())) == list(names)
