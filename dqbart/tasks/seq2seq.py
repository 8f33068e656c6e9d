"""Text in, text out, with an encoder-decoder: summaries, translations, whatever pairs say."""

import sys
from pathlib import Path
from typing import Any

from dqbart.data.batches import Collator, encode_pairs, set_languages
from dqbart.data.columns import Examples
from dqbart.data.decoding import SAMPLING_SETTINGS
from dqbart.data.pseudo import write_targets
from dqbart.data.splits import read_split
from dqbart.evaluation.generate import effective_generation, write_outputs
from dqbart.evaluation.metrics import score
from dqbart.packed.gate import probe_inputs
from dqbart.recipe import Recipe
from dqbart.tasks import PROBES, Outcome, Task


class SequenceToSequence(Task):
    """BART's and mBART's task; without targets the teacher writes them."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        super().__init__(recipe, tokenizer)
        set_languages(tokenizer, recipe.source_lang, recipe.target_lang)

    def read_split(self, data: Any, split: str) -> Examples:
        return read_split(data, self.recipe, split)

    def training_set(self, train: Examples, teacher: Any, folder: Path) -> tuple[Any, Any]:
        from accelerate import PartialState

        recipe = self.recipe
        languages: dict[str, Any] = {"source_lang": recipe.source_lang, "target_lang": recipe.target_lang}
        targets = train.targets
        if targets is None:
            with PartialState().main_process_first():
                targets = write_targets(
                    teacher, self.tokenizer, train.sources, cache_dir=folder / "targets",
                    generation=recipe.generation, max_target_length=recipe.max_target_length,
                    batch_size=recipe.eval_batch_size, max_source_length=recipe.max_source_length,
                    source_prefix=recipe.source_prefix, **languages,
                )  # fmt: skip
        pairs = encode_pairs(
            self.tokenizer, train.sources, targets, max_source_length=recipe.max_source_length,
            max_target_length=recipe.max_target_length, source_prefix=recipe.source_prefix, **languages,
        )  # fmt: skip
        return pairs, Collator(self.tokenizer.pad_token_id)

    def is_scored(self, examples: Examples) -> bool:
        return examples.targets is not None

    def score(self, model: Any, examples: Examples, *, settings: Any = None) -> Outcome:
        texts, settings = self.write(model, examples.sources, settings)
        references: Any = examples.references or examples.targets
        found = score(self.recipe.scored_by, texts, references, language=self.recipe.written_in, generation=settings)
        return Outcome(found, texts)

    def write(self, model: Any, sources: list[str], settings: Any = None) -> tuple[list[str], dict[str, Any]]:
        return write_outputs(model, self.tokenizer, sources, self.recipe, generation=settings)

    def shown(self, examples: Examples) -> list[dict[str, str]]:
        targets = examples.targets or [""] * len(examples)
        return [{"source": s, "reference": t} for s, t in zip(examples.sources, targets, strict=True)]

    def probe(self, model: Any, examples: Examples | None) -> dict[str, Any]:
        texts = [self.recipe.source_prefix + text for text in examples.sources[:PROBES]] if examples else []
        return probe_inputs(model, self.tokenizer, texts, self.recipe.max_source_length)

    def settle(self, student: Any, teacher: Any) -> None:
        """Plain `.generate()` is to do what was scored."""
        settings = effective_generation(
            teacher, self.recipe.generation, tokenizer=self.tokenizer, target_lang=self.recipe.target_lang,
            max_target_length=self.recipe.max_target_length,
        )  # fmt: skip
        nothing = dict.fromkeys(SAMPLING_SETTINGS)  # where nothing is sampled transformers refuses to save any of them
        before = student.generation_config.to_dict() | settings
        student.generation_config.update(**nothing | settings)
        unread = sorted(SAMPLING_SETTINGS - settings.keys())
        useless = [f"{name} {before[name]}" for name in unread if before.get(name) is not None]
        if useless:
            print(f"not sampling: {', '.join(useless)} left out of the settings", file=sys.stderr, flush=True)
