"""Compression on one page: teacher -> student -> distil -> round -> pack -> gate -> score -> report.

Two folders are written. `OUTPUT.training/` holds what a long run needs to go on (run.json, teacher-written targets,
checkpoints, the best student, metrics.jsonl); `OUTPUT/` appears at the very end, in one rename, after a fresh
process has loaded it and said the same as the student. Rerunning the same command continues, or finds the work done.
"""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqbart.recipe import Recipe
from dqbart.run import Run, data_fingerprint, teacher_fingerprint

GATE_INPUTS = 16
DEV_HELD_OUT = 500


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
            "scores": {who: scores[who]["values"] for who in ("teacher", "student")} if scores else None,
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
    tokenizer: Any = None,
    overwrite: bool = False,
    device: str | None = None,
) -> Result:
    """Compress a BART or mBART checkpoint into a packed folder.

    `teacher`, `tokenizer`: path, hub id or objects. `data`: file, folder, hub id, `datasets.Dataset` or rows; its
    validation split, `dev_data` or a held-out part selects and scores the student. `recipe`: a `Recipe` or a
    preset's name. With `epochs=0` no training is done and no data is needed.

    Raises `ValueError`, `FileNotFoundError` or `FileExistsError`, one line, for whatever doesn't fit, before
    anything is written; `GateError` if the packed folder doesn't behave as the student.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    output = Path(os.path.abspath(output))
    say(f"teacher {teacher if isinstance(teacher, str | Path) else type(teacher).__name__}")
    from dqbart.data.batches import set_languages
    from dqbart.data.splits import read_training_data
    from dqbart.student.depth import stack_maps
    from dqbart.teacher import load_teacher

    model, tokenizer = load_teacher(teacher, tokenizer, device)
    recipe = recipe.resolve(model.config)
    maps = stack_maps(model.config, recipe.layers)  # type: ignore[arg-type]
    set_languages(tokenizer, recipe.source_lang, recipe.target_lang)
    train, dev = read_training_data(data, dev_data, recipe, DEV_HELD_OUT)
    run = Run.open(
        output,
        {"recipe": recipe.to_dict(), "teacher": teacher_fingerprint(model), "data": data_fingerprint(train, dev)},
        overwrite,
    )
    if run.finished is not None:
        say(f"{output}: already done with this recipe, teacher and data; overwrite it to do it again")
        return Result(output, run.finished)
    say(f"student {recipe.bits} bits, {recipe.layers} layers, copied from teacher layers {_shown(maps)}")
    seconds: dict[str, float] = {}
    student = _student(model, recipe, device)
    if train is not None and (recipe.epochs > 0 or recipe.max_steps > 0):
        with _timed(seconds, "training"):
            if not _distil(model, student, tokenizer, train, dev, recipe, maps, run, device):
                return Result(output, {})  # another process of the same run does the rest
    with _timed(seconds, "packing"):
        staged = _pack(student, tokenizer, model, recipe, run)
        gate = _gate(student.to("cpu"), tokenizer, staged, dev or train, recipe)
    say(f"gate: a fresh process gives logits within {gate['max_logit_difference']:.1e} and the same greedy ids")
    report = _report(model, recipe, maps, staged, gate, seconds)
    if train is not None or dev is not None:
        report["data"] = _described(data if data is not None else dev_data, train, dev)
    if dev is not None:
        with _timed(seconds, "scoring"):
            report["scores"] = _scores(model, tokenizer, staged, dev, recipe, device)
    from dqbart.evaluation import card

    card.write(staged, report, str(teacher) if isinstance(teacher, str | Path) else None, output.name)
    run.finish(staged, report)
    say(card.size_lines(report))
    return Result(output, report)


def _described(data: Any, train: Any, dev: Any) -> dict[str, Any]:
    """What the card says of the data: a bare name, never a path of this machine."""
    named = isinstance(data, str | Path)
    return {
        "name": Path(data).name if named and Path(data).exists() else str(data) if named else type(data).__name__,
        "on_hub": named and not Path(data).exists(),
        "train": len(train) if train is not None else 0,
        "dev": len(dev) if dev is not None else 0,
    }


def _shown(maps: dict[str, list[int]]) -> str:
    return ", ".join(f"{field.removesuffix('_layers')} {mapping}" for field, mapping in maps.items())


class _timed:
    """`with _timed(seconds, "training"):` adds the block's seconds to a report."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 1)


def _student(teacher: Any, recipe: Recipe, device: str | None) -> Any:
    from dqbart.quant.attention import use_attention
    from dqbart.quant.layers import prepare
    from dqbart.student.depth import make_student

    use_attention(teacher)
    student = make_student(teacher, recipe.layers)  # type: ignore[arg-type]
    use_attention(student)
    if recipe.bits.quantized:
        prepare(
            student, recipe.bits, skip=recipe.skip, numerics=recipe.numerics, probability_bits=recipe.probability_bits
        )
    return student.to(teacher.device)


def _distil(
    teacher: Any, student: Any, tokenizer: Any, train: Any, dev: Any, recipe: Recipe, maps: Any, run: Run,
    device: str | None,
) -> bool:  # fmt: skip
    """Train the student in place; true in the process that carries on afterwards."""
    from accelerate import PartialState

    from dqbart.data.batches import Collator, encode_pairs
    from dqbart.data.pseudo import write_targets
    from dqbart.distill import trainer
    from dqbart.distill.objective import Objective
    from dqbart.evaluation.generate import write_outputs
    from dqbart.evaluation.metrics import score

    state = PartialState(cpu=device == "cpu")
    languages: dict[str, Any] = {"source_lang": recipe.source_lang, "target_lang": recipe.target_lang}
    targets = train.targets
    if targets is None:
        with state.main_process_first():
            targets = write_targets(
                teacher, tokenizer, train.sources, cache_dir=run.work / "targets", generation=recipe.generation,
                max_target_length=recipe.max_target_length, batch_size=recipe.eval_batch_size,
                max_source_length=recipe.max_source_length, source_prefix=recipe.source_prefix, **languages,
            )  # fmt: skip
    pairs = encode_pairs(
        tokenizer, train.sources, targets, max_source_length=recipe.max_source_length,
        max_target_length=recipe.max_target_length, source_prefix=recipe.source_prefix, **languages,
    )  # fmt: skip
    say(f"training data: {pairs}")
    subset = dev.select(range(min(recipe.dev_subset, len(dev)))) if dev is not None else None

    def dev_score(model: Any) -> dict[str, float]:
        assert subset is not None
        written, _ = write_outputs(model, tokenizer, subset.sources, recipe)
        return score(recipe.metric, written, subset.references or subset.targets, language=recipe.language).values

    arguments = trainer.training_arguments(recipe, run.work, len(pairs), device)
    distiller = trainer.DistillationTrainer(
        model=student, teacher=teacher, objective=Objective(recipe, maps), args=arguments, train_dataset=pairs,
        data_collator=Collator(tokenizer.pad_token_id), dev_score=dev_score if subset is not None else None,
    )  # fmt: skip
    trainer.train(distiller)
    state.wait_for_everyone()
    return bool(state.is_main_process)


def _pack(student: Any, tokenizer: Any, teacher: Any, recipe: Recipe, run: Run) -> Path:
    import torch

    from dqbart.evaluation.generate import effective_generation
    from dqbart.packed.checkpoint import round_floats_, save_packed

    settings = effective_generation(
        teacher, recipe.generation, tokenizer=tokenizer, target_lang=recipe.target_lang,
        max_target_length=recipe.max_target_length,
    )  # fmt: skip
    student.generation_config.update(**settings)  # so that plain .generate() does what was scored
    dtype = getattr(torch, recipe.float_dtype)
    student.eval().requires_grad_(False)
    round_floats_(student, dtype)
    staged = run.work / "packed"
    if staged.exists():
        shutil.rmtree(staged)
    return save_packed(
        student, staged, recipe=recipe.to_yaml(), tokenizer=tokenizer, storage=recipe.storage, float_dtype=dtype
    )


def _gate(student: Any, tokenizer: Any, staged: Path, examples: Any, recipe: Recipe) -> dict[str, Any]:
    from dqbart.packed.gate import check_in_fresh_process, probe_inputs

    texts = examples.sources[:GATE_INPUTS] if examples is not None else []
    inputs = probe_inputs(student, tokenizer, [recipe.source_prefix + t for t in texts], recipe.max_source_length)
    return check_in_fresh_process(student, staged, inputs)


def _scores(teacher: Any, tokenizer: Any, staged: Path, dev: Any, recipe: Recipe, device: str | None) -> dict[str, Any]:
    """Teacher and packed model on the whole dev set, decoded with the same settings."""
    from dqbart.engines import load
    from dqbart.evaluation.generate import write_outputs
    from dqbart.evaluation.metrics import score

    scores: dict[str, Any] = {"examples": len(dev)}
    packed, settings = load(staged, device=teacher.device), None
    for name, model in (("teacher", teacher.eval()), ("student", packed)):
        say(f"{name} writes {len(dev):,} dev outputs")
        written, settings = write_outputs(model, tokenizer, dev.sources, recipe, generation=settings)
        result = score(
            recipe.metric, written, dev.references or dev.targets, language=recipe.language, generation=settings
        )
        say(f"{name}: {result}")
        scores[name] = result.to_dict()
        scores.setdefault(
            "outputs", [{"source": s, "reference": t} for s, t in zip(dev.sources[:10], dev.targets[:10], strict=True)]
        )
        for row, text in zip(scores["outputs"], written, strict=False):
            row[name] = text
    return scores


def _report(
    teacher: Any, recipe: Recipe, maps: dict[str, list[int]], staged: Path, gate: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    from dqbart.evaluation.environment import environment
    from dqbart.packed.checkpoint import size_table
    from dqbart.packed.shards import shard_files

    parameters = sum(p.numel() for p in teacher.parameters())
    teacher_bytes = sum(
        t.numel() * 4 for n, t in teacher.state_dict().items() if n not in teacher.all_tied_weights_keys
    )
    file_bytes = sum(file.stat().st_size for file in shard_files(staged))
    return {
        "recipe": recipe.to_dict(),
        "layer_maps": maps,
        "teacher": {"architecture": type(teacher).__name__, "parameters": parameters, "fp32_bytes": teacher_bytes},
        "sizes": {
            "groups": dict(size_table(staged)),
            "file_bytes": file_bytes,
            "ratio_to_fp32": round(teacher_bytes / file_bytes, 2),
            "ratio_to_fp16": round(teacher_bytes / 2 / file_bytes, 2),
        },
        "gate": gate,
        "seconds": seconds,
        "environment": environment(),
    }
