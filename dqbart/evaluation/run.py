"""Score or run one model folder: what `dqbart eval` and `dqbart generate` do.

A packed folder brings its recipe, and with it prefix, languages, metric and length limits; a plain checkpoint
(a teacher, say) is run with transformers as it is, so that both can be compared by the same command.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dqbart.data.columns import hold_out
from dqbart.data.splits import read_split
from dqbart.evaluation.generate import write_outputs
from dqbart.evaluation.metrics import Score, score
from dqbart.recipe import Recipe
from dqbart.teacher import load_teacher


def open_model(folder: str, device: str | None) -> tuple[Any, Any, Recipe]:
    """`(model, tokenizer, recipe)`; the recipe of a plain checkpoint is the default one."""
    from transformers import AutoTokenizer

    from dqbart.engines import load

    recipe_file = Path(folder) / "recipe.yaml"
    if not recipe_file.is_file():
        model, tokenizer = load_teacher(folder, None, device)
        return model, tokenizer, Recipe()
    model = load(folder, device=device)
    return model, AutoTokenizer.from_pretrained(folder), Recipe.from_yaml(recipe_file)


def evaluate(
    folder: str,
    data: Any,
    *,
    split: str = "test",
    metric: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    generation: dict[str, Any] | None = None,
    device: str | None = None,
) -> tuple[Score, list[dict[str, str]]]:
    """Score with interval, and every source, reference and output. Raises as the readers and metrics do."""
    model, tokenizer, recipe = open_model(folder, device)
    recipe = dataclasses.replace(
        recipe,
        source_column=source_column or recipe.source_column,
        target_column=target_column or recipe.target_column,
    )
    examples = read_split(data, recipe, split)
    if examples.targets is None:
        raise ValueError(f"data {data!r}: no target column to score against; give --target-column")
    if limit is not None and limit < len(examples):
        examples = hold_out(examples, limit)[1]
    written, settings = write_outputs(
        model, tokenizer, examples.sources, recipe, generation=generation, batch_size=batch_size
    )
    references: Any = examples.references or examples.targets
    result = score(metric or recipe.metric, written, references, language=recipe.language, generation=settings)
    rows = [
        {"source": s, "reference": t, "output": o}
        for s, t, o in zip(examples.sources, examples.targets or [], written, strict=True)
    ]
    return result, rows


def write_texts(
    folder: str, texts: list[str], *, generation: dict[str, Any] | None = None, device: str | None = None
) -> list[str]:
    """One output per text, with the folder's own settings under `generation`."""
    model, tokenizer, recipe = open_model(folder, device)
    return write_outputs(model, tokenizer, texts, recipe, generation=generation)[0]
