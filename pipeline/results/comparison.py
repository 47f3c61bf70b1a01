"""Two classifiers on the same images: the difference of their accuracies, its interval, and its test.

Input: which images each gets right. Output: differences with intervals and p-values, for all images and by class.
Invariant: images are paired; nothing is random, and every figure is defined where the two agree on all images.

Axes: N images, K classes. "Only A" are the images that A alone gets right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# The 0.975 quantile of the standard normal distribution, for an interval of 95 %.
_Z = 1.959963984540054
# Halvings of an interval of length 2, after which nothing changes in float64.
_NUM_HALVINGS = 60
# From here on binomial coefficients as whole numbers take longer than they are worth; below, Stirling's series does
# not reach the precision of float64.
_MAX_EXACT, _MIN_STIRLING = 2000, 16


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images, all of them or those of a class.

    Attributes:
        scope: `all`, or `class`.
        class_name: For scope `class`.
        num_images: Images that are compared.
        num_correct_a: Of these, predicted right by A.
        num_correct_b: By B.
        num_only_a: By A and not by B.
        num_only_b: By B and not by A.
        accuracy_a: 0 to 1; None where there is no image, as the figures below.
        accuracy_b: Likewise.
        difference: The accuracy of B less that of A, -1 to 1.
        difference_low: Lower end of its 95 % interval.
        difference_high: Upper end.
        p_value: Of McNemar's exact test that both are right equally often.
        p_value_holm: For a class, that corrected for the number of classes.
    """

    scope: str
    class_name: str | None
    num_images: int
    num_correct_a: int
    num_correct_b: int
    num_only_a: int
    num_only_b: int
    accuracy_a: float | None = None
    accuracy_b: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    p_value_holm: float | None = None


def compare(
    labels_N: npt.NDArray[np.int32],
    is_right_a_N: npt.NDArray[np.bool_],
    is_right_b_N: npt.NDArray[np.bool_],
    classes: Sequence[str],
) -> list[Paired]:
    """Compare two classifiers on all images, and on those of each class.

    The p-values of the classes that have images are corrected by Holm's method: if no class differs, one of them is
    below 0.05 in at most one of twenty comparisons.

    Args:
        labels_N: The true classes, int32, 0 to K - 1.
        is_right_a_N: Whether A predicts them.
        is_right_b_N: Whether B does.
        classes: Names of the K classes.

    Returns:
        The row of all images, then one a class.
    """
    num_classes = len(classes)

    def count(is_chosen_N: npt.NDArray[np.bool_]) -> list[int]:
        counts: list[int] = np.bincount(labels_N[is_chosen_N], minlength=num_classes).tolist()
        return counts

    of_class = [
        count(np.ones(len(labels_N), np.bool_)),
        count(is_right_a_N),
        count(is_right_b_N),
        count(is_right_a_N & ~is_right_b_N),
        count(is_right_b_N & ~is_right_a_N),
    ]
    total = _paired(Paired("all", None, *map(sum, of_class)))
    rows = [_paired(Paired("class", name, *counts)) for name, *counts in zip(classes, *of_class, strict=True)]
    corrected = iter(holm([row.p_value for row in rows if row.p_value is not None]))
    return [total, *(row if row.p_value is None else replace(row, p_value_holm=next(corrected)) for row in rows)]


def _paired(counts: Paired) -> Paired:
    if counts.num_images == 0:
        return counts
    low, high = tango_interval(counts.num_only_a, counts.num_only_b, counts.num_images)
    return replace(
        counts,
        accuracy_a=counts.num_correct_a / counts.num_images,
        accuracy_b=counts.num_correct_b / counts.num_images,
        difference=(counts.num_only_b - counts.num_only_a) / counts.num_images,
        difference_low=low,
        difference_high=high,
        p_value=mcnemar_p(counts.num_only_a, counts.num_only_b),
    )


def tango_interval(num_only_a: int, num_only_b: int, num_images: int) -> tuple[float, float]:
    """Compute the 95 % score interval of the difference of two paired proportions, B less A.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", Statistics in Medicine 17 (1998), 891-908. It holds the differences that a score test does not reject, so
    it is to McNemar's test what Wilson's interval is to the test of one proportion: it stays inside -1 to 1, and has a
    width where the two agree on every image.

    Args:
        num_only_a: Images that A alone gets right.
        num_only_b: Images that B alone gets right.
        num_images: All images, 1 at least.

    Returns:
        Its ends, -1 to 1.
    """
    num, gained, lost = num_images, num_only_b, num_only_a

    def is_inside(difference: float) -> bool:
        # The most likely share of images that A alone gets right, if the difference is this one: formula (7) there.
        linear = (2 * num - gained + lost) * difference - gained - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * num * lost * difference * (1 - difference)))
        share = (root - linear) / (4 * num)
        variance = num * (2 * share + difference * (1 - difference))
        return (gained - lost - num * difference) ** 2 <= _Z**2 * variance

    def find_end(outer: float) -> float:
        inner = (gained - lost) / num
        for _ in range(_NUM_HALVINGS):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if is_inside(middle) else (inner, middle)
        return inner

    return find_end(-1.0), find_end(1.0)


def mcnemar_p(num_only_a: int, num_only_b: int) -> float:
    """Compute the p-value of McNemar's exact test, two-sided: a sign test of the images that one alone gets right.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947), 153-157. Twice the smaller tail of a binomial distribution with chances of 1/2, 1 at most;
    1 where both agree on every image.
    """
    num = num_only_a + num_only_b
    fewer = min(num_only_a, num_only_b)
    if 2 * fewer == num:
        return 1.0
    # The terms from `fewer` down to 0, each by its ratio to the one before.
    total = term = 1.0
    for index in range(fewer, 0, -1):
        term *= index / (num - index + 1)
        total += term
        if term < total * 2**-60:
            break
    return min(1.0, 2 * _half_binomial(fewer, num) * total)


def _half_binomial(index: int, num: int) -> float:
    """Compute the chance of so many heads of `num` coins, to the precision of float64.

    C. Loader, "Fast and accurate computation of binomial probabilities" (2000): by logarithms of factorials, the large
    terms of which would cancel, a sum of small terms.
    """
    if num <= _MAX_EXACT or index < _MIN_STIRLING:
        return math.comb(num, index) / (1 << num)
    other = num - index
    lean = (other - index) / num
    deviance = num / 2 * (math.log1p(-(lean**2)) + 2 * lean * math.atanh(lean))
    rest = _stirling_rest(num) - _stirling_rest(index) - _stirling_rest(other)
    return math.exp(rest - deviance) * math.sqrt(num / (2 * math.pi * index * other))


def _stirling_rest(num: int) -> float:
    """Compute the logarithm of a factorial less Stirling's formula, by its series."""
    square = num * num
    return (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / square) / square) / square) / num


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979),
    65-70: the smallest is multiplied by their number, the next by one less, and so on; none gets below the one before.
    """
    corrected, last = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        last = max(last, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = last
    return corrected


def margins(scores_NK: npt.NDArray[np.float32], predictions_N: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Measure how certain predictions are: how far the predicted class is ahead of the next one.

    Of probabilities and shares of votes that is their difference; of distances, which are told by the predicted class
    having the smallest, the difference divided by the next one's.

    Args:
        scores_NK: float32.
        predictions_N: int32, 0 to K - 1.

    Returns:
        float64 [N], 0 to 1; more of scores that are no probabilities, as logits.
    """
    rows_N = np.arange(len(predictions_N))
    own_N = scores_NK[rows_N, predictions_N].astype(np.float64)
    others_NK = scores_NK.astype(np.float64)
    others_NK[rows_N, predictions_N] = -np.inf
    highest_N = others_NK.max(1)
    others_NK[rows_N, predictions_N] = np.inf
    lowest_N = others_NK.min(1)
    is_distance_N = (own_N <= lowest_N) & (own_N < highest_N)
    ahead_N = np.where(is_distance_N, lowest_N - own_N, own_N - highest_N)
    unit_N = np.where(is_distance_N, np.maximum(lowest_N, np.finfo(np.float32).tiny), 1.0)
    certainty_N: npt.NDArray[np.float64] = np.maximum(ahead_N / unit_N, 0.0)
    return certainty_N


def match_keys(keys_a: pa.ChunkedArray, keys_b: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the images that two runs both have, by their keys, each of which occurs once in a run.

    Returns:
        Their rows in A, rising, and in B, int64 [N].
    """
    if keys_a.equals(keys_b):
        rows_N = np.arange(len(keys_a))
        return rows_N, rows_N
    rows_a = pc.index_in(keys_b, value_set=keys_a)
    is_found_N = rows_a.is_valid().to_numpy()
    rows_a_N = rows_a.drop_null().to_numpy().astype(np.int64)
    order_N = np.argsort(rows_a_N)
    return rows_a_N[order_N], np.flatnonzero(is_found_N)[order_N]
