"""One cell of quality.py's grid, in a process of its own: compress, score on test, compare with the teacher.

    python benchmarks/quality_cell.py FOLDER

FOLDER/cell.json says what to do: key, recipe, teacher, data, test_examples, train_examples, teacher_folder (that
of the teacher's own cell), keep, jobs. It leaves outputs.jsonl, report.json (of a student) and, last and in one piece,
row.json. Stopped by SIGTERM while it trains, it saves a checkpoint; the same command goes on. Rejected: a function in a
process pool, where one process killed for its memory takes the others with it.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from quality_grid import MAIN
from quality_score import intervals, test_set
from transformers import AutoTokenizer

import dqbart
from dqbart.data.batches import set_languages
from dqbart.data.files import load_rows
from dqbart.evaluation import metrics
from dqbart.evaluation.generate import write_outputs
from dqbart.fitting import resolve
from dqbart.recipe import Recipe
from dqbart.teacher import choose_device, load_teacher

Row = dict[str, Any]


def run_cell(folder: Path) -> None:
    """Do what `folder/cell.json` says. Raises as `compress` and the readers do."""
    cell = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    recipe, device = Recipe.from_dict(cell["recipe"]), choose_device(None)
    where = f"CPU, threads: {torch.get_num_threads()}" if device == "cpu" else torch.cuda.get_device_name()
    row = (_teacher if cell["teacher_folder"] is None else _student)(cell, recipe, folder, device)
    row["device"] = where + (f", {cell['jobs']} cells at a time" if cell["jobs"] > 1 else "")
    partial = folder / "row.partial"
    partial.write_text(json.dumps(row), encoding="utf-8")
    os.replace(partial, folder / "row.json")


def _teacher(cell: Row, recipe: Recipe, folder: Path, device: str) -> Row:
    model, tokenizer, _ = load_teacher(cell["teacher"], None, device)
    row, _, _ = _score(model, tokenizer, cell, recipe, folder)
    size = sum(t.numel() * 4 for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys)
    row |= {"teacher_score": row["score"], "retention": 1.0, "file_bytes": size, "teacher_bytes": size}
    return row | {"ratio_to_fp32": 1.0}


def _student(cell: Row, recipe: Recipe, folder: Path, device: str) -> Row:
    beside = Path(cell["teacher_folder"])
    teacher = json.loads((beside / "row.json").read_text(encoding="utf-8"))
    dev = load_rows(cell["data"], split="validation")[: recipe.dev_subset]
    train = load_rows(cell["data"], split="train")[:most] if (most := cell["train_examples"]) else cell["data"]
    result = dqbart.compress(
        cell["teacher"], train if recipe.max_steps else None, dev_data=dev, recipe=recipe,
        output=folder / "model", device=device,
    )  # fmt: skip
    model, tokenizer = dqbart.load(result.folder, device=device), AutoTokenizer.from_pretrained(result.folder)
    row, texts, references = _score(model, tokenizer, cell, recipe, folder)
    if (settings := row.pop("generation")) != teacher["generation"]:
        raise ValueError(f"decoded with {settings}, its teacher with {teacher['generation']}; expected the same")
    del row["definition"]  # the teacher's row has both
    lines = (beside / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    _, interval = intervals(recipe, [texts], [json.loads(line)["output"] for line in lines], references)
    report = result.report
    shutil.copy(result.folder / "report.json", folder)
    if not cell["keep"]:
        for made in (folder / "model", folder / "model.training"):
            shutil.rmtree(made, ignore_errors=True)
    return row | {
        "teacher_score": teacher["score"],
        "retention": row["score"] / teacher["score"] if teacher["score"] else None,
        "retention_interval": interval,
        "file_bytes": report["sizes"]["file_bytes"],
        "teacher_bytes": report["teacher"]["fp32_bytes"],
        "ratio_to_fp32": report["sizes"]["ratio_to_fp32"],
        "minutes": round(report["seconds"].get("training", 0.0) / 60, 2),
        "steps": recipe.max_steps,
    }


def _score(model: Any, tokenizer: Any, cell: Row, recipe: Recipe, folder: Path) -> tuple[Row, list[str], Any]:
    """Fields of the score on the test split, what was written, and what is accepted."""
    set_languages(tokenizer, recipe.source_lang, recipe.target_lang)
    examples, references = test_set(cell["data"], recipe, cell["test_examples"])
    targets = examples.targets or []
    texts, settings = write_outputs(model, tokenizer, examples.sources, resolve(recipe, model.config))
    found = metrics.score(recipe.scored_by, texts, references, language=recipe.written_in, generation=settings)
    with (folder / "outputs.jsonl").open("w", encoding="utf-8") as file:
        for source, reference, output in zip(examples.sources, targets, texts, strict=True):
            file.write(json.dumps({"source": source, "reference": reference, "output": output}) + "\n")
    main = MAIN[recipe.scored_by]
    row = {
        "score": found.value, "metric": main, "interval": found.intervals[main], "values": found.values,
        "intervals": found.intervals, "examples": found.n, "definition": found.definition, "generation": settings,
    }  # fmt: skip
    return row, texts, references


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(folder: Path) -> int:
    try:
        run_cell(folder)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the last line is what the grid's row says
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # while it trains, the trainer's own handler saves a checkpoint first
    sys.exit(main(Path(sys.argv[1])))
