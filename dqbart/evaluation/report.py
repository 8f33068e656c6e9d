"""The report of packed folders: what was gained, what was lost and how each was measured, on one page.

Problem: "16 x smaller, 4 x faster" is believed once, then somebody looks at the file. Method: everything shown is read
from the folders' report.json (or, for benchmarks/report.py, from the ledgers), beside it the settings it was measured
with; what was not measured is listed with the command that would. sections.py turns data into sections, plots.py
draws, page.py writes HTML. Rejected: measuring from here (a report that takes hours is not read).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqbart.evaluation import page, sections
from dqbart.evaluation.card import NAMES, chosen_by_them
from dqbart.evaluation.metrics import Score
from dqbart.evaluation.page import Block, Example, Page, Section, Table
from dqbart.evaluation.plots import Point, require_matplotlib
from dqbart.evaluation.sections import Row, mib
from dqbart.student.maps import stack_words


@dataclass(frozen=True)
class Model:
    """A packed folder: its name, and what its report.json says."""

    name: str
    report: Row


def read_models(paths: Iterable[str | Path]) -> list[Model]:
    """Packed folders among `paths` and directly in them, each once.

    Raises `FileNotFoundError` or `ValueError`, one line, for a path without any and for a file that is no report.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "a file" if path.exists() else "no such folder"
            raise FileNotFoundError(f"{path}: {what}; expected a folder that 'dqbart compress' wrote, or one of such")
        here = [path] if (path / "report.json").is_file() else sorted(f.parent for f in path.glob("*/report.json"))
        if not here:
            raise FileNotFoundError(
                f"{path}: no report.json in it or in a folder of it; expected what 'dqbart compress --out' wrote"
            )
        found |= {folder.resolve(): folder for folder in here}
    return [_read(folder / "report.json", _name(resolved, found)) for resolved, folder in found.items()]


def _name(folder: Path, others: Iterable[Path]) -> str:
    """The end of a path, as long as it must be to be no other's."""
    for length in range(1, len(folder.parts)):
        name = folder.parts[-length:]
        if sum(other.parts[-length:] == name for other in others) == 1:
            break
    return "/".join(name)


def _read(file: Path, name: str) -> Model:
    try:
        model = Model(name, json.loads(file.read_text(encoding="utf-8")))
        build([model])  # everything that a page needs is there
        return model
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: not a report of 'dqbart compress' ({error!r}); make the folder again") from None


def model_points(models: Sequence[Model]) -> list[Point]:
    """A point for each model that has scores; one task is one teacher, one data set, one metric, the same settings."""
    points = []
    labels: dict[str, str] = {}
    for model in models:
        scores, recipe, run = model.report.get("scores"), model.report["recipe"], model.report.get("run", {})
        if not scores or "teacher" not in scores:  # labels alone: nothing to hold it against
            continue
        student, main = scores["student"], Score(**scores["student"]).main
        key = json.dumps([run.get("teacher"), run.get("data"), student["definition"], student["generation"]])
        data = model.report.get("data", {}).get("name", "dev set")
        label = f"{data}, {scores['examples']:,} examples"
        if label in (taken for other, taken in labels.items() if other != key):
            label += f" ({len(labels) + 1})"  # the same words for something else
        bounds = {who: tuple(scores[who]["intervals"].get(main) or ()) or None for who in ("student", "teacher")}
        variant = [] if recipe["numerics"] == "integer" else [f"{recipe['numerics']} numerics"]
        variant += [] if "training" in model.report["seconds"] else ["untrained"]
        points.append(
            Point(
                task=labels.setdefault(key, label),
                bits=recipe["bits"],
                layers=recipe["layers"],
                metric=NAMES.get(main, main),
                score=student["values"][main],
                teacher_score=scores["teacher"]["values"][main],
                file_bytes=model.report["sizes"]["file_bytes"],
                teacher_bytes=model.report["teacher"]["fp32_bytes"],
                interval=bounds["student"],
                teacher_interval=bounds["teacher"],
                name=model.name,
                variant=", ".join(variant),
            )
        )
    return points


def outputs_section(model: Model, how: str) -> Section:
    """Ten outputs beside the teacher's, the words marked that the teacher does not have."""
    title, outputs = "Outputs beside the teacher's", (model.report.get("scores") or {}).get("outputs")
    if not outputs or "teacher" not in outputs[0]:
        return Section(title, missing=how)
    same = sum(row["teacher"] == row["student"] for row in outputs)
    text = f"The first {len(outputs)} dev examples, not chosen: {same} of them have the teacher's very words. Marked: "
    examples = [Example(row["source"], row["reference"], row["teacher"], row["student"]) for row in outputs]
    return Section(title, [f"{text}what the teacher wrote otherwise.", *examples])


def bytes_section(models: Sequence[Model]) -> Section:
    """Where the bytes are: groups against models, all measured."""
    groups = dict.fromkeys(name for m in models for name in m.report["sizes"]["groups"])
    rows: list[list[Any]] = [
        [name, *(f"{m.report['sizes']['groups'].get(name, 0):,}" for m in models)] for name in groups
    ]
    rows.append(["file", *(f"{m.report['sizes']['file_bytes']:,}" for m in models)])
    for width in ("fp32", "fp16"):
        rows.append(
            [f"teacher in {width}, times", *(f"{m.report['sizes'][f'ratio_to_{width}']:.2f} ×" for m in models)]
        )
    text = "Bytes on disk by what they hold, from the file's header. Scales, norms and positions are counted too."
    return Section("Where the bytes are", [text, Table(["bytes", *(m.name for m in models)], rows)])


def provenance_section(models: Sequence[Model], chosen: Model) -> Section:
    """What every number above was made and measured with, a table a model; all but the chosen one's are folded."""
    blocks: list[Block] = ["From each folder's report.json. The whole recipe is in recipe.yaml beside it."]
    for model in sorted(models, key=lambda m: m is not chosen):
        rows = list(_provenance(model.report).items())
        blocks.append(Table(["", model.name], rows, summary="" if model is chosen else model.name, wrap=True))
    return Section("How it was made and measured", blocks)


def _provenance(report: Row) -> dict[str, str]:
    recipe, teacher, run = report["recipe"], report["teacher"], report.get("run", {})
    losses = ", ".join(f"{name} {weight:g}" for name, weight in recipe["losses"].items() if weight)
    length = f"{recipe['max_steps']} steps" if recipe["max_steps"] else f"{recipe['epochs']:g} epochs"
    found = {
        "teacher": f"{teacher['architecture']}, {teacher['parameters']:,} parameters, {mib(teacher['fp32_bytes'])} in "
        f"fp32; fingerprint {run.get('teacher', 'not recorded')}",
        "student": f"{recipe['bits']} bits (weights-embeddings-activations), {recipe['layers']} layers"
        f"{' (encoder-decoder)' if '-' in recipe['layers'] else ''}, {recipe['numerics']} numerics, stored as "
        f"{recipe['storage']}",
        "method and task": f"{recipe.get('method', 'dq')}, {recipe.get('task', 'seq2seq')}",
        "teacher's layers": stack_words(report["layer_maps"]),
        "training": f"{length}, batch {recipe['batch_size']} x {recipe['gradient_accumulation']}, learning rate "
        f"{recipe['learning_rate']:g}, seed {recipe['seed']}; losses: {losses}"
        if "training" in report["seconds"] else "none: quantized without training",
        "data": _data_text(report),
    }  # fmt: skip
    scores = report.get("scores")
    if scores:
        found["metric"] = f"{scores['student']['definition']}; intervals: 95 %, examples resampled."
        found["metric"] += chosen_by_them(report)
        found |= {f"scores, {who}": ", ".join(
            f"{NAMES.get(name, name)} {value:.2f}" for name, value in scores[who]["values"].items())
            for who in ("teacher", "student") if who in scores}  # fmt: skip
        if scores["student"]["generation"]:
            found["generation, both"] = ", ".join(f"{k} {v}" for k, v in scores["student"]["generation"].items())
    gate = report["gate"]
    found["gate"] = (
        f"a fresh process, {gate['inputs']} inputs: logits within {gate['max_logit_difference']:.1e} of the student's, "
        f"greedy ids {'equal' if gate['greedy_ids_equal'] else 'different'}"
    )
    found["took"] = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in report["seconds"].items())
    return found | {
        "machine": f"{machine_text(report['environment'])}; torch threads: {report['environment']['threads']}",
        "versions": versions_text(report["environment"]),
    }


def _data_text(report: Row) -> str:
    data, fingerprint = report.get("data") or {}, report.get("run", {}).get("data")
    parts = [data.get("name"), *(f"{data[k]:,} {k} examples" for k in ("train", "dev") if data.get(k))]
    parts.append(f"fingerprint {fingerprint}" if fingerprint else None)
    return ", ".join(filter(None, parts)) or "none"


def machine_text(environment: Row) -> str:
    """`AMD EPYC, 2 cores, AVX2, Linux x86_64`; with the GPU first where there is one."""
    e = environment
    parts = [e.get("gpu"), e["processor"], f"{e['cores']} cores", e["instructions"], e["system"]]
    return ", ".join(filter(None, parts))


def versions_text(environment: Row) -> str:
    """`python 3.11.7, dqbart 0.1.0, ...`, and the commit where it was recorded."""
    parts = {"python": environment["python"], **environment["packages"]}
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    return ", ".join(f"{name} {number}" for name, number in parts.items()) + commit


def build(models: Sequence[Model]) -> Page:
    """The page of packed folders. One of them stands for all on the first screen: the page says which and why."""
    points = model_points(models)
    best = sections.best_point(points)
    chosen = next((m for m in models if best and m.name == best.name), None)
    if chosen is None:
        chosen = min(models, key=lambda m: m.report["sizes"]["file_bytes"])
    recipe, sizes = chosen.report["recipe"], chosen.report["sizes"]
    speed = chosen.report.get("speed") or {"rows": [], "environment": None}
    machine = machine_text(speed["environment"]) if speed["environment"] else ""
    how_scores = "No scores in report.json: give `dqbart compress` data with targets, such as `--dev-data dev.jsonl`."
    how_speed = (
        "No `speed` in report.json: `dqbart bench DIR --against TEACHER --save` times it on this machine, `python "
        "benchmarks/latency.py` beside other engines."
    )
    named = len(models) > 1
    sensitivity = [
        ({"task": m.name} if named else {}) | row for m in models for row in m.report.get("sensitivity") or []
    ]
    what = f"{recipe['bits']} bits, {recipe['layers']} layers"
    lead = f"{what}, {chosen.report['teacher']['architecture']}."
    if named:
        why = "the smallest" if best is None else (
            f"the smallest that keeps {100 * sections.GOOD:.0f} % of its teacher's score"
            if (best.retention or 0) >= sections.GOOD else "the one that keeps most of its teacher's score"
        )  # fmt: skip
        lead = f"The three numbers are those of `{chosen.name}` ({what}): {why}."
    return Page(
        title=f"{len(models)} compressed models" if named else chosen.name,
        lead=lead,
        facts=[
            sections.size_fact(sizes["file_bytes"], chosen.report["teacher"]["fp32_bytes"]),
            sections.quality_fact(best, "The teacher itself scores 0." if points else how_scores),
            sections.speed_fact(speed["rows"], machine, how_speed, as_deep=False),
        ],
        sections=[
            sections.size_quality_section(points, how_scores),
            sections.latency_section(speed["rows"], machine, how_speed),
            sections.grid_section(points, "It needs scores of several widths or depths: `dqbart report DIR DIR ...`."),
            sections.sensitivity_section(
                sensitivity,
                points[0].metric if points else "score",
                "Not in report.json: `dqbart sensitivity TEACHER --data FILE --config DIR/recipe.yaml --save DIR`.",
            ),
            outputs_section(chosen, how_scores),
            bytes_section(models),
            provenance_section(models, chosen),
        ],
        foot="Written by `dqbart report` from report.json of " + ", ".join(m.name for m in models) + ".",
    )


def report(folders: Sequence[str | Path], out: str | Path = "report.html") -> dict[str, Any]:
    """Write the page `out` and NAME-plots/*.png for packed folders, or folders of such.

    Returns the files written and the titles of the sections that had no data. Raises as `read_models` and
    `page.write` do, and `ImportError` where matplotlib is missing.
    """
    require_matplotlib()
    built = build(read_models(folders))
    plots = page.write(built, Path(out))
    missing = [section.title for section in built.sections if not section.blocks]
    return {"out": str(out), "plots": [str(file) for file in plots], "missing": missing}
