"""The grid file of quality.py: few lines of YAML to many cells, each with its key, its recipe and its places.

Problem: a hundred cells, hardly different, that must be readable as one table and safe against typing errors. Method:
a list of blocks, each a product of axes, with recipe keys laid over each other from the general to the special (task,
cuda, numerics, distillation, block, then the key itself); grids/first.yaml explains the keys. A combination that
`Recipe` refuses stays a cell, with the reason. Rejected: one list of recipes (the seeds alone triple it).
"""

import hashlib
import itertools
import json
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ledger import CHECKPOINT, fingerprint
from transformers import AutoConfig

from dqbart.fitting import resolve
from dqbart.notation import Bits, Layers
from dqbart.recipe import Recipe, read_yaml

KEYS = ("task", "bits", "layers", "numerics", "distillation", "seed")
FLOAT, INTEGER, DISTILLED, TEACHER = "32-32-32", "integer", "distilled", "teacher"
MAIN = {"rouge": "rougeL", "bleu": "bleu"}  # metric -> its figure that is `score`
# What of a task's recipe decides its teacher's score.
SCORING = (
    "metric", "language", "source_lang", "target_lang", "source_prefix", "source_column", "target_column",
    "max_source_length", "max_target_length", "generation", "eval_batch_size",
)  # fmt: skip
COUNTS = ("test_examples", "train_examples")  # of a task, in the order of Cell
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One case: its key in the ledger and what its process must know. `refused`: why there is no such recipe."""

    key: Row
    recipe: Row
    teacher: Path
    data: Path
    test_examples: int | None
    train_examples: int | None = None
    refused: str = ""

    @property
    def is_teacher(self) -> bool:
        return bool(self.key["distillation"] == TEACHER)

    @property
    def slug(self) -> str:
        words = [self.key["task"], TEACHER] if self.is_teacher else [str(self.key[name]) for name in KEYS]
        return "_".join(words).replace(" ", "-")

    @cached_property
    def settings(self) -> str:
        """A short hash of what decides the result and is not in the key: defaults of the code, too."""
        recipe, teacher = self.recipe, fingerprint(self.teacher, *CHECKPOINT)
        if teacher is not None and not self.refused:
            recipe = resolve(Recipe.from_dict(recipe), AutoConfig.from_pretrained(self.teacher)).to_dict()
        if self.is_teacher:
            recipe = {name: recipe.get(name) for name in SCORING}
        known = [recipe, fingerprint(self.data), self.test_examples, teacher]
        if self.train_examples and not self.is_teacher:  # absent from older hashes
            known.append(self.train_examples)
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self, work: Path) -> Path:
        return work / f"{self.slug}.{self.settings}"


def has_checkpoint(teacher: Path) -> bool:
    return fingerprint(teacher, *CHECKPOINT) is not None


def read_grid(path: Path, teachers: Path, data: Path, steps_scale: float = 1.0, cuda: bool = False) -> list[Cell]:
    """The cells of a grid file, teachers first. Raises `ValueError` naming the file and what is wrong in it."""
    grid = _mapping(str(path), read_yaml(path), ["tasks", "blocks"], ["numerics", "distillation", "cuda"])
    tasks = _mapping(f"{path}: tasks", grid["tasks"])
    numerics: Row = {INTEGER: {}} | _mapping(f"{path}: numerics", grid.get("numerics"))
    distillation: Row = {DISTILLED: {}} | _mapping(f"{path}: distillation", grid.get("distillation"))
    everywhere = _mapping(f"{path}: cuda", grid.get("cuda")) if cuda else {}
    for name, task in tasks.items():
        _mapping(f"{path}: task {name!r}", task, ["teacher", "data", "recipe"], [*COUNTS])
        for which in COUNTS:
            if not isinstance(task.get(which, 1), int) or task.get(which, 1) < 1:
                raise ValueError(f"{path}: task {name!r}: {which} {task[which]!r}: expected a count above 0")
    cells: dict[tuple[Any, ...], Cell] = {}
    for number, block in enumerate(_axis(str(path), "blocks", grid["blocks"]), 1):
        where = f"{path}: block {number}"
        _mapping(where, block, ["bits", "layers"], ["tasks", "numerics", "distillation", "seeds", "recipe"])
        axes = [
            _axis(where, "tasks", block.get("tasks", list(tasks)), tasks),
            [Bits(bits).text for bits in _axis(where, "bits", block["bits"])],
            [Layers(layers).text for layers in _axis(where, "layers", block["layers"])],
            _axis(where, "numerics", block.get("numerics", [INTEGER]), numerics),
            _axis(where, "distillation", block.get("distillation", [DISTILLED]), distillation),
            _axis(where, "seeds", block.get("seeds", [28])),
        ]
        for values in itertools.product(*axes):
            key = dict(zip(KEYS, values, strict=True))
            task = tasks[key["task"]]
            places = teachers / task["teacher"], data / task["data"], task.get(COUNTS[0]), task.get(COUNTS[1])
            recipe = _mapping(f"{path}: recipe of {key['task']!r}", task["recipe"]) | everywhere
            scoring = {name: value for name, value in recipe.items() if name in SCORING}
            for changes in (numerics[key["numerics"]], distillation[key["distillation"]], block.get("recipe")):
                recipe |= _mapping(where, changes)
            recipe |= {name: key[name] for name in ("bits", "layers", "seed")}
            if recipe.get("max_steps"):
                recipe["max_steps"] = max(1, round(recipe["max_steps"] * steps_scale))
            elif recipe.get("epochs") != 0:
                raise ValueError(f"{where}: task {key['task']!r} has no max_steps; give its budget in steps")
            cell = Cell(key, recipe, *places, refused=_refusal(where, recipe))
            if cells.setdefault(values, cell).recipe != recipe:
                raise ValueError(f"{where}: {cell.slug} is in an earlier block with another recipe; rename its variant")
            key = dict(zip(KEYS, (key["task"], FLOAT, _depth(places[0]), "float", TEACHER, 0), strict=True))
            cells[(key["task"],)] = Cell(key, scoring, *places)
    return sorted(cells.values(), key=lambda cell: not cell.is_teacher)


def _depth(teacher: Path) -> str:
    if not has_checkpoint(teacher):
        return "?"
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    return f"{config['encoder_layers']}-{config['decoder_layers']}"


def _mapping(where: str, values: Any, needed: list[str] | None = None, more: list[str] | None = None) -> Row:
    """`values` if it is a mapping (an empty one for None), with these keys and no others where keys are given."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r:.60}: expected 'key: value' lines")
    if needed is not None and more is not None:
        wrong = [f"unknown key {key!r}" for key in values if key not in needed + more]
        wrong += [f"no {key!r}" for key in needed if not values.get(key)]
        if wrong:
            raise ValueError(f"{where}: {wrong[0]}; expected {', '.join(needed)}, and if wanted {', '.join(more)}")
    return values


def _axis(where: str, name: str, found: Any, known: Container[Any] | None = None) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}: {name} {found!r:.60}: expected a list")
    for value in found:
        if known is not None and value not in known:
            raise ValueError(f"{where}: {name} {value!r}: expected one of {', '.join(map(str, known))}")  # type: ignore[call-overload]
    return found


def _refusal(where: str, recipe: Row) -> str:
    """Why this combination makes no recipe, "" where it does. What other bits don't mend is an error in the grid."""
    said: list[str] = []
    for bits in (recipe["bits"], "8-8-8", "2-2-8", FLOAT):
        try:
            Recipe.from_dict(recipe | {"bits": bits})
            return "".join(said[:1])
        except ValueError as error:
            said.append(str(error))
    raise ValueError(f"{where}: {said[0]}")
