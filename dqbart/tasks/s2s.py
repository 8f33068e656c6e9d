"""Text in, text out, with an encoder alone: UniLM's way, by its attention mask (MiniLM's generation results)."""

import string
from pathlib import Path
from typing import Any

from dqbart.data.columns import Examples
from dqbart.data.s2s import S2sCollator, S2sLayout, SeededItems, encode_s2s
from dqbart.data.splits import read_split
from dqbart.evaluation.metrics import score
from dqbart.evaluation.s2s_generate import write_texts_s2s
from dqbart.recipe import Recipe
from dqbart.tasks import PROBES, Outcome, Task
from dqbart.teacher import task_of_run

SPECIAL = 2  # tokens around a source


class EncoderSequenceToSequence(Task):
    """Source and target share the model's positions; the targets' tokens are predicted from [MASK]s of their own."""

    def __init__(self, recipe: Recipe, tokenizer: Any, model: Any, folder: Any = None) -> None:
        super().__init__(recipe, tokenizer)
        self.folder = folder
        self.layout = S2sLayout.of(model, tokenizer)

    def read_split(self, data: Any, split: str) -> Examples:
        return read_split(data, self.recipe, split)

    def adapt(self, model: Any, *, new_head: bool) -> Any:
        if self.recipe.terms.keys() - {"task", "logits"}:
            other = min(self.recipe.terms.keys() - {"task", "logits"})
            raise ValueError(
                f"losses.{other}: task 's2s' compares outputs alone; expected task and logits, such as with method 'dq'"
            )
        named = isinstance(self.folder, str | Path)
        if not new_head and named and "logits" in self.recipe.terms and task_of_run(self.folder) != "s2s":
            raise ValueError(
                f"{str(self.folder)!r}: nothing says that it can write; fine-tune it first, with --task s2s "
                "--method finetune --bits 32-32-32 (and --epochs 0 if it was fine-tuned elsewhere)"
            )
        return model

    def training_set(self, train: Examples, teacher: Any, folder: Path) -> tuple[Any, Any]:
        if train.targets is None:
            raise ValueError("no target column to learn from; give --target-column")
        pairs = encode_s2s(
            self.tokenizer, self.layout, train.sources, train.targets, max_source_length=self._source_length(),
            max_target_length=self.recipe.max_target_length, source_prefix=self.recipe.source_prefix,
        )  # fmt: skip
        return SeededItems(pairs, self.recipe.seed), S2sCollator(self.layout)

    def is_scored(self, examples: Examples) -> bool:
        return examples.targets is not None

    def score(self, model: Any, examples: Examples, *, settings: Any = None) -> Outcome:
        texts, settings = self.write(model, examples.sources, settings)
        references: Any = examples.references or examples.targets
        found = score(
            self.recipe.scored_by, texts, references, language=self.recipe.written_in,
            lowercase=lowers_case(self.tokenizer), generation=settings,
        )  # fmt: skip
        return Outcome(found, texts)

    def write(self, model: Any, sources: list[str], settings: Any = None) -> tuple[list[str], dict[str, Any]]:
        settings = dict(self.recipe.generation if settings is None else settings)
        texts = write_texts_s2s(
            model, self.tokenizer, sources, batch_size=self.recipe.eval_batch_size,
            max_source_length=self._source_length(), max_target_length=self.recipe.max_target_length,
            source_prefix=self.recipe.source_prefix, **settings,
        )  # fmt: skip
        return texts, settings

    def shown(self, examples: Examples) -> list[dict[str, str]]:
        targets = examples.targets or [""] * len(examples)
        return [{"source": s, "reference": t} for s, t in zip(examples.sources, targets, strict=True)]

    def probe(self, model: Any, examples: Examples | None) -> dict[str, Any]:
        if examples is None or examples.targets is None:
            return super().probe(model, examples)
        few = examples.select(range(min(PROBES, len(examples))))
        assert few.targets is not None
        pairs = encode_s2s(
            self.tokenizer, self.layout, few.sources, few.targets, max_source_length=min(64, self._source_length()),
            max_target_length=min(32, self.recipe.max_target_length),
        )  # fmt: skip
        batch = S2sCollator(self.layout, rate=0.0, random_rate=0.0, keep_rate=0.0)(list(pairs))
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def _source_length(self) -> int:
        left = self.layout.positions - self.recipe.max_target_length
        if left < SPECIAL + 1:
            raise ValueError(
                f"max_target_length {self.recipe.max_target_length}: source and target share the model's "
                f"{self.layout.positions} positions, and {left} are left for sources; give less in --config"
            )
        return min(self.recipe.max_source_length, left)


def lowers_case(tokenizer: Any) -> bool:
    """Whether all comes out of the tokenizer in lower case: if case counted, a perfect writer had some 65 BLEU."""
    letters = tokenizer(" ".join(string.ascii_uppercase), add_special_tokens=False)["input_ids"]
    said = tokenizer.decode(letters, skip_special_tokens=True)  # without those that it doesn't know
    return bool(said != said.upper())
