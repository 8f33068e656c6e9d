"""Scores of classes and of numbers, with everything that decides them said beside the number.

Accuracy, F1 and the Matthews correlation for classes, Pearson's and Spearman's correlation for numbers: a few lines of
NumPy each, so scikit-learn and SciPy are no dependencies. Where theirs give NaN (one side constant) the correlation
here is 0: nothing was told apart, and a run that compares students needs a number. Intervals come from resampling
examples and computing the whole statistic again: F1 and correlations are no means over examples, so averaging over
batches, as a training loop easily does, gives another number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dqbart.evaluation.metrics import Score, resampled_interval

# By kind, first the one that models are chosen by unless another is asked for.
LABEL_METRICS = {"classification": ("accuracy", "f1", "matthews"), "regression": ("spearman", "pearson")}


def score_labels(
    kind_or_metric: str,
    predictions: Any,
    references: Any,
    names: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 28,
) -> Score:
    """Score with all metrics of a kind, x 100, with 95 % intervals; a metric's own name puts it first.

    `predictions`: class ids `[N]` or logits `[N, C]`, highest wins; for regression numbers `[N]` or `[N, 1]`.
    `references`: ids or numbers `[N]`. `names`: of the classes in id order. Raises `ValueError` for another metric, no
    examples, sides of different lengths, ids that aren't whole or outside `names`, and values that aren't finite.
    """
    kinds = {name: kind for kind, metrics in LABEL_METRICS.items() for name in (kind, *metrics)}
    if kind_or_metric not in kinds:
        raise ValueError(f"metric {kind_or_metric!r}: expected one of {', '.join(kinds)}")
    kind = kinds[kind_or_metric]
    metric = LABEL_METRICS[kind][0] if kind_or_metric == kind else kind_or_metric
    order = sorted(LABEL_METRICS[kind], key=lambda name: name != metric)
    found, wanted = np.asarray(predictions), np.asarray(references)
    if found.ndim not in (1, 2) or wanted.ndim != 1 or len(found) != len(wanted):
        raise ValueError(f"predictions {list(found.shape)} and references {list(wanted.shape)}: expected one each")
    if not len(wanted):
        raise ValueError("nothing to score: no predictions; expected at least one")
    if kind == "classification":
        statistics, f1 = _of_classes(found, wanted, names)
        words = {
            "accuracy": "accuracy: share of examples with the right class",
            "f1": f1,
            "matthews": "Matthews correlation of classes (R_K, Gorodkin 2004)",
        }
    else:
        statistics = _of_numbers(found, wanted)
        words = {"spearman": "Spearman: Pearson's of ranks, ties by their mean", "pearson": "Pearson's correlation"}
    values = {name: 100 * statistics[name](np.arange(len(wanted))) for name in order}
    intervals: dict[str, list[float]] = {}
    for name in order:
        low, high = resampled_interval(len(wanted), statistics[name], resamples=resamples, seed=seed)
        intervals[name] = [100 * low, 100 * high]
    definition = "; ".join(words[name] for name in order)
    return Score(
        metric, values, intervals, len(wanted), "",
        f"{definition}; x 100, correlations 0 where one side is constant", {},
    )  # fmt: skip


# A statistic of the examples at some indices `[n]`, repeats allowed.
Statistic = Callable[[np.ndarray], float]


def _of_classes(
    predictions: np.ndarray, references: np.ndarray, names: Sequence[str] | None
) -> tuple[dict[str, Statistic], str]:
    """The statistics by name, and which F1 it is."""
    if predictions.ndim == 2:
        if predictions.shape[1] < 2 or (names is not None and predictions.shape[1] != len(names)):
            classes = "two classes or more" if names is None else f"{len(names)} classes"
            raise ValueError(f"logits {list(predictions.shape)}: expected {classes} for each example")
        _check_finite("logits", predictions)
        predictions = predictions.argmax(axis=1)
    for side, ids_N in (("predictions", predictions), ("references", references)):
        if ids_N.dtype.kind not in "iub":
            raise ValueError(f"{side} are {ids_N.dtype}; expected whole numbers, the ids of classes")
        wrong_N = (ids_N < 0) | (ids_N >= (np.inf if names is None else len(names)))
        if wrong_N.any():
            allowed = "at least 0" if names is None else f"0 to {len(names) - 1}"
            raise ValueError(f"{side} has class {ids_N[wrong_N][0]}: expected ids {allowed}")
    found_N, wanted_N = predictions.astype(np.int64), references.astype(np.int64)
    count = max(2, found_N.max() + 1, wanted_N.max() + 1) if names is None else len(names)

    def counts(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right ones, predictions and references of every class, `[C]`."""
        found, wanted = found_N[drawn], wanted_N[drawn]
        sides = (found[found == wanted], found, wanted)
        right_C, found_C, wanted_C = (np.bincount(ids, minlength=count).astype(np.float64) for ids in sides)
        return right_C, found_C, wanted_C

    def accuracy(drawn: np.ndarray) -> float:
        return float((found_N[drawn] == wanted_N[drawn]).mean())

    def f1(drawn: np.ndarray) -> float:
        right_C, found_C, wanted_C = counts(drawn)
        both_C = found_C + wanted_C
        if count == 2:
            return float(2 * right_C[1] / max(1.0, both_C[1]))
        seen_C = both_C > 0
        return float((2 * right_C[seen_C] / both_C[seen_C]).mean())

    def matthews(drawn: np.ndarray) -> float:
        right_C, found_C, wanted_C = counts(drawn)
        n = len(drawn)
        spread = (n * n - found_C @ found_C) * (n * n - wanted_C @ wanted_C)
        return float((right_C.sum() * n - found_C @ wanted_C) / np.sqrt(spread)) if spread else 0.0

    positive = f" ({names[1]!r})" if names is not None else ""
    words = (
        f"F1 of class 1{positive}, 0 where it is neither predicted nor right"
        if count == 2
        else "macro F1: mean over the classes that are predicted or right somewhere"
    )
    return {"accuracy": accuracy, "f1": f1, "matthews": matthews}, words


def _of_numbers(predictions: np.ndarray, references: np.ndarray) -> dict[str, Statistic]:
    if predictions.ndim == 2 and predictions.shape[1] != 1:
        raise ValueError(f"predictions {list(predictions.shape)}: expected one number for each example")
    for side, values in (("predictions", predictions), ("references", references)):
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{side} are {values.dtype}; expected numbers")
        _check_finite(side, values)
    found_N, wanted_N = predictions.reshape(-1).astype(np.float64), references.astype(np.float64)
    levels = [np.unique(values, return_inverse=True)[1] for values in (found_N, wanted_N)]
    return {
        "spearman": lambda drawn: _correlation(*(_ranks(levels_N[drawn]) for levels_N in levels)),
        "pearson": lambda drawn: _correlation(found_N[drawn], wanted_N[drawn]),
    }


def _ranks(levels_N: np.ndarray) -> np.ndarray:
    """Ranks from 1 of whole numbers from 0, equal ones sharing their mean."""
    counts = np.bincount(levels_N)
    return (np.cumsum(counts) - (counts - 1) / 2)[levels_N]


def _correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's, 0 if a side is constant; scaled first, so that no square overflows or vanishes."""
    sides = []
    for values_N in (x_N, y_N):
        if np.ptp(values_N) == 0:  # the mean of equal numbers may be another number
            return 0.0
        values_N = values_N / np.abs(values_N).max()
        values_N = values_N - values_N.mean()
        sides.append(values_N / np.linalg.norm(values_N))
    return float(np.clip(sides[0] @ sides[1], -1, 1))


def _check_finite(what: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        row = np.argwhere(~np.isfinite(values))[0][0]
        raise ValueError(f"{what} of example {row} are not finite: {values[row]!s:.60}; the model is broken")
