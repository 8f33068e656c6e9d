"""Score or run one model folder: what `dqbart eval` and `dqbart generate` do.

A packed folder brings its recipe, and with it task, columns, metric and length limits; a plain checkpoint (a teacher,
say) is run with transformers as it is, so that both can be compared by the same command.
"""

import dataclasses
from pathlib import Path
from typing import Any

from dqbart.data.columns import sample
from dqbart.evaluation.metrics import Score
from dqbart.fitting import check_unread, resolve
from dqbart.packed.json_file import read_json
from dqbart.recipe import Recipe
from dqbart.tasks import open_task
from dqbart.teacher import load_teacher, task_of


def open_model(folder: str, device: str | None, task: str | None = None) -> tuple[Any, Any, Recipe]:
    """`(model, tokenizer, recipe)`; the recipe of a checkpoint that is not ours is the default one for its task."""
    from transformers import AutoConfig, AutoTokenizer

    from dqbart.engines import load

    recipe_file = Path(folder) / "recipe.yaml"
    if not recipe_file.is_file():
        if _is_packed(Path(folder)):
            config = AutoConfig.from_pretrained(folder)
            recipe = resolve(Recipe(task=task_of(folder, config, task, "model")), config)
            return load(folder, device=device), AutoTokenizer.from_pretrained(folder), recipe
        model, tokenizer, task = load_teacher(folder, None, device, task, role="model")
        return model, tokenizer, resolve(Recipe(task=task, epochs=0), model.config)  # nothing is trained
    recipe = Recipe.from_yaml(recipe_file)
    if task not in (None, recipe.task):
        raise ValueError(f"task {task!r}: {folder} was made for task {recipe.task!r}; leave --task out")
    return load(folder, device=device), AutoTokenizer.from_pretrained(folder), recipe


def _is_packed(folder: Path) -> bool:
    """Whether config.json says so; recipe.yaml is not there where save_pretrained, or save_packed alone, wrote it."""
    file = folder / "config.json"
    found = read_json(file, dict).get("quantization_config") if file.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == "dqbart"


def evaluate(
    folder: str,
    data: Any,
    *,
    split: str = "test",
    task: str | None = None,
    metric: str | None = None,
    source_column: str | None = None,
    pair_column: str | None = None,
    target_column: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    language: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    generation: dict[str, Any] | None = None,
    device: str | None = None,
) -> tuple[Score, list[dict[str, str]]]:
    """Score with interval, and every source, reference and output. `generation` is laid over the folder's own settings;
    `source_lang`, `target_lang`: mBART codes, `language`: of the references. Raises as the readers and metrics do, and
    `ValueError` for a checkpoint that has no head for the task, and for what this task doesn't read.
    """
    model, tokenizer, recipe = open_model(folder, device, task)
    changes: dict[str, Any] = {
        "source_column": source_column, "pair_column": pair_column, "target_column": target_column, "metric": metric,
        "source_lang": source_lang, "target_lang": target_lang, "language": language, "eval_batch_size": batch_size,
        "generation": recipe.generation | (generation or {}),
    }  # fmt: skip
    own = {name: getattr(recipe, name) for name in changes}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    check_unread(recipe, model.config, own)
    work = open_task(recipe, tokenizer, model, folder)
    if not (Path(folder) / "recipe.yaml").is_file():
        model = work.adapt(model, new_head=False)  # a checkpoint without a head for the task got one made at random
    examples = work.read_split(data, split)
    if not work.is_scored(examples):
        raise ValueError(work.why_unscored(data, examples))
    examples = sample(examples, limit)
    outcome = work.score(model, examples)
    rows = [row | {"output": text} for row, text in zip(work.shown(examples), outcome.outputs, strict=True)]
    return outcome.score, rows


def write_texts(
    folder: str,
    texts: list[str],
    *,
    generation: dict[str, Any] | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    device: str | None = None,
) -> list[str]:
    """One output per text, with the folder's own settings under `generation`."""
    model, tokenizer, recipe = open_model(folder, device)
    recipe = dataclasses.replace(
        recipe, source_lang=source_lang or recipe.source_lang, target_lang=target_lang or recipe.target_lang
    )
    settings = recipe.generation | (generation or {})
    return open_task(recipe, tokenizer, model, folder).write(model, texts, settings)[0]
