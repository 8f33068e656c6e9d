"""Sentence embeddings: students that put sentences where their teacher puts them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dqbart.data.columns import read_value
from dqbart.data.files import load_rows
from dqbart.data.labelled import LabelCollator, Labelled, encode_labelled, guess_label_columns, read_labelled
from dqbart.data.labels import SCORE_NAMES
from dqbart.data.splits import data_name
from dqbart.engines.sentence import SentenceEncoder
from dqbart.evaluation.label_metrics import score_labels
from dqbart.packed.sentence import Pooling, read_pooling, sentence_folder, write_pooling
from dqbart.recipe import Recipe
from dqbart.tasks import PROBES, Outcome, Task


def _similarities(rows: list[dict[str, Any]], column: str | None) -> bool:
    """Whether an unasked-for column is one of similarities: by its name, or because it has fractions."""
    if column is None:
        return False
    if column.rpartition(".")[2].lower() in SCORE_NAMES:
        return True
    try:
        return not all(float(value).is_integer() for row in rows if (value := read_value(row, column)) is not None)
    except (TypeError, ValueError, OverflowError):  # names of classes
        return False


class Sentences(Task):
    """Learns from sentences alone, labels or not. Pairs with a similarity score it: correlation with the cosines."""

    def __init__(self, recipe: Recipe, tokenizer: Any, model: Any, name: Any) -> None:
        super().__init__(recipe, tokenizer)
        folder = sentence_folder(name)
        found = read_pooling(folder) if folder is not None else None
        self.pooling = found or Pooling()
        how = f"{self.pooling.mode} of its tokens{', normalized' if self.pooling.normalize else ''}"
        why = "" if found else " (no modules.json says otherwise)"
        print(f"a sentence's vector: {how}{why}", file=sys.stderr, flush=True)
        body = model.model if isinstance(model, SentenceEncoder) else model
        self.length = min(recipe.max_source_length, SentenceEncoder(body, tokenizer, self.pooling).max_seq_length)
        self.collator = LabelCollator(tokenizer.pad_token_id)

    def read_split(self, data: Any, split: str) -> Labelled:
        recipe = self.recipe
        rows = load_rows(data, split=split)
        if not rows:
            raise ValueError(f"data {str(data)[:200]!r}: no rows; expected at least one")
        columns = guess_label_columns(rows, recipe.source_column, recipe.pair_column, recipe.target_column)
        if columns.pair is None or (recipe.target_column is None and not _similarities(rows, columns.label)):
            columns = dataclasses.replace(columns, label=None)  # a class says nothing of similarity
        found = read_labelled(rows, columns, None, "regression")
        prefix = recipe.source_prefix
        pairs = None if found.pairs is None else [prefix + text for text in found.pairs]
        found = dataclasses.replace(found, texts=[prefix + text for text in found.texts], pairs=pairs)
        print(f"{data_name(data)} ({split}): {found}; {columns}", file=sys.stderr, flush=True)
        return found

    def training_set(self, train: Labelled, teacher: Any, folder: Path) -> tuple[Any, Any]:
        return self._encode(train), self.collator

    def is_scored(self, examples: Labelled) -> bool:
        return examples.labels is not None

    def why_unscored(self, data: Any, examples: Labelled) -> str:
        if examples.hidden:
            return super().why_unscored(data, examples)
        return (
            f"data {data_name(data)!r}: no pairs of sentences with similarities to score against; give --pair-column "
            "and --target-column"
        )

    def score(self, model: Any, examples: Labelled, *, settings: Any = None) -> Outcome:
        assert examples.pairs is not None
        encoder = model if isinstance(model, SentenceEncoder) else SentenceEncoder(model, self.tokenizer, self.pooling)
        sides = [
            np.asarray(encoder.encode(texts, batch_size=self.recipe.eval_batch_size), np.float64)
            for texts in (examples.texts, examples.pairs)
        ]
        a_ND, b_ND = (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(1e-12) for x_ND in sides)
        cosines_N = (a_ND * b_ND).sum(1)
        found = score_labels(self.recipe.scored_by, cosines_N, examples.labels)
        found = dataclasses.replace(found, definition=f"of cosines of sentence embeddings; {found.definition}")
        return Outcome(found, [f"{cosine:.3f}" for cosine in cosines_N])

    def shown(self, examples: Labelled) -> list[dict[str, str]]:
        assert examples.pairs is not None and examples.labels is not None
        rows = zip(examples.texts, examples.pairs, examples.labels, strict=True)
        return [{"source": f"{a} | {b}", "reference": str(label)} for a, b, label in rows]

    def probe(self, model: Any, examples: Labelled | None) -> dict[str, Any]:
        if examples is None:
            return super().probe(model, examples)
        return self.collator(list(self._encode(examples.select(range(min(PROBES, len(examples)))))))

    def complete(self, folder: Path) -> None:
        """So that sentence-transformers, and `dqbart.load`, know what the folder is."""
        write_pooling(folder, self.pooling)

    def _encode(self, examples: Labelled) -> Any:
        prompt = self.pooling.prompts.get(self.pooling.default_prompt_name or "", "")
        texts = [prompt + text for text in dict.fromkeys([*examples.texts, *(examples.pairs or [])])]
        texts = [text.lower() for text in texts] if self.pooling.lowercase else texts
        return encode_labelled(self.tokenizer, Labelled(texts), self.length)
