"""Compression on one page: teacher -> student -> distil -> round -> pack -> gate -> score -> report.

Two folders are written. `OUTPUT.training/` holds what a long run needs to go on (run.json, teacher-written targets,
checkpoints, the best student, metrics.jsonl); `OUTPUT/` appears at the very end, in one rename, after a fresh
process has loaded it and said the same as the student. Rerunning the same command continues, or finds the work done.
"""

import copy
import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dqbart.data.columns import sample
from dqbart.fitting import resolve
from dqbart.recipe import Recipe
from dqbart.run import Run, data_fingerprint, model_fingerprint
from dqbart.student.maps import stack_words

ELASTIC = "elastic"  # the float network, beside a packed one whose sub-networks are to be cut


@dataclass(frozen=True)
class Result:
    """A finished compression: the packed folder, and what report.json in it says."""

    folder: Path
    report: dict[str, Any]

    def load(self, **kwargs: Any) -> Any:
        """`dqbart.load` of the folder."""
        from dqbart.engines import load

        return load(self.folder, **kwargs)

    def summary(self) -> dict[str, Any]:
        """What the command line prints as its last line."""
        if not self.report:  # a helper process of a distributed run
            return {}
        scores = self.report.get("scores")
        return {
            "output": str(self.folder),
            "file_bytes": self.report["sizes"]["file_bytes"],
            "ratio_to_fp32": self.report["sizes"]["ratio_to_fp32"],
            "scores": {who: scores[who]["values"] for who in ("teacher", "student") if who in scores}
            if scores
            else None,
            "seconds": self.report["seconds"],
        }


def say(text: str) -> None:
    """One line for the person who waits."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def compress(
    teacher: Any,
    data: Any = None,
    *,
    output: str | Path,
    recipe: Recipe | str = "small",
    dev_data: Any = None,
    student: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    device: str | None = None,
) -> Result:
    """Compress a checkpoint, BART, mBART or an encoder of the BERT family, into a packed folder.

    `teacher`, `tokenizer`: path, hub id or objects. `data`: file, folder, hub id, `datasets.Dataset` or rows; its
    validation split, `dev_data` or a held-out part selects and scores the student. `recipe`: a `Recipe` or a
    preset's name. `student`: a float checkpoint that the student starts as, such as the folder of an earlier run with
    bits 32-32-32; by default layers of the teacher. With `epochs=0` no training is done and no data is needed. With
    bits 32-32-32 the folder is a plain transformers checkpoint. What method "dynabert" left, `dqbart.extract` cuts into
    sub-networks.

    Raises `ValueError`, `FileNotFoundError` or `FileExistsError`, one line, for whatever doesn't fit, before
    anything is written; `GateError` if the packed folder doesn't behave as the student.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe of type {type(recipe).__name__}: expected a dqbart.Recipe or a preset's name")
    if recipe.trains and str(device).startswith("cuda:") and device != f"cuda:{os.environ.get('LOCAL_RANK', '0')}":
        number = str(device).partition(":")[2]  # Trainer takes the first one that it sees
        raise ValueError(f"device {device!r}: expected 'cuda' in training; choose with CUDA_VISIBLE_DEVICES={number}")
    output = Path(os.path.realpath(Path(output).expanduser()))  # what a link points to is what is replaced
    if output.is_file():
        raise FileExistsError(f"{output}: is a file; expected a folder to write")
    teacher, student = (_at_home(name) for name in (teacher, student))
    say(f"teacher {teacher if isinstance(teacher, str | Path) else type(teacher).__name__}")
    from dqbart.data.batches import model_inputs, tokenizer_for
    from dqbart.distill.objective import open_objective
    from dqbart.packed.checkpoint import check_generation_config
    from dqbart.packed.gate import check_in_fresh_process
    from dqbart.packed.plain import write_float
    from dqbart.student.depth import stack_maps
    from dqbart.tasks import elastic, open_task
    from dqbart.teacher import load_student, load_teacher

    model, tokenizer, known_task = load_teacher(teacher, tokenizer, device, recipe.task, seed=recipe.seed)
    start: Any = load_student(student, model, recipe, known_task) if student is not None else None
    recipe = resolve(recipe, model.config, known_task, None if start is None else start.config)
    task = open_task(recipe, tokenizer, model, teacher)
    train, dev = task.read(data, dev_data)
    model = task.adapt(model, new_head=recipe.method == "finetune")
    start = task.adapt(start, new_head=True) if start is not None else None
    assert recipe.layers is not None
    maps = stack_maps(model.config, recipe.layers, recipe.layer_map)
    small = _student(model, start, recipe)
    task.settle(small, model)
    check_generation_config(small)  # now, not after the training
    stages = [(stage, open_objective(stage, maps, small, model, task.pooling)) for stage in recipe.stages()]
    measured: Any = elastic.importance_examples(task, train, dev) if recipe.elastic else None
    whole = model_fingerprint(model, tokenizer)
    identity = {"recipe": recipe.to_dict(), "teacher": whole, "data": data_fingerprint(train, dev)}
    if task.pooling is not None:
        identity["pooling"] = dataclasses.asdict(task.pooling)
    if start is not None:
        identity["student"] = model_fingerprint(start)
    run = Run.open(output, identity, overwrite)
    if run.finished is not None:
        say(f"{output}: already done with this recipe, teacher and data; --overwrite (overwrite=True) does it again")
        return Result(output, run.finished)
    say(f"student {recipe.bits} bits, {recipe.layers} layers, {_origin(recipe, maps, student)}")
    if recipe.elastic:
        with run.timed("importance"):
            say(f"importance of heads and neurons, on {len(measured):,} examples")
            elastic.rewire_student(small, model, task, measured, run.work)
    if train is not None and recipe.trains:
        with run.timed("training"):
            if not _distil(model, small, task, train, dev, stages, run, device):
                return Result(output, {})  # another process of the same run does the rest
    with run.timed("packing"):
        small.to("cpu")  # a GPU's kernels round some scales to another last bit, and the packed model would be another
        staged = pack(small, tokenizer_for(small, tokenizer), recipe, run.work / "packed")
        task.complete(staged)
        if recipe.elastic and recipe.bits.quantized:
            write_float(small, staged / ELASTIC)
        gate = check_in_fresh_process(small, staged, model_inputs(small, task.probe(small, dev or train)))
    say(f"gate: a fresh process gives logits within {gate['max_logit_difference']:.1e}{_and_ids(gate)}")
    report = _report(model, recipe, maps, staged, gate) | {"student": start is not None}
    if isinstance(teacher, str | Path) and not Path(teacher).exists():
        report["teacher"]["hub_id"] = str(teacher)
    if train is not None or dev is not None:
        report["data"] = _described(data if data is not None else dev_data, train, dev)
    if dev is not None and task.is_scored(dev):
        with run.timed("scoring"):
            report["scores"] = _scores(model, task, staged, dev, recipe)
            if recipe.elastic:
                report["subnetworks"] = elastic.score_subnetworks(task, small.to(model.device), dev)
    report["seconds"] = run.seconds
    from dqbart.evaluation import card

    card.write(staged, report, str(teacher) if isinstance(teacher, str | Path) else None, output.name)
    run.finish(staged, report)
    say(card.size_lines(report))
    return Result(output, report)


def _at_home(name: Any) -> Any:
    """A path with its ~ replaced, which no shell has done for a YAML file or a Python call."""
    return os.path.expanduser(name) if isinstance(name, str | Path) else name


def _described(data: Any, train: Any, dev: Any) -> dict[str, Any]:
    """What the card says of the data: a bare name, never a path of this machine."""
    data = _at_home(data)
    named = isinstance(data, str | Path)
    return {
        "name": Path(data).name if named and Path(data).exists() else str(data) if named else type(data).__name__,
        "on_hub": named and not Path(data).exists(),
        "train": len(train) if train is not None else 0,
        "dev": len(dev) if dev is not None else 0,
    }


def _origin(recipe: Recipe, maps: dict[str, list[int]], student: str | Path | None) -> str:
    shown = stack_words(maps)
    if student is not None:
        return f"begun as {student}, held to teacher layers {shown}"
    return f"{'held to' if recipe.is_narrow else 'copied from'} teacher layers {shown}"


def _and_ids(gate: dict[str, Any]) -> str:
    return " and the same greedy ids" if gate["greedy_ids_equal"] else ""


def _student(teacher: Any, start: Any, recipe: Recipe) -> Any:
    from transformers import set_seed

    from dqbart.quant.attention import use_attention
    from dqbart.student.start import new_student

    use_attention(teacher)
    set_seed(recipe.seed)  # of what is not copied
    student = start if start is not None else new_student(teacher, recipe)
    use_attention(student)
    return quantize(student, recipe).to(teacher.device)


def quantize(student: Any, recipe: Recipe) -> Any:
    """The float student, made fake-quantized in place as the recipe says."""
    from dqbart.quant.layers import prepare

    if recipe.bits.quantized:
        prepare(
            student, recipe.bits, skip=recipe.skip, numerics=recipe.numerics, probability_bits=recipe.probability_bits,
            heads=recipe.quantize_heads,
        )  # fmt: skip
    return student


def _distil(
    teacher: Any, student: Any, task: Any, train: Any, dev: Any, stages: list[tuple[Recipe, Any]], run: Run,
    device: str | None,
) -> bool:  # fmt: skip
    """Train the student in place; true in the process that carries on afterwards."""
    from accelerate import PartialState

    from dqbart.distill import trainer
    from dqbart.distill.dropout import dropping
    from dqbart.tasks.elastic import mean_score

    # other processes wait while the first one writes targets and scores students, which may take hours
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    rows, collator = task.training_set(train, teacher, run.work)
    say(f"training data: {rows}")
    subset = None
    if dev is not None and task.is_scored(dev):
        subset = sample(dev, stages[0][0].dev_subset)
    for number, (stage, objective) in enumerate(stages, 1):
        chooses = subset is not None and _trains_outputs(stage)
        folder = run.work if len(stages) == 1 else run.work / f"stage-{number}"
        if len(stages) > 1:
            parts = f", widths {stage.widths}, depths {stage.depths}" if stage.elastic else ""
            say(f"stage {number} of {len(stages)}: {stage.method}, losses {', '.join(stage.terms)}{parts}")
        # Of an elastic student's later parts the teacher is what the first one made.
        guide = copy.deepcopy(student) if stage.elastic and number > 1 else teacher

        def dev_score(model: Any, stage: Recipe = stage) -> Any:
            return mean_score(task, model, subset, stage) if stage.elastic else task.score(model, subset).score

        with dropping(student, stage.dropout):
            trainer.train(
                trainer.DistillationTrainer(
                    model=student, teacher=guide, objective=objective,
                    args=trainer.training_arguments(stage, folder, len(rows), device), train_dataset=rows,
                    data_collator=collator, dev_score=dev_score if chooses else None,
                )
            )  # fmt: skip
    state.wait_for_everyone()
    return bool(state.is_main_process)


def _trains_outputs(stage: Recipe) -> bool:
    """Whether what a score looks at is trained: a head that no loss reaches would choose the student by chance."""
    return bool({"task", "logits"} & stage.terms.keys()) or stage.task in ("seq2seq", "sentences")


def pack(student: Any, tokenizer: Any, recipe: Recipe, staged: Path) -> Path:
    """Write a trained student as a new folder, with its recipe: packed, or as it is with bits 32-32-32."""
    import torch

    from dqbart.packed.checkpoint import round_floats_, save_packed
    from dqbart.packed.plain import save_plain

    student.eval().requires_grad_(False)
    if staged.exists():
        shutil.rmtree(staged)
    if not recipe.bits.quantized:
        return save_plain(student, staged, recipe=recipe.to_yaml(), tokenizer=tokenizer)
    dtype = getattr(torch, recipe.float_dtype)
    round_floats_(student, dtype)
    return save_packed(
        student, staged, recipe=recipe.to_yaml(), tokenizer=tokenizer, storage=recipe.storage, float_dtype=dtype
    )


def _scores(teacher: Any, task: Any, staged: Path, dev: Any, recipe: Recipe) -> dict[str, Any]:
    """Teacher, if it was one, and packed model on the whole dev set, decoded with the same settings."""
    from dqbart.engines import load

    packed = load(staged, device=teacher.device)
    models = {"student": packed} if recipe.method == "finetune" else {"teacher": teacher.eval(), "student": packed}
    scores: dict[str, Any] = {"examples": len(dev), "outputs": task.shown(dev.select(range(min(10, len(dev)))))}
    settings = None
    for name, model in models.items():
        say(f"{name}: {len(dev):,} dev examples")
        outcome = task.score(model, dev, settings=settings)
        settings = outcome.score.generation
        say(f"{name}: {outcome.score}")
        scores[name] = outcome.score.to_dict()
        for row, text in zip(scores["outputs"], outcome.outputs, strict=False):
            row[name] = text
    return scores


def sizes(staged: Path, teacher_bytes: int) -> dict[str, Any]:
    """For report.json: bytes of the weight files by what they hold, and how much smaller than the teacher that is."""
    from dqbart.packed.checkpoint import size_table
    from dqbart.packed.shards import shard_files

    file_bytes = sum(file.stat().st_size for file in shard_files(staged))
    return {
        "groups": dict(size_table(staged)),
        "file_bytes": file_bytes,
        "ratio_to_fp32": round(teacher_bytes / file_bytes, 2),
        "ratio_to_fp16": round(teacher_bytes / 2 / file_bytes, 2),
    }


def _report(
    teacher: Any, recipe: Recipe, maps: dict[str, list[int]], staged: Path, gate: dict[str, Any]
) -> dict[str, Any]:
    from dqbart.evaluation.environment import environment

    parameters = sum(p.numel() for p in teacher.parameters())
    teacher_bytes = sum(
        t.numel() * 4 for n, t in teacher.state_dict().items() if n not in teacher.all_tied_weights_keys
    )
    return {
        "recipe": recipe.to_dict(),
        "stages": len(recipe.stages()),
        "layer_maps": maps,
        "teacher": {"architecture": type(teacher).__name__, "parameters": parameters, "fp32_bytes": teacher_bytes},
        "sizes": sizes(staged, teacher_bytes),
        "gate": gate,
        "environment": environment(),
    }
