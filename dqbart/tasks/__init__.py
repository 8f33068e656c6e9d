"""What a model is for: how its data is read and encoded, how it is scored, what is shown of its outputs.

A task ties together readers (dqbart/data), collators and metrics (dqbart/evaluation) behind the few calls that the
pipeline and the command line make, so that neither knows one task from another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dqbart.evaluation.metrics import Score
from dqbart.recipe import METRICS, Recipe


@dataclass(frozen=True)
class Outcome:
    """The score of a model on examples, and one output per example, as text."""

    score: Score
    outputs: list[str]


class Task(Protocol):
    """`examples` are what `read` gives: lists of texts that have a length, `select` and fields that JSON can hold."""

    def read(self, data: Any, dev_data: Any) -> tuple[Any, Any]:
        """`(train, dev)`, each None where there is none. Says on stderr what is used of the data."""

    def read_split(self, data: Any, split: str) -> Any:
        """The examples of one split."""

    def adapt(self, model: Any, train: Any, dev: Any) -> Any:
        """The model as the data needs it, such as with a new head; the same object where it fits."""

    def training_set(self, train: Any, teacher: Any, folder: Path) -> tuple[Any, Any]:
        """A data set and a collator for the trainer. `folder` keeps what is costly to make."""

    def is_scored(self, examples: Any) -> bool:
        """Whether the examples have what a score needs."""

    def score(self, model: Any, examples: Any, *, metric: str | None = None, settings: Any = None) -> Outcome:
        """The model's outputs for the examples, scored. `settings`: generation settings of another model's score."""

    def shown(self, examples: Any) -> list[dict[str, str]]:
        """Source and reference of every example, for people to read."""

    def probe(self, model: Any, examples: Any) -> dict[str, Any]:
        """A batch, as the model takes it, on which a packed model is held to its student."""

    def settle(self, student: Any, teacher: Any) -> None:
        """What is left to write into the student's configuration before it is packed."""


def open_task(recipe: Recipe, tokenizer: Any) -> Task:
    """The task of a resolved recipe. Raises `ValueError` for one that is not known."""
    if recipe.task == "seq2seq":
        from dqbart.tasks.seq2seq import SequenceToSequence

        return SequenceToSequence(recipe, tokenizer)
    raise ValueError(f"task {recipe.task!r}: expected one of {', '.join(METRICS)}")
