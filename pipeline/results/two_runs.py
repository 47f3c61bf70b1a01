"""Two finished runs side by side, or two classifiers of one run.

Input: finished runs and the pairs of classifiers that are asked for. Output: a `Comparison`, and its two tables.
Invariant: images are matched by their keys, and each has the same class in both runs.

Axes: N images that both runs have, n of them that changed. A is the first run, or classifier, and B the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import DataError, OptionError, OutputError, counted, quoted
from pipeline.results.comparison import Paired, compare, margins, match_keys
from pipeline.results.finished import FinishedRun, Predictions, read_predictions, read_scores
from pipeline.results.texts import option_name
from pipeline.results.writing import Output, write_table

COMPARISON, CHANGES, PAGE = "comparison", "changes", "compare.html"
COMPARISON_SCHEMA = pa.schema(
    [("classifier_a", pa.string()), ("classifier_b", pa.string()), ("scope", pa.string()), ("class", pa.string()),
     ("num_images", pa.int64()), ("num_correct_a", pa.int64()), ("num_correct_b", pa.int64()),
     ("num_only_a", pa.int64()), ("num_only_b", pa.int64()), ("accuracy_a", pa.float64()),
     ("accuracy_b", pa.float64()), ("difference", pa.float64()), ("difference_low", pa.float64()),
     ("difference_high", pa.float64()), ("p_value", pa.float64()), ("p_value_holm", pa.float64())]
)  # fmt: skip
CHANGES_SCHEMA = pa.schema(
    [("classifier_a", pa.string()), ("classifier_b", pa.string()), ("change", pa.string()), ("key", pa.string()),
     ("class", pa.string()), ("prediction_a", pa.string()), ("prediction_b", pa.string()),
     ("certainty", pa.float64())]
)  # fmt: skip
# What tells where a run was and how it was made, and nothing of its results.
_OPTIONS_OF_PLACE = frozenset(("out", "overwrite", "resume", "scratch"))
_FACTS = ("version", "versions", "target", "num_train", "learning_rate", "stopped_by", "devices", "model.sha256",
          "scores.sha256")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A classifier of A beside one of B.

    Attributes:
        classifier_a: Its name.
        classifier_b: Likewise.
        is_best: Whether each is the best of its run, on the images that are compared; False where pairs were asked for.
        rows: The figures of all images, then of each class.
        changes: Rows of `CHANGES_SCHEMA`: right in A and wrong in B, then the reverse, most certain first.
    """

    classifier_a: str
    classifier_b: str
    is_best: bool
    rows: list[Paired]
    changes: pa.Table


@dataclass(frozen=True)
class Comparison:
    """Two runs, or two classifiers of one, compared.

    Attributes:
        a: The first run.
        b: The second; the same where there is one.
        num_images: Validation images that both have.
        num_only_in_a: That A alone has.
        num_only_in_b: That B alone has.
        differences: What the runs were made with, where it differs: the name, and both values.
        pairs: The pairs of classifiers.
    """

    a: FinishedRun
    b: FinishedRun
    num_images: int
    num_only_in_a: int
    num_only_in_b: int
    differences: list[tuple[str, Any, Any]]
    pairs: list[Pair]


def compare_runs(a: FinishedRun, b: FinishedRun, asked: Sequence[str] = ()) -> Comparison:
    """Compare pairs of classifiers on the validation images that two runs both have.

    Args:
        a: The first run.
        b: The second; the same object to compare classifiers of one run.
        asked: Of two runs: classifiers that both have, or `x:y` for one of A and one of B; without any, all that both
            have, and the best of each. Of one run: classifiers that are compared each with each, or `x:y`.

    Raises:
        OptionError: If a classifier is unknown, or one alone is asked for of one run.
        DataError: If the runs are of other datasets or classes.
        OutputError: If a run cannot be read.
    """
    if set(a.classes) != set(b.classes):
        unlike = sorted(set(a.classes) ^ set(b.classes))
        raise DataError(
            f"{b.given}: expected the {len(a.classes)} classes of {a.given}, got {len(b.classes)}, and "
            f"{quoted(unlike[0])} is in one of them alone; compare runs of one dataset with the same --classes"
        )
    pairs = _choose_pairs(a, b, asked)
    used_a, used_b = a.classifiers, b.classifiers
    if asked:
        used_a, used_b = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    # One run is read once.
    names = list(dict.fromkeys([*a.classes, *a.all_classes, *b.all_classes]))
    found_a = read_predictions(a, names, list(dict.fromkeys([*used_a, *used_b])) if a is b else used_a)
    found_b = found_a if a is b else read_predictions(b, names, used_b)
    rows_a_N, rows_b_N = match_keys(found_a.keys, found_b.keys)
    _check_images(a, b, (found_a, rows_a_N), (found_b, rows_b_N))
    best = None if asked else (_best(found_a, rows_a_N), _best(found_b, rows_b_N))
    if best is not None and best not in pairs:
        pairs.append(best)
    matched = _Matched(a, b, names, found_a, found_b, rows_a_N, rows_b_N)
    return Comparison(
        a=a,
        b=b,
        num_images=len(rows_a_N),
        num_only_in_a=len(found_a.labels_N) - len(rows_a_N),
        num_only_in_b=len(found_b.labels_N) - len(rows_b_N),
        differences=_differences(a.run, b.run),
        pairs=[_compare_pair(matched, *pair, is_best=pair == best) for pair in pairs],
    )


@dataclass(frozen=True)
class _Matched:
    """What is compared; rows are those of the N images in each run, names those that classes are numbered by."""

    a: FinishedRun
    b: FinishedRun
    names: list[str]
    found_a: Predictions
    found_b: Predictions
    rows_a_N: npt.NDArray[np.int64]
    rows_b_N: npt.NDArray[np.int64]


def _choose_pairs(a: FinishedRun, b: FinishedRun, asked: Sequence[str]) -> list[tuple[str, str]]:
    if not asked and a is not b:
        return [(name, name) for name in a.classifiers if name in b.classifiers]
    pairs = [(first, second or first) for first, _, second in (text.partition(":") for text in asked)]
    for run, names in ((a, [first for first, _ in pairs]), (b, [second for _, second in pairs])):
        if unknown := [name for name in names if name not in run.classifiers]:
            raise OptionError(
                f"--classifiers: expected classifiers of {run.given}, got {unknown[0]}; it has "
                f"{', '.join(run.classifiers)}"
            )
    if a is not b:
        return list(dict.fromkeys(pairs))
    singles = [text for text in asked if ":" not in text]
    crossed = [(first, second) for index, first in enumerate(singles) for second in singles[index + 1 :]]
    pairs = list(dict.fromkeys([*crossed, *(pair for pair, text in zip(pairs, asked, strict=True) if ":" in text)]))
    if not pairs or len(singles) == 1:
        raise OptionError(
            f"--classifiers: expected two of one run, got {', '.join(asked) or 'none'}; as "
            f"{','.join(a.classifiers[-2:])}, or give a second run"
        )
    return pairs


def _check_images(
    a: FinishedRun,
    b: FinishedRun,
    in_a: tuple[Predictions, npt.NDArray[np.int64]],
    in_b: tuple[Predictions, npt.NDArray[np.int64]],
) -> None:
    (found_a, rows_a_N), (found_b, rows_b_N) = in_a, in_b
    if len(rows_a_N) == 0:
        raise DataError(
            f"{b.given}: expected validation images of {a.given}, got none of its "
            f"{counted(len(found_a.labels_N), 'key')}; compare runs of one dataset"
        )
    labels_a_N, labels_b_N = found_a.labels_N[rows_a_N], found_b.labels_N[rows_b_N]
    if len(unlike := np.flatnonzero(labels_a_N != labels_b_N)):
        row = unlike[0]
        key = found_a.keys[int(rows_a_N[row])].as_py()
        raise DataError(
            f"{b.given}: expected every image to have the class that it has in {a.given}, got {key} as "
            f"{quoted(a.classes[labels_b_N[row]])} in place of {quoted(a.classes[labels_a_N[row]])}, and "
            f"{len(unlike) - 1:,} more; "
            "compare runs of one dataset"
        )


def _best(found: Predictions, rows_N: npt.NDArray[np.int64]) -> str:
    """Return the classifier that gets most of the images right, the first on a tie."""
    labels_N = found.labels_N[rows_N]
    num_right = {name: int((codes[rows_N] == labels_N).sum()) for name, codes in found.predictions.items()}
    return max(num_right, key=lambda name: num_right[name])


def _compare_pair(matched: _Matched, classifier_a: str, classifier_b: str, *, is_best: bool) -> Pair:
    labels_N = matched.found_a.labels_N[matched.rows_a_N]
    codes_a_N = matched.found_a.predictions[classifier_a][matched.rows_a_N]
    codes_b_N = matched.found_b.predictions[classifier_b][matched.rows_b_N]
    is_right_a_N, is_right_b_N = codes_a_N == labels_N, codes_b_N == labels_N
    names, tables = np.array([*matched.names, None], object), []  # -1 is no class of them
    # Of the two predictions it is the wrong one whose certainty says where to look first.
    for change, is_changed_N, run, name, rows_N, codes_N in (
        ("right_to_wrong", is_right_a_N & ~is_right_b_N, matched.b, classifier_b, matched.rows_b_N, codes_b_N),
        ("wrong_to_right", is_right_b_N & ~is_right_a_N, matched.a, classifier_a, matched.rows_a_N, codes_a_N),
    ):
        changed_n = np.flatnonzero(is_changed_N)
        certainty_n = _certainties(run, name, matched.names, rows_N[changed_n], codes_N[changed_n])
        order_n = np.argsort(-certainty_n, kind="stable")  # those without scores last
        changed_n, num = changed_n[order_n], len(changed_n)
        columns = [
            [classifier_a] * num,
            [classifier_b] * num,
            [change] * num,
            matched.found_a.keys.take(pa.array(matched.rows_a_N[changed_n])),
            *(pa.array(names[codes[changed_n]], pa.string()) for codes in (labels_N, codes_a_N, codes_b_N)),
            pa.array(np.minimum(certainty_n[order_n], 1.0), from_pandas=True),  # NaN as null
        ]
        tables.append(pa.table(columns, schema=CHANGES_SCHEMA))
    rows = compare(labels_N, is_right_a_N, is_right_b_N, matched.a.classes)
    return Pair(classifier_a, classifier_b, is_best, rows, pa.concat_tables(tables))


def _certainties(
    run: FinishedRun,
    classifier: str,
    classes: Sequence[str],
    rows_n: npt.NDArray[np.int64],
    codes_n: npt.NDArray[np.int32],
) -> npt.NDArray[np.float64]:
    """Read the scores of some images, and measure how certain their predictions are.

    NaN without scores, and for a class that the dataset lacks.
    """
    certainty_n = np.full(len(rows_n), np.nan)
    for places, scores, is_whole in read_scores(run, classes, classifier, rows_n):
        own_n = codes_n[places]
        is_known = own_n >= 0
        own_n = own_n[is_known] if is_whole else np.zeros(int(is_known.sum()), own_n.dtype)
        certainty_n[places[is_known]] = margins(scores[is_known], own_n)
    return certainty_n


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List options and facts of two runs that differ; what one of them does not know is None."""

    def flat(run: Mapping[str, Any]) -> dict[str, Any]:
        options = {option_name(name): value for name, value in run["options"].items()
                   if name not in _OPTIONS_OF_PLACE}  # fmt: skip
        facts = {"dataset.root": run["dataset"].get("root"), "devices": run.get("actors", {}).get("devices"),
                 "model.sha256": (run.get("model") or {}).get("sha256"),
                 "scores.sha256": (run.get("scores") or {}).get("sha256")}  # fmt: skip
        for name in _FACTS:
            if isinstance(value := run.get(name, facts.get(name)), Mapping):
                facts.update({f"{name}.{key}": each for key, each in value.items()})
            else:
                facts[name] = value
        return {**options, **facts}

    flat_a, flat_b = flat(a), flat(b)
    names = dict.fromkeys([*flat_a, *flat_b])
    return [(name, flat_a.get(name), flat_b.get(name)) for name in names if flat_a.get(name) != flat_b.get(name)]


def comparison_table(comparison: Comparison) -> pa.Table:
    """Lay out `comparison.parquet`: of each pair a row of all images, then one a class."""
    rows = []
    for pair in comparison.pairs:
        for row in pair.rows:
            figures = {**asdict(row), "class": row.class_name}
            rows.append({**figures, "classifier_a": pair.classifier_a, "classifier_b": pair.classifier_b})
    return pa.Table.from_pylist(rows, schema=COMPARISON_SCHEMA)


def write_comparison(output: Output, comparison: Comparison) -> None:
    """Write `comparison.parquet` and `changes.parquet` into a folder that holds no more than a comparison.

    Raises:
        OutputError: If it holds other files, or cannot be written.
    """
    store, root = output.store
    own = {PAGE, *(f"{name}.parquet" for name in (COMPARISON, CHANGES))}
    try:
        if foreign := [entry.name for entry in store.entries(root, recursive=False) if entry.name not in own]:
            raise OutputError(
                f"--out {output.root}: expected a new or empty folder, or one with a comparison, got {foreign[0]} in "
                "it; choose another"
            )
        store.make_folder(root)
    except OSError as exc:
        raise OutputError(f"--out {output.root}: expected to write there, got {exc}; choose another") from exc
    write_table(output, COMPARISON, comparison_table(comparison))
    write_table(output, CHANGES, pa.concat_tables([pair.changes for pair in comparison.pairs]))
