"""What the page says of a mistake is what the classifier went by."""

import pytest

from pipeline.results.evidence import scores_in_words
from pipeline.results.mistakes import Mistake

NEAR = (("a", "cat", 0.125), ("b", "cat", 0.25), ("c", "dog", 0.375))


@pytest.mark.parametrize(
    ("classifier", "scores", "is_weighted", "said"),
    [
        ("knn_1", (1.0, 0.0), False, "distance 0.1250 to cat, 0.3750 to dog"),
        ("knn_3", (2 / 3, 1 / 3), False, "2 of 3 votes against 1"),
        ("knn_20", (0.75, 0.25), False, "15 of 20 votes against 5"),
        ("knn_20", (0.75, 0.25), True, "0.7500 of the votes against 0.2500"),
        ("nearest_mean_l1", (0.1, 0.2), False, "distance 0.1000 against 0.2000"),
        ("nearest_mean_cosine", (0.1, 0.2), True, "distance 0.1000 against 0.2000"),
        ("sgd_linear", (0.9, 0.05), False, "probability 0.9000 against 0.0500"),
        ("model", (0.9, 0.05), False, "probability 0.9000 against 0.0500"),
        ("scores", (3.5, -2.0), False, "score 3.5000 against \u22122.0000"),
        ("scores", None, False, None),
    ],
)
def test_scores_are_said_in_the_terms_of_the_classifier(classifier, scores, is_weighted, said):
    mistake = Mistake("k", "dog", "cat", scores, NEAR, (0.0, 0.0))
    assert scores_in_words(classifier, mistake, is_weighted=is_weighted) == said


def test_a_class_that_no_neighbor_has_is_said_to_be_far():
    mistake = Mistake("k", "fox", "cat", (1.0, 0.0), NEAR, (0.0, 0.0))
    assert scores_in_words("knn_1", mistake, is_weighted=False) == "distance 0.1250 to cat, no fox near"
