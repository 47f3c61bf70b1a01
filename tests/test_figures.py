import itertools
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import classification_report

from pipeline.config import Config
from pipeline.results.figures import (
    EpochMetric,
    EpochRecord,
    Metric,
    accuracies,
    epoch_metric,
    mean_class_accuracy,
    stop_reason,
    wilson_interval,
)

CONFUSION = np.array([[926, 84], [15, 1013]])


def record_of(**fields):
    made = EpochRecord(
        epoch=3, num_steps=5, lane_losses={0: 1.0}, num_train_correct=1, num_train=4, part_losses={0: 1.0},
        valid_confusion=np.array([[1, 1], [0, 2]]), gradient_norm=0.5, seconds=1.0,
        line_sums={0: [4.0, 2.0, -1.0, 2.0], 1: [2.0, 1.0, -2.0, 1.0]},
    )  # fmt: skip
    return replace(made, **fields)


def epochs_of(*accuracies, seconds=1.0):
    row = EpochMetric(1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, seconds)
    return [replace(row, epoch=epoch, valid_accuracy=value) for epoch, value in enumerate(accuracies, 1)]


@pytest.mark.parametrize(
    ("num_correct", "num_images", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(num_correct, num_images, low, high):
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998), table I, 3.
    assert [round(end, 4) for end in wilson_interval(num_correct, num_images)] == [low, high]


@pytest.mark.parametrize("num_images", [1, 2, 10, 1028, 10**6])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.926, 0.9999, 1])
def test_intervals_are_those_of_scipy(num_images, share):
    num_correct = round(share * num_images)
    expected = binomtest(num_correct, num_images).proportion_ci(method="wilson")
    assert wilson_interval(num_correct, num_images) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 10, 49, 1000, 123_456_789])
def test_intervals_end_exactly_where_none_or_all_are_right(num_images):
    assert wilson_interval(0, num_images)[0] == 0
    assert wilson_interval(num_images, num_images)[1] == 1


@pytest.mark.parametrize("num_images", [*range(1, 60), 10**9])
def test_intervals_hold_the_share_and_stay_within_0_and_1(num_images):
    for num_correct in {0, 1, num_images // 2, num_images - 1, num_images}:
        low, high = wilson_interval(num_correct, num_images)
        assert 0 <= low <= num_correct / num_images <= high <= 1


def test_the_interval_of_95_percent_covers_95_percent():
    # Summed over all outcomes of 200 images of which 90 % would be right.
    chances = [math.comb(200, k) * 0.9**k * 0.1 ** (200 - k) for k in range(201)]
    covers = [low <= 0.9 <= high for low, high in (wilson_interval(k, 200) for k in range(201))]
    assert sum(itertools.compress(chances, covers)) == pytest.approx(0.95, abs=0.02)
    assert norm.cdf(1.959963984540054) == pytest.approx(0.975, abs=1e-15)


def test_accuracies_are_a_row_a_class_then_all_then_their_mean():
    rows = accuracies("nearest_mean_l1", ["3", "7"], CONFUSION)
    assert {row.classifier for row in rows} == {"nearest_mean_l1"}
    assert [(row.scope, row.class_name, row.num_images, row.num_correct) for row in rows] == [
        ("class", "3", 1010, 926),
        ("class", "7", 1028, 1013),
        ("all", None, 2038, 1939),
        ("mean_of_classes", None, None, None),
    ]
    assert [round(row.accuracy, 4) for row in rows] == [0.9168, 0.9854, 0.9514, 0.9511]


def test_accuracies_carry_their_intervals():
    *counted, mean = accuracies("sgd_linear", ["3", "7"], CONFUSION)
    for row in counted:
        assert (row.accuracy_low, row.accuracy_high) == wilson_interval(row.num_correct, row.num_images)
    assert (mean.accuracy_low, mean.accuracy_high) == (None, None)


def test_a_class_without_images_has_no_accuracy_and_does_not_count_for_the_mean():
    confusion_KK = np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]])
    rows = accuracies("nearest_mean_rms", ["a", "b", "c"], confusion_KK)
    assert rows[1] == Metric("nearest_mean_rms", "class", "b", 0, 0, None, None, None)
    assert [row.accuracy for row in rows] == [0.75, None, 0.5, 8 / 14, 0.625]
    assert [row.precision for row in rows] == [1.0, None, 1.0, None, 1.0]
    assert mean_class_accuracy(confusion_KK) == 0.625


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40])
@pytest.mark.filterwarnings("ignore:Precision is ill-defined")  # which it says where a class is never predicted
def test_precision_recall_and_f1_are_those_of_scikit_learn(num_classes):
    random = np.random.default_rng(num_classes)
    # Squared, so that some classes are rare, some are missing and some are never predicted.
    labels_N, predictions_N = (num_classes * random.random((2, 60)) ** 2).astype(int)
    confusion_KK = np.zeros((num_classes, num_classes), int)
    np.add.at(confusion_KK, (labels_N, predictions_N), 1)
    names = [str(label) for label in range(num_classes)]
    *rows, _, mean = accuracies("sgd_linear", names, confusion_KK)
    present = np.unique(labels_N)
    expected = classification_report(labels_N, predictions_N, labels=present, output_dict=True)
    for row in (rows[label] for label in present):
        got = {"precision": row.precision, "recall": row.accuracy, "f1-score": row.f1, "support": row.num_images}
        assert got == pytest.approx(expected[row.class_name], abs=1e-12)
    got = {"precision": mean.precision, "recall": mean.accuracy, "f1-score": mean.f1, "support": len(labels_N)}
    assert got == pytest.approx(expected["macro avg"], abs=1e-12)


def test_a_class_that_is_never_predicted_has_a_precision_and_f1_of_0():
    rows = accuracies("majority_class", ["3", "7"], np.array([[4, 0], [2, 0]]))
    assert [(row.precision, row.f1) for row in rows] == [(4 / 6, 0.8), (0.0, 0.0), (None, None), (2 / 6, 0.4)]


def test_the_share_in_the_top_5_stands_in_the_row_of_all():
    rows = accuracies("sgd_linear", ["3", "7"], CONFUSION, num_in_top=2000)
    assert [row.top5_accuracy for row in rows] == [None, None, 2000 / 2038, None]


def test_figures_are_plain_numbers_that_json_takes():
    for row in accuracies("sgd_linear", ["3", "7"], CONFUSION):
        assert {type(value) for value in vars(row).values()} <= {str, int, float, type(None)}


def test_an_epoch_of_one_actor():
    got = epoch_metric([record_of(lane_losses={0: 1.0, 1: 2.0}, part_losses={0: 1.5, 1: 0.5})])
    assert got == EpochMetric(3, 5, 3 / 4, 1 / 4, 2 / 4, 3 / 4, 0.75, 0.5, 1.0, [2.0, 1.0], -1.0)


def test_an_epoch_of_several_actors_is_that_of_one_that_holds_all():
    parts = [
        record_of(lane_losses={0: 0.1, 2: 0.3}, num_train_correct=2, num_train=5, part_losses={0: 0.7}),
        record_of(
            lane_losses={1: 0.2}, num_train_correct=3, num_train=3, part_losses={}, valid_confusion=0 * CONFUSION
        ),
        record_of(lane_losses={}, num_train_correct=0, num_train=0, part_losses={1: 0.1}, seconds=9.0),
    ]
    whole = record_of(
        lane_losses={0: 0.1, 1: 0.2, 2: 0.3}, num_train_correct=5, num_train=8, part_losses={0: 0.7, 1: 0.1},
        valid_confusion=np.array([[2, 2], [0, 4]]), seconds=9.0,
    )  # fmt: skip
    assert epoch_metric(parts) == epoch_metric([whole])


def test_an_epoch_does_not_depend_on_the_order_of_its_records():
    numbers = random.Random(4)
    losses = [10 ** numbers.uniform(-9, 9) for _ in range(40)]
    records = [record_of(lane_losses={k: loss}, part_losses={k: -loss / 3}) for k, loss in enumerate(losses)]
    expected = epoch_metric(records)
    for _ in range(20):
        numbers.shuffle(records)
        assert epoch_metric(records) == expected


def test_an_epoch_does_not_depend_on_who_holds_which_lane():
    losses = {lane: 0.1 * 10**lane for lane in range(12)}
    expected = epoch_metric([record_of(lane_losses=losses, num_train=12), record_of(lane_losses={}, num_train=0)])
    shares = [{lane: loss for lane, loss in losses.items() if lane % 2 == rank} for rank in (0, 1)]
    split = [record_of(lane_losses=share, num_train=6) for share in shares]
    assert replace(epoch_metric(split), train_accuracy=0) == replace(expected, train_accuracy=0)


def test_an_epochs_confusions_are_left_as_they_are():
    records = [record_of(), record_of()]
    epoch_metric(records)
    assert [row.valid_confusion.tolist() for row in records] == [[[1, 1], [0, 2]]] * 2


@pytest.mark.parametrize(
    ("options", "accuracies", "reason"),
    [({}, [], None), ({}, [0.9] * 9, None), ({}, [0.9] * 10, "epochs"), ({}, [0.9] * 11, "epochs"),
     ({"epochs": 0}, [], None),
     ({"target_accuracy": 0.9}, [0.8, 0.89], None), ({"target_accuracy": 0.9}, [0.8, 0.9], "target_accuracy"),
     ({"target_accuracy": 1.0}, [1.0], "target_accuracy"),
     ({"patience": 2}, [0.8, 0.7], None), ({"patience": 2}, [0.8, 0.7, 0.8], "patience"),
     ({"patience": 2}, [0.7, 0.8, 0.8], None), ({"patience": 2}, [0.8, 0.7, 0.9, 0.8], None),
     ({"patience": 1}, [0.8], None), ({"patience": 1}, [0.8, 0.8], "patience"),
     ({"max_seconds": 3.0}, [0.1, 0.2], None), ({"max_seconds": 3.0}, [0.1, 0.2, 0.3], "max_seconds"),
     ({"max_seconds": 2.5}, [0.1, 0.2, 0.3], "max_seconds")],
)  # fmt: skip
def test_each_rule_stops_the_training(options, accuracies, reason):
    assert stop_reason(Config(**{"epochs": 10, **options}), epochs_of(*accuracies)) == reason


def test_of_several_rules_the_first_is_named():
    options = {"target_accuracy": 0.5, "patience": 1, "max_seconds": 1.0}
    rows = epochs_of(0.6, 0.6, seconds=5.0)
    named = []
    for rule, off in (("epochs", 9), ("target_accuracy", None), ("patience", None), ("max_seconds", None)):
        named.append(stop_reason(Config(**{"epochs": 2, **options}), rows))
        options[rule] = off
    assert named == ["epochs", "target_accuracy", "patience", "max_seconds"]
    assert stop_reason(Config(**options), rows) is None


def test_records_cross_a_pickle_unchanged():
    made = record_of()
    copied = pickle.loads(pickle.dumps(made))
    np.testing.assert_equal(vars(copied), vars(made))
