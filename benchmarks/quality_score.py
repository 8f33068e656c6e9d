"""What a cell is scored on, and how far these examples decide: 95 % intervals of a score and of what a student keeps.

Problem: seeds that agree within 0.1 BLEU are no proof when the test set itself is good for 1.4: the deviation over
seeds is about training only. Method: examples are drawn with replacement, the same ones for the teacher and for all
seeds of a student, whose mean is taken in every draw. Rejected: intervals of single runs, averaged (they are wider than
the mean's), and a hierarchical bootstrap over seeds (three are too few to draw from).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality_grid import MAIN

from dqbart.data.columns import Examples, sample
from dqbart.data.splits import read_split
from dqbart.evaluation import metrics
from dqbart.recipe import Recipe

Interval = list[float]


def test_set(data: str | Path, recipe: Recipe, most: int | None) -> tuple[Examples, Any]:
    """At most so many examples of the test split, and what is accepted for each; `ValueError` without targets."""
    examples = read_split(data, recipe, "test")
    if examples.targets is None:
        raise ValueError(f"data {str(data)!r}: its test split has no targets; a score needs them")
    examples = sample(examples, most or None)
    return examples, examples.references or examples.targets


def intervals(
    recipe: Recipe, runs: Sequence[list[str]], theirs: list[str], references: Any
) -> tuple[Interval, Interval | None]:
    """Of the mean score of `runs`, and of that mean / the teacher's score; no second where the teacher may score 0.

    `runs`: what each seed wrote, N texts; `theirs`: what the teacher wrote. Raises `ValueError` for lists of different
    lengths.
    """
    one: Callable[[Any], float] = metrics.bleu_of_sums
    if recipe.scored_by != "bleu":
        one = lambda sums: float(100 * sums[0] / len(theirs))  # noqa: E731

    def statistics(texts: list[str]) -> Any:
        if recipe.scored_by == "bleu":
            return metrics.bleu_statistics(texts, references, language=recipe.written_in)
        return metrics.rouge_per_example(texts, references, language=recipe.written_in)[MAIN["rouge"]][:, None]

    def both(sums: Any) -> tuple[float, float]:
        *ours, teacher = (one(part) for part in np.split(sums, len(runs) + 1))
        return float(np.mean(ours)), teacher

    def ratio(sums: Any) -> float:
        ours, teacher = both(sums)
        return ours / teacher if teacher else np.nan

    stats_NS = np.hstack([*map(statistics, runs), statistics(theirs)])
    low, high = metrics.bootstrap_interval(stats_NS, ratio)
    score = metrics.bootstrap_interval(stats_NS, lambda sums: both(sums)[0])
    return list(score), None if np.isnan(low + high) else [low, high]
