"""What encoder_methods.py runs: studies, and their cells in the order in which they are run. Nothing is run here.

Problem: a teacher, its students and theirs on three tasks are some 150 trainings that stand on each other, and after a
change of one number it must be plain which of them are old. Method: a cell holds the cells that it stands on, so its
fingerprint is that of everything that went into it; a changed one is run again, and what stands on it. Rejected: one
name for the whole study, which would train the teacher anew because fine-tuning got other steps.

The teacher grows: few layers learn to read, then they are repeated and learn on (progressive stacking, Gong et al.,
ICML 2019). Twelve layers of random weights, LayerNorm behind each, hardly learn more in the same time than four.

The order is one of value: the narrow students on all tasks, the ablation once, students of the teacher's width, then
the ablation's other seeds. A run that is ended early has the best of it.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dqbart.recipe import Recipe

FLOAT = "32-32-32"
METHODS = ("scratch", "minilm", "minilm2", "tinybert", "distilbert")
STAGES = "tinybert, task stage"  # a method of the tables, not of a recipe
# What TinyBERT's students go without: changes of both stages' recipes, but for those that `_ablation` sees to.
ABLATION: dict[str, dict[str, Any]] = {
    "no embedding loss": {"losses": {"embedding": 0.0}},
    "no hidden loss": {"losses": {"hidden": 0.0}},
    "no attention loss": {"losses": {"scores": 0.0}},
    "no prediction loss": {},
    "top layers": {"layer_map": "top"},
    "bottom layers": {"layer_map": "bottom"},
    "no augmentation": {},
    "no general stage": {},
}
TEXT_RATE = 1e-3  # on text, of three or four layers; of n times as many, divided by the root of n
DROPOUT = 0.1  # on tasks; text is seen about once
SEED = 28  # of everything that is not repeated
TASK_RATE = 3e-4  # on tasks, as BERT's small models like it: at 1e-4 the teacher gets 35 % of clinc150, not 62


@dataclass(frozen=True)
class Shape:
    """A BERT's sizes, and, as a cell's model, one with random weights of this seed."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    seed: int = SEED

    def __str__(self) -> str:
        return f"{self.layers} x {self.width}"


@dataclass(frozen=True)
class Grown:
    """As a cell's model, that of another one with its layers repeated from the first on, up to so many."""

    of: "Cell"
    layers: int


@dataclass(frozen=True)
class Data:
    """A data set: at most so many rows of train, validation and test. `writer`: the cell whose model writes `variants`
    more of each of `augmented` training rows.
    """

    name: str
    rows: tuple[int | None, ...] = (None, None, None)
    writer: "Cell | None" = None
    augmented: int = 0
    variants: int = 0
    seed: int = SEED  # of the draw, and of the variants


@dataclass(frozen=True)
class Cell:
    """One call of `dqbart.compress`, and the row that it gives. `steps`: of the method's parts, one or two. `shown`:
    what the tables want to know of it.
    """

    name: str
    model: "Cell | Shape | Grown"
    data: Data
    steps: tuple[int, ...]
    recipe: dict[str, Any]
    shown: dict[str, Any]
    student: "Cell | Shape | None" = None

    @cached_property
    def settings(self) -> str:
        """A fingerprint of this cell, the defaults of its method among it, and of all below it."""
        made = [(stage.to_dict(), stage.terms) for stage in Recipe.from_dict(self.recipe).stages()]
        known = [repr(self), repr(made), *(cell.settings for cell in self.needs)]
        return hashlib.sha256("".join(known).encode()).hexdigest()[:10]

    @property
    def title(self) -> str:
        """What `--only` looks at: which table it is for, and its name."""
        return f"{self.shown['part']} {self.name}"

    @property
    def needs(self) -> list["Cell"]:
        model = self.model.of if isinstance(self.model, Grown) else self.model
        return [cell for cell in (model, self.student, self.data.writer) if isinstance(cell, Cell)]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of everything. Steps are optimizer steps, of `batch` blocks of text or of 32 labelled texts; those of the
    teacher go by its layers, which grow.
    """

    teacher: Shape
    narrow: Shape
    batch: int
    teacher_steps: dict[int, int]
    student_steps: int
    mask_rate: float = 0.15
    task_steps: dict[str, int]  # of fine-tuning, and of TinyBERT's predictions
    teacher_rates: dict[str, float] = field(default_factory=dict)  # on tasks, where it is not TASK_RATE
    inner_steps: int  # of TinyBERT's task stage before the predictions
    quantized_steps: int
    ablation_tasks: tuple[str, ...]
    rows: tuple[int | None, ...] = (16_000, None, None)  # of a task
    texts: tuple[int | None, ...] = (None, None, None)
    augmented: int = 4000
    variants: int = 10
    seeds: tuple[int, ...] = (1, 2, 3)
    shapes: tuple[str, ...] = ("narrow", "wide")
    methods: tuple[str, ...] = METHODS
    without: tuple[str, ...] = tuple(ABLATION)

    def __str__(self) -> str:
        return (
            f"teacher {self.teacher}, {sum(self.teacher_steps.values()):,} steps; students {self.student_steps:,} steps"
        )

    def shape(self, name: str) -> Shape:
        """Of the students: `narrow`, or `wide`, which has the teacher's width."""
        return self.narrow if name == "narrow" else dataclasses.replace(self.teacher, layers=self.narrow.layers)

    def times(self, factor: float) -> "Study":
        """The same with `factor` times as many steps of everything. Raises `ValueError` for one that is not above 0."""
        if not factor > 0:
            raise ValueError(f"--steps {factor!r}: expected a factor above 0, such as 0.5")
        changes: dict[str, Any] = {
            name: max(1, round(getattr(self, name) * factor))
            for name in ("student_steps", "inner_steps", "quantized_steps")
        }
        for name in ("teacher_steps", "task_steps"):
            changes[name] = {of: max(1, round(steps * factor)) for of, steps in getattr(self, name).items()}
        return dataclasses.replace(self, **changes)


def _shape(layers: int, width: int, heads: int, vocabulary: int = 8000, length: int = 128) -> Shape:
    return Shape(layers, width, heads, vocabulary, length)


STUDIES = {
    "quick": Study(
        teacher=_shape(4, 48, 2, 1000, 32), narrow=_shape(2, 32, 2, 1000, 32), batch=4,
        teacher_steps={2: 2, 4: 2},
        student_steps=2, task_steps={"rt-polarity": 3}, inner_steps=2, quantized_steps=2,
        ablation_tasks=("rt-polarity",), rows=(60, 20, 30), texts=(40, 4, 0), augmented=3, variants=2, seeds=(1,),
        shapes=("narrow",), without=("no hidden loss", "no prediction loss", "no general stage"),
    ),
    # two cores, in bf16: two epochs of text for the teacher, a quarter for a student
    "small": Study(
        teacher=_shape(12, 192, 4, length=64), narrow=_shape(4, 128, 4, length=64), batch=16,
        teacher_steps={3: 8000, 6: 5000, 12: 8000},
        student_steps=3000, mask_rate=0.3, task_steps={"clinc150": 4000, "rt-polarity": 800, "blimp": 2500},
        teacher_rates={"blimp": 1e-4}, inner_steps=1000, quantized_steps=1000, ablation_tasks=("clinc150",),
    ),
    # one GPU, in bf16: fourteen epochs and seven
    "gpu": Study(
        teacher=_shape(12, 256, 4), narrow=_shape(4, 128, 4), batch=128,
        teacher_steps={3: 3000, 6: 3000, 12: 5000}, student_steps=5000,
        task_steps={"clinc150": 4000, "rt-polarity": 2000, "blimp": 4000}, inner_steps=3000, quantized_steps=2000,
        ablation_tasks=("clinc150", "rt-polarity"), rows=(None, None, None), augmented=10_000,
    ),
}  # fmt: skip


class _Maker:
    """Makes the cells of one study."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.teacher: Cell
        first = min(study.teacher_steps)
        for layers, steps in study.teacher_steps.items():
            shape = dataclasses.replace(study.teacher, layers=layers)
            self.teacher = self.text(
                "teacher" if shape == study.teacher else f"teacher of {layers} layers",
                shape if layers == first else Grown(self.teacher, layers), steps, "finetune", "teacher", shape,
                learning_rate=TEXT_RATE * (first / layers) ** 0.5,
            )  # fmt: skip

    def text(
        self, name: str, model: Cell | Shape | Grown, steps: int, method: str, label: str, shape: Shape,
        student: Shape | None = None, **more: Any,
    ) -> Cell:  # fmt: skip
        """On plain text: the teacher, and the students before they see a task."""
        recipe = dict(
            bits=FLOAT, task="text", method=method, segments=2, max_source_length=shape.length,
            batch_size=self.study.batch, learning_rate=TEXT_RATE, weight_decay=0.01, warmup_ratio=0.1,
            mask_rate=self.study.mask_rate,
        ) | more  # fmt: skip
        shown = dict(part="text", shape=str(shape), method=label)
        return Cell(name, model, Data("text-books", self.study.texts), (steps,), recipe, shown, student)

    def general(self, shape_name: str, method: str, label: str = "", **more: Any) -> Cell:
        """A student that has learned on plain text: from the teacher, or from masked words alone."""
        shape, label = self.study.shape(shape_name), label or method
        if method == "scratch":
            return self.text(f"{shape_name}/scratch", shape, self.study.student_steps, "finetune", label, shape)
        if method == "minilm2":
            more |= {"relation_heads": 4 * shape.heads}
        start = None
        if shape_name == "wide":
            more |= {"layers": str(shape.layers)}  # copied
        else:
            start = shape
        return self.text(
            f"{shape_name}/{label}", self.teacher, self.study.student_steps, method, label, shape, start, **more
        )

    def task(
        self, name: str, model: Cell, task: str, seed: int, shape: str, label: str, *, part: str = "task",
        student: Cell | Shape | None = None, data: Data | None = None, steps: tuple[int, ...] = (), **more: Any,
    ) -> Cell:  # fmt: skip
        """On a task; fine-tuning, if nothing else is said."""
        recipe = dict(
            bits=FLOAT, task="classification", method="finetune", max_source_length=self.study.teacher.length,
            batch_size=32, learning_rate=TASK_RATE, weight_decay=0.01,
            warmup_ratio=0.1, dev_subset=1000, seed=seed, dropout=DROPOUT,
        ) | more  # fmt: skip
        shown = dict(part=part, shape=shape, method=label, task=task, seed=seed)
        steps = steps or (self.study.task_steps[task],)
        return Cell(f"{task}/{name}/{seed}", model, data or self.data(task), steps, recipe, shown, student)

    def data(self, task: str, *, more: bool = False) -> Data:
        plain = Data(task, self.study.rows)
        if not more:
            return plain
        return dataclasses.replace(
            plain, writer=self.teacher, augmented=self.study.augmented, variants=self.study.variants
        )

    def expert(self, task: str, seed: int | None = None) -> Cell:
        """The teacher, fine-tuned on a task; by default the one that students learn from."""
        seed = self.study.seeds[0] if seed is None else seed
        rate = self.study.teacher_rates.get(task, TASK_RATE)
        return self.task("teacher", self.teacher, task, seed, str(self.study.teacher), "teacher", learning_rate=rate)

    def both_stages(self, task: str, seed: int, general: Cell | Shape, name: str, **more: Any) -> Cell:
        """TinyBERT's task stage: a student of plain text, held to the teacher of the task on more data."""
        study = self.study
        arguments = dict(
            student=general, data=self.data(task, more=True), steps=(study.inner_steps, study.task_steps[task]),
            method="tinybert",
        ) | more  # fmt: skip
        shape = str(general.shown["shape"] if isinstance(general, Cell) else general)
        return self.task(name, self.expert(task), task, seed, shape, **arguments)

    def main(self, shape_name: str, task: str, seed: int) -> Iterator[Cell]:
        shape = str(self.study.shape(shape_name))
        for method in self.study.methods:
            general = self.general(shape_name, method)
            yield self.task(f"{shape_name}/{method}", general, task, seed, shape, method)
            if method == "tinybert":
                yield self.both_stages(task, seed, general, f"{shape_name}/{STAGES}", label=STAGES)

    def ablation(self, task: str, seed: int, without: str) -> Cell:
        """TinyBERT's narrow student, without one thing."""
        study, changes, name = self.study, ABLATION[without], f"ablation/{without}"
        general: Cell | Shape = self.general("narrow", "tinybert")
        if changes:
            general = self.general("narrow", "tinybert", label=f"tinybert, {without}", **changes)
        shown: dict[str, Any] = dict(label=without, part="ablation")
        if without == "no general stage":
            general = study.narrow
        if without == "no augmentation":
            shown["data"] = self.data(task)
        if without != "no prediction loss":
            return self.both_stages(task, seed, general, name, **shown, **changes)
        # the inner layers as ever, then labels in place of the teacher's predictions
        inner = self.both_stages(
            task, seed, general, "ablation/inner layers", label="inner layers", part="step",
            steps=(study.inner_steps,), prediction_epochs=0.0,
        )  # fmt: skip
        return self.task(name, inner, task, seed, str(study.narrow), data=self.data(task, more=True), **shown)


def cells(study: Study) -> list[Cell]:
    """All cells but the quantized ones, each after those that it needs."""
    maker = _Maker(study)
    main, *later = [
        [cell for seed in study.seeds for task in study.task_steps for cell in maker.main(shape, task, seed)]
        for shape in study.shapes
    ]  # fmt: skip
    experts = [maker.expert(task, seed) for seed in study.seeds for task in study.task_steps]
    first, *others = [
        [maker.ablation(task, seed, without) for task in study.ablation_tasks for without in study.without]
        for seed in study.seeds
    ]
    return in_order([maker.teacher, *main, *experts, *first, *sum(later, []), *sum(others, [])])


def quantized(study: Study, everything: Iterable[Cell], method: str) -> list[Cell]:
    """The narrow student of `method`, fine-tuned on the first task, held to itself at 8 and 2 bits (TernaryBERT)."""
    task, seed = next(iter(study.task_steps)), study.seeds[0]
    best = next(cell for cell in everything if cell.name == f"{task}/narrow/{method}/{seed}")
    return [
        _Maker(study).task(
            f"quantized/{method}, {bits}", best, task, seed, str(study.narrow), method, part="quantized",
            steps=(study.quantized_steps,), bits=bits, method="ternarybert",
        )
        for bits in ("8-8-8", "2-2-8")
    ]  # fmt: skip


def in_order(chosen: Iterable[Cell]) -> list[Cell]:
    """These cells and all that they need, each once, and after what it needs."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.name not in found:
            for other in cell.needs:
                add(other)
            found[cell.name] = cell

    for cell in chosen:
        add(cell)
    return list(found.values())
