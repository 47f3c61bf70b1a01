"""Differences of paired accuracies against statsmodels, a bootstrap and the definitions."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import brentq, minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from pipeline.results.comparison import compare, holm, margins, match_keys, mcnemar_p, tango_interval

COUNTS = [(0, 1), (0, 6), (3, 4), (12, 37), (117, 15), (155, 9), (990, 1100), (12_000, 11_500), (700_000, 701_000)]


@pytest.mark.parametrize(("num_only_a", "num_only_b"), COUNTS)
def test_mcnemar_s_exact_test_is_that_of_statsmodels(num_only_a, num_only_b):
    expected = mcnemar([[5, num_only_a], [num_only_b, 5]], exact=True).pvalue
    assert mcnemar_p(num_only_a, num_only_b) == mcnemar_p(num_only_b, num_only_a)
    assert mcnemar_p(num_only_a, num_only_b) == pytest.approx(expected, rel=1e-11, abs=1e-300)
    assert mcnemar_p(num_only_a, num_only_b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num", [0, 1, 7, 10**6])
def test_p_is_1_where_both_are_right_equally_often(num):
    assert mcnemar_p(num, num) == 1.0


def test_p_of_a_million_images_on_one_side_is_0():
    assert mcnemar_p(0, 10**6) == mcnemar_p(20, 10**6) == 0.0


def score_of(difference, lost, gained, num):
    """Compute Tango's score statistic, the likelihood maximised by a search."""

    def loss(share):
        other, rest = share + difference, 1 - 2 * share - difference
        chances = [(lost, share), (gained, other), (num - lost - gained, rest)]
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in chances if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    variance = num * (2 * share + difference - difference**2)
    return (gained - lost - num * difference) / math.sqrt(variance)


@pytest.mark.parametrize(("lost", "gained", "num"), [(3, 4, 20), (1, 9, 40), (37, 12, 899), (155, 9, 899)])
def test_the_interval_holds_what_the_score_test_does_not_reject(lost, gained, num):
    ends = tango_interval(lost, gained, num)
    middle = (gained - lost) / num
    for end, outer, quantile in zip(ends, (-0.9, 0.9), (1.959963984540054, -1.959963984540054), strict=True):
        expected = brentq(lambda value: score_of(value, lost, gained, num) - quantile, middle, outer)  # noqa: B023
        assert end == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("lost", "gained", "num"), [(37, 12, 899), (117, 15, 899), (80, 95, 2038), (0, 0, 50)])
def test_the_interval_is_mirrored_with_the_classifiers_and_holds_the_difference(lost, gained, num):
    low, high = tango_interval(lost, gained, num)
    assert (-high, -low) == pytest.approx(tango_interval(gained, lost, num), abs=1e-15)
    assert low <= (gained - lost) / num <= high
    assert low < high


@pytest.mark.parametrize(("lost", "gained", "ends"), [(0, 10, (0.44493, 1.0)), (10, 0, (-1.0, -0.44493))])
def test_the_interval_stays_inside_of_1(lost, gained, ends):
    assert tango_interval(lost, gained, 10) == pytest.approx(ends, abs=1e-5)


def test_the_interval_of_95_percent_covers_95_percent():
    draws = np.random.default_rng(5).multinomial(200, [0.06, 0.1, 0.84], 2000)
    ends = [tango_interval(lost, gained, 200) for lost, gained, _ in draws.tolist()]
    assert np.mean([low <= 0.04 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("num", [1, 2, 10, 200])
def test_holm_s_correction_is_that_of_statsmodels(num):
    p_values = np.random.default_rng(num).random(num) ** 4
    p_values[: num // 4] = p_values[0]  # some are equal
    np.testing.assert_allclose(holm(p_values.tolist()), multipletests(p_values, method="holm")[1], rtol=1e-14)


def test_no_p_values_are_none_corrected():
    assert holm([]) == []


def test_classes_are_compared_each_on_its_images():
    labels_N = np.array([0, 0, 0, 0, 2, 2], np.int32)
    is_right_a_N = np.array([1, 1, 1, 0, 0, 0], bool)
    is_right_b_N = np.array([1, 0, 0, 0, 1, 0], bool)
    total, first, empty, last = compare(labels_N, is_right_a_N, is_right_b_N, ["a", "b", "c"])
    assert (total.num_images, total.num_correct_a, total.num_correct_b) == (6, 3, 2)
    assert [(row.num_only_a, row.num_only_b) for row in (total, first, empty, last)] == [(2, 1), (2, 0), (0, 0), (0, 1)]
    assert (total.difference, first.difference, last.difference) == (-1 / 6, -0.5, 0.5)
    assert (first.p_value, first.p_value_holm, last.p_value_holm) == (0.5, 1.0, 1.0)
    assert (empty.accuracy_a, empty.difference_low, empty.p_value, empty.p_value_holm) == (None,) * 4
    assert total.p_value_holm is None


def test_margins_of_probabilities_and_of_distances():
    scores_NK = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.2, 0.4, 0.8], [0.3, 0.3, 0.3], [0, 0, 1]], np.float32)
    got = margins(scores_NK, np.array([0, 0, 0, 1, 1], np.int32))
    # Of the third row the smallest is predicted, as of distances; of the last, one of two distances of 0.
    np.testing.assert_allclose(got, [0.5, 0.0, 0.5, 0.0, 0.0], atol=1e-7)


def test_margins_of_no_image():
    assert margins(np.zeros((0, 3), np.float32), np.zeros(0, np.int32)).shape == (0,)


def test_keys_are_matched_in_any_order_and_where_one_run_lacks_some():
    keys_a, keys_b = pa.chunked_array([["d", "a"], ["c", "b"]]), pa.chunked_array([["b", "x", "d"], ["y", "a"]])
    rows_a_N, rows_b_N = match_keys(keys_a, keys_b)
    assert (rows_a_N.tolist(), rows_b_N.tolist()) == ([0, 1, 3], [2, 4, 0])


def test_keys_cut_into_other_files_are_the_same():
    rows_a_N, rows_b_N = match_keys(pa.chunked_array([["a", "b"], ["c"]]), pa.chunked_array([["a"], ["b", "c"]]))
    assert rows_a_N.tolist() == rows_b_N.tolist() == [0, 1, 2]


def test_without_a_common_key_nothing_is_matched():
    assert [len(rows_N) for rows_N in match_keys(pa.chunked_array([["a"]]), pa.chunked_array([["b"]]))] == [0, 0]
