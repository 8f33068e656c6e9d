"""Training and dev examples of one run, from whatever the user gave."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dqbart.data.columns import Examples, Splittable, guess_columns, read_examples
from dqbart.data.files import find_split, list_splits, load_rows
from dqbart.recipe import Recipe

E = TypeVar("E", bound=Splittable)
_LOOK = 1000  # targets that the language is told by


def train_and_dev(
    read: Callable[[Any, str], E], data: Any, dev_data: Any, recipe: Recipe,
    divide: Callable[[E], tuple[E, E] | None], has_references: Callable[[E], bool],
) -> tuple[E | None, E | None]:  # fmt: skip
    """`(train, dev)`, as `read(data, split)` gives them; both None without data.

    Dev is `dev_data`, else the validation split of `data`, else what `divide` takes from the training data, which is
    None where they are too few. What has no references is no dev set. Says which splits are left out, and where nothing
    can be held out. Raises what `read` raises, and `ValueError` where training is asked for without data.
    """
    if data is None:
        if recipe.trains:
            raise ValueError(
                f"data is missing: {recipe.epochs:g} epochs of training need --data FILE; --epochs 0 quantizes without"
            )
        return None, None if dev_data is None else read(dev_data, "validation")
    splits = list_splits(data)
    wanted = ["train"] if dev_data is not None else ["train", "validation"]
    left = [name for name in splits if name not in {find_split(splits, split) for split in wanted}]
    train = read(data, "train")
    if left:
        print(f"{data_name(data)}: split {', '.join(left)} left out", file=sys.stderr, flush=True)
    if dev_data is not None:
        return train, read(dev_data, "validation")
    if find_split(splits, "validation") is not None:
        dev = read(data, "validation")
        if has_references(dev):
            return train, dev
        print("the validation split has nothing to score against: left out", file=sys.stderr, flush=True)
        return train, None
    divided = divide(train) if has_references(train) else None
    if divided is None and has_references(train):
        print(
            f"{data_name(data)}: too little to hold anything out, so there will be no score; give --dev-data",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return divided or (train, None)


def data_name(data: Any) -> str:
    """How a line to print calls the data."""
    return Path(data).name if isinstance(data, str | Path) else "data"


def read_split(data: Any, recipe: Recipe, split: str) -> Examples:
    """The examples of one split of `data`, with the recipe's columns and languages."""
    rows = load_rows(data, split=split)
    if not rows:
        raise ValueError(f"data {str(data)[:200]!r}: no rows; expected at least one")
    columns = guess_columns(
        rows, recipe.source_column, recipe.target_column, source_lang=recipe.source_lang,
        target_lang=recipe.target_lang,
    )  # fmt: skip
    examples = read_examples(rows, columns)
    name = data_name(data)
    skipped = f", {examples.skipped:,} empty rows left out" if examples.skipped else ""
    print(f"{name} ({split}): {len(examples):,} examples{skipped}; {columns}", file=sys.stderr, flush=True)
    if recipe.written_in == "en" and examples.targets is not None and _is_foreign(examples.targets[:_LOOK]):
        raise ValueError(
            f"data {name!r}: the targets are hardly written in a to z, and as English they would score 0; give "
            "--language, such as zh or ru"
        )
    return examples


def _is_foreign(texts: list[str]) -> bool:
    """Whether most letters are none of the alphabet's 26."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(map(str.isascii, letters)) < len(letters) / 2
