"""The tables of encoder_methods.py, from its rows alone: methods by task, TinyBERT's ablation, bits.

A score is the mean over seeds with their standard deviation behind it, in brackets the distance of the means to the
table's baseline: the student of the same shape that had no teacher, the whole TinyBERT, the student in float.
"""

import statistics
from collections import Counter
from typing import Any

from encoder_methods_cells import ABLATION, STAGES, STUDIES, cells
from ledger import markdown

Row = dict[str, Any]
LABELS = {
    "teacher": "(the teacher)", "scratch": "no teacher", "minilm": "MiniLM", "minilm2": "MiniLMv2",
    "tinybert": "TinyBERT, general stage", STAGES: "TinyBERT, both stages", "distilbert": "DistilBERT",
}  # fmt: skip
ORDER = ("teacher", "scratch", "minilm", "minilm2", "distilbert", "tinybert", STAGES)


def table(rows: list[Row]) -> str:
    """What is there of the three tables, study by study."""
    parts = []
    for study in dict.fromkeys(row["study"] for row in rows):
        own = [row for row in rows if row["study"] == study]
        made = [part for part in (methods_table(own), ablation_table(own), bits_table(own)) if part]
        parts.append("\n\n".join([f"**{study[0].upper()}{study[1:]}**", *made, *gaps(study, own)]))
    return "\n\n".join(parts)


def gaps(study: str, rows: list[Row]) -> list[str]:
    """A line that says how many of a study's cells were not run, by part; none where all were."""
    known = next((each for each in STUDIES.values() if str(each) == study), None)
    wanted = Counter(str(cell.shown["part"]) for cell in cells(known)) if known else Counter()
    missing = wanted - Counter(row["part"] for row in rows)
    words = ", ".join(f"{missing[part]} of {wanted[part]} ({part})" for part in missing)
    return [f"Not run yet, of the study's cells: {words}."] if words else []


def methods_table(rows: list[Row]) -> str:
    """One line for each shape and method, one column for each task."""
    main = [row for row in rows if row["part"] == "task"]
    tasks = list(dict.fromkeys(row["task"] for row in main))
    texts = {(row["shape"], row["method"]): row for row in rows if row["part"] == "text"}
    shapes = list(dict.fromkeys([shape for shape, method in texts if method == "teacher"] + [s for s, _ in texts]))
    lines = []
    for shape in shapes:
        for method in ORDER:
            text = texts.get((shape, "tinybert" if method == STAGES else method))
            if text is None or (method == STAGES and not _of(main, shape=shape, method=method)):
                continue
            minutes = None if method == STAGES else f"{text['minutes']:.0f}"
            guessed = None if text.get("words") is None or method == STAGES else f"{text['words']:.1f}"
            found = [
                _cell(
                    _of(main, task=task, shape=shape, method=method),
                    _of(main, task=task, shape=shape, method="scratch"),
                )
                for task in tasks
            ]
            lines.append([shape, LABELS[method], minutes, guessed, *found])
    return markdown(["layers x width", "method", "minutes on text", "words guessed", *tasks], lines) if lines else ""


def ablation_table(rows: list[Row]) -> str:
    """TinyBERT's student without one thing at a time."""
    without = [row for row in rows if row["part"] == "ablation"]
    if not without:
        return ""
    tasks = list(dict.fromkeys(row["task"] for row in without))
    shape = without[0]["shape"]
    main = [row for row in rows if row["part"] == "task" and row["shape"] == shape]
    whole = {task: _of(main, task=task, method=STAGES) for task in tasks}
    lines = [["everything", *(_cell(whole[task]) for task in tasks)]]
    lines += [
        [name, *(_cell(_of(without, task=task, method=name), whole[task]) for task in tasks)]
        for name in ABLATION
        if any(row["method"] == name for row in without)
    ]
    lines.append(["no task stage", *(_cell(_of(main, task=task, method="tinybert"), whole[task]) for task in tasks)])
    return markdown([f"TinyBERT {shape}", *tasks], lines)


def bits_table(rows: list[Row]) -> str:
    """The best student at fewer bits."""
    quantized = [row for row in rows if row["part"] == "quantized"]
    if not quantized:
        return ""
    first = quantized[0]
    same = ("task", "shape", "method", "seed")
    whole = _of([row for row in rows if row["part"] == "task"], **{name: first[name] for name in same})
    lines = [[row["bits"], _cell([row], whole), f"{row['file_bytes'] / 2**20:.2f}"] for row in [*whole, *quantized]]
    return markdown([f"{LABELS[first['method']]} {first['shape']}", first["task"], "file, MiB"], lines)


def best(rows: list[Row], task: str, shape: str) -> str | None:
    """The method with the highest mean on a task's validation set, of those whose students have this shape."""
    own = _of(rows, part="task", task=task, shape=shape)
    means = {name: statistics.fmean(row["validation"] for row in own if row["method"] == name)
             for name in dict.fromkeys(row["method"] for row in own)}  # fmt: skip
    return max(means, key=means.__getitem__, default=None)


def _of(rows: list[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def _cell(rows: list[Row], baseline: list[Row] | None = None) -> str | None:
    """`mean ± deviation (distance)`; the deviation of two seeds or more, the distance to another line."""
    if not rows:
        return None
    scores = [row["score"] for row in rows]
    mean = statistics.fmean(scores)
    text = f"{mean:.1f}" + (f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "")
    if baseline and baseline != rows:
        text += f" ({mean - statistics.fmean(row['score'] for row in baseline):+.1f})"
    return text
