"""DynaBERT around its training: what the rewiring is measured on, the dev score, the table of sub-networks.

A network that is to work at every width and depth is chosen by its mean score over all of them, as released: by the
whole network alone, which begins as the teacher, the first students would win every time.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

from torch import Tensor

from dqbart.data.batches import LABELS, model_inputs
from dqbart.data.columns import sample
from dqbart.distill.elastic import head_terms, say
from dqbart.evaluation.metrics import Score
from dqbart.recipe import Recipe
from dqbart.student.importance import importance, rewire
from dqbart.student.maps import kept_layers
from dqbart.student.width import subnetwork, width_sizes
from dqbart.tasks import Task

MOST = 2048  # examples, and rows of them, that importance is measured on; released: the whole dev set


def importance_examples(task: Task, train: Any, dev: Any) -> Any:
    """Up to `MOST` examples with labels, of the dev set if it has any, else of the training data. Raises `ValueError`
    where there are none.
    """
    examples = dev if dev is not None and task.is_scored(dev) else train
    if examples is None or not task.is_scored(examples):
        raise ValueError(
            f"method {task.recipe.method!r}: the importance of heads and neurons is measured on labels, and there are "
            "none; give --data or --dev-data with labels, and --target-column if theirs has another name"
        )
    return sample(examples, MOST)


def rewire_student(student: Any, teacher: Any, task: Task, examples: Any, work: Any) -> None:
    """Put the heads and neurons of a student, a copy of its teacher, in order of importance, in place."""
    encoded, collator = task.training_set(examples, teacher, work)
    step = max(1, math.ceil(len(encoded) / MOST))  # a text without documents is one example and any number of rows
    rows = [encoded[i] for i in range(0, len(encoded), step)]

    def batches() -> Iterator[dict[str, Tensor]]:
        size = task.recipe.batch_size
        for start in range(0, len(rows), size):
            batch = collator(rows[start : start + size])
            yield model_inputs(teacher, batch) | {name: batch[name] for name in LABELS if name in batch}

    found = importance(teacher, batches(), label_loss)
    rewire(student, found.head_order, found.neuron_order)


def label_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the labels say of a model's outputs, as in training: no whole logits of words, nothing of padding."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    return head_terms({"task": 1.0}, say(model, inputs), None, batch)[0]


def mean_score(task: Task, student: Any, examples: Any, recipe: Recipe) -> Score:
    """The mean over all sub-networks that a stage trains."""
    scores = [
        task.score(subnetwork(student, width, depth), examples).score
        for width, depth in product(recipe.widths, recipe.depths)
    ]
    means = {name: sum(score.values[name] for score in scores) / len(scores) for name in scores[0].values}
    words = f"mean over {len(scores)} sub-networks: {scores[0].definition}"
    return dataclasses.replace(scores[0], values=means, intervals={}, definition=words)


def score_subnetworks(task: Task, student: Any, examples: Any) -> list[dict[str, Any]]:
    """For report.json: size and score of each sub-network that was trained, the largest first."""
    last, rows = task.recipe.stages()[-1], []
    for depth, width in product(sorted(last.depths, reverse=True), sorted(last.widths, reverse=True)):
        part = subnetwork(student, width, depth)
        heads, neurons = width_sizes(student.config, width)
        score = task.score(part, examples).score
        print(
            f"width {width:g}, depth {depth:g}: {part.num_parameters():,} parameters, {score}",
            file=sys.stderr,
            flush=True,
        )
        row = {
            "width": width, "depth": depth, "heads": heads, "neurons": neurons,
            "layers": kept_layers(student.config.num_hidden_layers, depth), "parameters": part.num_parameters(),
            "score": score.to_dict(),
        }  # fmt: skip
        rows.append(row)
    return rows
