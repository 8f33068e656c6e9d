"""What a model is for: how its data is read and encoded, how it is scored, what is shown of its outputs.

A task ties together readers (dqbart/data), collators and metrics (dqbart/evaluation) behind the few calls that the
pipeline and the command line make, so that neither knows one task from another.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqbart.data.columns import hold_out
from dqbart.data.splits import data_name, train_and_dev
from dqbart.evaluation.metrics import Score
from dqbart.recipe import METRICS, Recipe

DEV_HELD_OUT = 500
HIDDEN = "all labels are -1, which is how sets hide those of a test split; give a split or a file that has them"
PROBES = 16  # examples on which a packed model is held to its student


@dataclass(frozen=True)
class Outcome:
    """The score of a model on examples, and one output per example, as text."""

    score: Score
    outputs: list[str]


class Task:
    """`examples` are what `read` gives: dataclasses of lists that have a length and `select`."""

    pooling: Any = None  # of sentence embeddings
    needs_references = True  # whether examples can lack what a score needs

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer

    def read(self, data: Any, dev_data: Any) -> tuple[Any, Any]:
        """`(train, dev)`, each None where there is none. Says on stderr what is used of the data. Raises `ValueError`
        for `dev_data` that lack what a score needs.
        """
        train, dev = train_and_dev(self.read_split, data, dev_data, self.recipe, self.hold_out, self.is_scored)
        if dev_data is not None and not self.is_scored(dev):
            why = self.why_unscored(dev_data, dev)
            if self.needs_references:
                raise ValueError(why)
            print(f"dev data {data_name(dev_data)!r}: not scored; {why}", file=sys.stderr, flush=True)
        return train, dev

    def read_split(self, data: Any, split: str) -> Any:
        """The examples of one split."""
        raise NotImplementedError

    def hold_out(self, train: Any) -> tuple[Any, Any] | None:
        """`(rest, dev)`: a tenth by hash, up to `DEV_HELD_OUT`, equal sources together; None of fewer than ten."""
        count = min(DEV_HELD_OUT, len(train) // 10)
        return hold_out(train, count) if count else None

    def adapt(self, model: Any, *, new_head: bool) -> Any:
        """The model with a head for the data that was read; the same object where it has one. Raises `ValueError` where
        it hasn't, and `new_head` doesn't allow one that knows nothing.
        """
        return model

    def training_set(self, train: Any, teacher: Any, folder: Path) -> tuple[Any, Any]:
        """A data set and a collator for the trainer. `folder` keeps what is costly to make."""
        raise NotImplementedError

    def is_scored(self, examples: Any) -> bool:
        """Whether the examples have what a score needs."""
        raise NotImplementedError

    def why_unscored(self, data: Any, examples: Any) -> str:
        """What is missing where `is_scored` is false, for an error."""
        if getattr(examples, "hidden", False):
            return f"data {data_name(data)!r}: {HIDDEN}"
        return f"data {data_name(data)!r}: no target column to score against; give --target-column"

    def score(self, model: Any, examples: Any, *, settings: Any = None) -> Outcome:
        """The model's outputs for the examples, scored. `settings`: generation settings of another model's score."""
        raise NotImplementedError

    def write(self, model: Any, sources: list[str], settings: Any = None) -> tuple[list[str], dict[str, Any]]:
        """One text per source, and the generation settings in force. Raises `ValueError` if the task has no texts."""
        raise ValueError(f"task {self.recipe.task!r} writes no texts; score the model with 'dqbart eval'")

    def shown(self, examples: Any) -> list[dict[str, str]]:
        """Source and reference of the examples that have an output, for people to read."""
        return []

    def probe(self, model: Any, examples: Any) -> dict[str, Any]:
        """A batch, as the model takes it, on which a packed model is held to its student; random ids by default."""
        from dqbart.packed.gate import probe_inputs

        return probe_inputs(model, self.tokenizer, [], 0)

    def settle(self, student: Any, teacher: Any) -> None:
        """Write what is left into the student's configuration before it is trained."""

    def complete(self, folder: Path) -> None:
        """Add what the folder of a student needs beside its model."""


def open_task(recipe: Recipe, tokenizer: Any, model: Any, folder: Any = None) -> Task:
    """The task of a resolved recipe, for models like this one, which came from `folder` if it came from one. Raises
    `ValueError` for a task that is not known.
    """
    if recipe.task == "seq2seq":
        from dqbart.tasks.seq2seq import SequenceToSequence

        return SequenceToSequence(recipe, tokenizer)
    if recipe.task in ("classification", "regression"):
        from dqbart.tasks.labels import Labels

        return Labels(recipe, tokenizer, model.config)
    if recipe.task == "text":
        from dqbart.tasks.text import PlainText

        return PlainText(recipe, tokenizer, model)
    if recipe.task == "questions":
        from dqbart.tasks.questions import QuestionAnswering

        return QuestionAnswering(recipe, tokenizer)
    if recipe.task == "sentences":
        from dqbart.tasks.sentences import Sentences

        return Sentences(recipe, tokenizer, model, folder)
    if recipe.task == "s2s":
        from dqbart.tasks.s2s import EncoderSequenceToSequence

        return EncoderSequenceToSequence(recipe, tokenizer, model, folder)
    raise ValueError(f"task {recipe.task!r}: expected one of {', '.join(METRICS)}")
