"""What a person reads about a packed model: the size table on the terminal and the model card in the folder.

The card is written on every save, so it says nothing that report.json does not know: no licence (the base model's
counts, and is not ours to guess), no language that nobody gave, no base model that is only a path on somebody's disk.
Its metadata go through huggingface_hub's own class, so that the hub reads what was meant. `library_name` is dqbart,
not transformers: the snippet that the hub would show for transformers does not run without `import dqbart`.
"""

import json
import re
from pathlib import Path
from typing import Any

from dqbart.methods import METHODS
from dqbart.student.maps import stack_words

MIB = 2**20
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU",
         "chrf": "chrF2", "accuracy": "accuracy", "f1": "F1", "exact": "exact match",
         "has_answer_f1": "F1 where there is an answer", "has_answer_exact": "exact match where there is an answer",
         "no_answer": "left unanswered where there is none", "best_f1": "F1 with the best no-answer threshold",
         "best_exact": "exact match with the best no-answer threshold",
         "matthews": "Matthews correlation", "pearson": "Pearson", "spearman": "Spearman"}  # fmt: skip
TAGS = {"classification": "text-classification", "regression": "text-classification", "questions": "question-answering",
        "text": "fill-mask", "sentences": "sentence-similarity", "s2s": "text2text-generation"}  # fmt: skip
ON_HUB = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "exact": "exact_match",
}  # metrics' ids there


def size_lines(report: dict[str, Any]) -> str:
    """Bytes by group, measured, and the ratio to the teacher in fp32 and fp16."""
    sizes = report["sizes"]
    rows = [f"  {name:18s} {count / MIB:10.2f} MiB" for name, count in sizes["groups"].items()]
    teacher = f"{report['teacher']['fp32_bytes'] / MIB:.1f} MiB"
    total = (
        f"  {'file':18s} {sizes['file_bytes'] / MIB:10.2f} MiB   {sizes['ratio_to_fp32']:.1f} x smaller than the "
        f"teacher in fp32 ({teacher}), {sizes['ratio_to_fp16']:.1f} x than in fp16"
    )
    return "\n".join(["size, measured:", *rows, total])


def write(folder: Path, report: dict[str, Any], base_model: str | None, called: str) -> None:
    """README.md of a packed folder that is going to be `called` that. `base_model`: hub id or path, if there is one."""
    on_hub = base_model if base_model is not None and not Path(base_model).exists() else None
    name = on_hub or (Path(base_model).name if base_model else report["teacher"]["architecture"])
    link = f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else f"`{name}`"
    parts = [
        f"---\n{metadata(report, on_hub, called)}\n---",
        f"# {_title(report, name)}",
        _what(report, link),
        "```python\n" + snippet(report, called) + "\n```",
        "## Size\n\n" + _sizes(report),
        "## Scores\n\n" + _scores(report),
        *(["## Sub-networks\n\n" + _subnetworks(report, called)] if "subnetworks" in report else []),
        "## Speed\n\n" + _speed(report),
        "## How it was made\n\n" + _recipe(report),
        "## Limits\n\n" + _limits(report),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def rewrite_speed(folder: Path, report: dict[str, Any]) -> None:
    """The speed section anew, where the card still has one; the rest may be the user's by now."""
    file = folder / "README.md"
    if file.is_file():
        section = re.compile(r"(?<=^## Speed\n\n).*?(?=^## )", re.DOTALL | re.MULTILINE)
        before = file.read_text(encoding="utf-8")
        file.write_text(section.sub(lambda _: _speed(report) + "\n\n", before, count=1), encoding="utf-8")


def _title(report: dict[str, Any], name: str) -> str:
    recipe = report["recipe"]
    how = f"{recipe['bits']} bits" if _quantized(report) else f"method {recipe['method']}"
    return f"{name}, {how}, {recipe['layers']} layers{_width_words(report)}"


def _what(report: dict[str, Any], link: str) -> str:
    says = METHODS[report["recipe"]["method"]].says
    if not _quantized(report):
        return f"Made from {link} with dqbart; what it learned from: {says}. An ordinary checkpoint, in float."
    trained = f"; what it learned from: {says}" if "training" in report["seconds"] else ", without training"
    return (
        f"{link} compressed with dqbart{trained}. Bits are weights-embeddings-activations{_layers_words(report)}; "
        "2 bits are ternary."
    )


def metadata(report: dict[str, Any], on_hub: str | None, called: str) -> str:
    """The card's YAML block, without its dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    quantized = _quantized(report)
    recipe, scores, data = report["recipe"], report.get("scores"), report.get("data") or {}
    taught = "training" in report["seconds"] and recipe["method"] != "finetune"
    codes = [recipe["source_lang"], recipe["target_lang"]]
    languages = [re.split("[-_]", code)[0] for code in codes if code] or [recipe["language"]]
    languages = list(dict.fromkeys(re.split("[-_]", code)[0] for code in languages if code))
    data_set, _, configuration = data.get("name", "").partition(":")
    if recipe["task"] in TAGS:
        task = TAGS[recipe["task"]]
    elif any(codes) or recipe["metric"] == "bleu":
        task = "translation"
    else:
        task = "summarization" if scores else "text2text-generation"
    results = [
        EvalResult(
            task_type=task, dataset_type=data_set if data.get("on_hub") else "unknown",
            dataset_config=configuration if data.get("on_hub") and configuration else None,
            dataset_name=data.get("name", "dev set"), dataset_split="dev", metric_name=NAMES.get(metric, metric),
            metric_type="rouge" if metric.startswith("rouge") else ON_HUB.get(metric, metric),
            metric_value=round(value, 2),
        )
        for metric, value in (scores["student"]["values"] if scores else {}).items()
    ]  # fmt: skip
    card = ModelCardData(
        base_model=on_hub,
        base_model_relation=("quantized" if quantized else "finetune") if on_hub else None,
        library_name="dqbart" if quantized or "subnetwork" in report else "transformers",
        pipeline_tag=task,
        language=languages or None,
        datasets=[data_set] if data.get("on_hub") else None,
        metrics=list(dict.fromkeys(r.metric_type for r in results)) or None,
        tags=["dqbart", *(["quantized"] if quantized else []), *(["distillation"] if taught else [])],
        model_name=called if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml())


def snippet(report: dict[str, Any], called: str) -> str:
    """Python that loads the folder `called` from beside it and runs one text; works as it stands."""
    recipe = report["recipe"]
    text = json.dumps(f"{recipe['source_prefix']}Put your own text here.", ensure_ascii=False)
    folder = json.dumps(called, ensure_ascii=False)
    language = f', src_lang="{recipe["source_lang"]}"' if recipe["source_lang"] else ""
    if recipe["task"] == "sentences":
        return f"import dqbart\n\nmodel = dqbart.load({folder})\nprint(model.encode([{text}]).shape)"
    given = f"{text}, {json.dumps('And a second one.')}" if recipe["task"] == "questions" else text
    limit = f'truncation=True, max_length={recipe["max_source_length"]}, return_tensors="pt"'
    uses = {
        "seq2seq": "print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))",
        "classification": "print(model.config.id2label[int(model(**inputs).logits.argmax())])",
        "regression": "print(float(model(**inputs).logits))",
        "questions": "output = model(**inputs)\n"
        "start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())\n"
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
    }
    lines = [
        "import dqbart",
        "from transformers import AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder}{language})",
        f"model = dqbart.load({folder})",
        f"inputs = tokenizer({given}, {limit})",
        uses.get(recipe["task"], "print(model(**inputs)[0].shape)"),
    ]
    return "\n".join(lines)


def _layers_words(report: dict[str, Any]) -> str:
    return ", layers encoder-decoder" if "-" in str(report["recipe"]["layers"]) else ""


def _width_words(report: dict[str, Any]) -> str:
    part = report.get("subnetwork")
    return f", {part['heads']} heads and {part['neurons']} neurons each" if part else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _sizes(report: dict[str, Any]) -> str:
    sizes, teacher = report["sizes"], report["teacher"]["fp32_bytes"]
    rows = [[name, f"{count:,}"] for name, count in sizes["groups"].items()]
    rows += [["**the whole file**", f"{sizes['file_bytes']:,}"], ["teacher in fp32", f"{teacher:,}"]]
    ratios = f"{sizes['ratio_to_fp32']:.1f} times smaller than the teacher in fp32, {sizes['ratio_to_fp16']:.1f} times"
    return f"{_table(['measured on disk', 'bytes'], rows)}\n\n{ratios} smaller than in fp16."


def _scores(report: dict[str, Any]) -> str:
    scores = report.get("scores")
    if not scores:
        return "None: it was made without a dev set. `dqbart eval` scores it on your data."
    student, teacher = scores["student"], scores.get("teacher")  # none where labels alone were learnt
    rows = []
    for name, value in student["values"].items():
        results = [student] if teacher is None else [teacher, student]
        cells = [
            f"{result['values'][name]:.2f}"
            + (" [{:.2f}, {:.2f}]".format(*result["intervals"][name]) if name in result["intervals"] else "")
            for result in results
        ]
        best = 0 if teacher is None else teacher["values"][name]
        rows.append(
            [NAMES.get(name, name), *cells, *([f"{100 * value / best:.1f} %" if best > 0 else ""] if teacher else [])]
        )
    header = [
        f"{scores['examples']:,} dev examples",
        *(["teacher", "this model", "kept"] if teacher else ["this model"]),
    ]
    others = student if teacher is None else teacher
    settings = {k: v for k, v in student["generation"].items() if others["generation"].get(k) == v}
    decoded = f"\n\nSettings: `{json.dumps(settings)}`." if settings else ""
    return (
        f"{_table(header, rows)}\n\nIn brackets: 95 % intervals, examples resampled. Metric: `{student['definition']}`."
        f"{chosen_by_them(report)}{decoded}"
    )


def chosen_by_them(report: dict[str, Any]) -> str:
    """That a score is not of unseen examples, where it isn't."""
    if "training" not in report["seconds"] or not report["recipe"].get("evaluations", 1):
        return ""
    return " The step of training that was kept is the best one on these examples: unseen ones are the fairer judge."


def _subnetworks(report: dict[str, Any], called: str) -> str:
    rows = report["subnetworks"]
    found = {(row["width"], row["depth"]): row for row in rows}
    widths, depths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("width", "depth"))
    name = next(iter(rows[0]["score"]["values"]))
    table = [
        [f"depth {depth:g}", *(
            f"{row['score']['values'][name]:.2f}, {row['parameters'] / 1e6:.1f} M"
            for row in (found[width, depth] for width in widths)
        )]
        for depth in depths
    ]  # fmt: skip
    header = [f"{NAMES.get(name, name)}, parameters", *(f"width {width:g}" for width in widths)]
    return (
        f"Parts of it are models, too: shares of its heads and neurons, and of its layers. `dqbart extract {called} "
        f"--width {widths[-1]:g} --depth {depths[-1]:g} --out part/` makes a folder of one"
        + (", cut from the float network in `elastic/`, for which alone that is there" if _quantized(report) else "")
        + f".\n\n{_table(header, table)}"
    )


def _quantized(report: dict[str, Any]) -> bool:
    return bool(report["recipe"]["bits"] != "32-32-32")


def _speed(report: dict[str, Any]) -> str:
    """A table of report.json's `speed`: `rows` as in benchmarks/latency.py, `environment` of the machine."""
    speed = report.get("speed")
    if not speed:
        return "Not measured: `dqbart bench --save` does, on your machine."
    rows = [
        [f"{row['system']} {row['bits'] or ''}".strip(), row["layers"], row["mode"],
         *(str(row[key]) for key in ("source", "batch", "threads")),
         f"{row['median_ms']:.4g}" if row.get("median_ms") is not None else "missing"]
        for row in speed["rows"]
    ]  # fmt: skip
    header = ["system", "layers", "mode", "source tokens", "batch", "threads", "median, ms"]
    machine = speed["environment"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['instructions']}"
    return f"{_table(header, rows)}\n\nOn {where}, torch {machine['packages']['torch']}."


def _recipe(report: dict[str, Any]) -> str:
    recipe, data = report["recipe"], report.get("data") or {}
    maps = stack_words(report["layer_maps"])
    origin = "Begun as a student of an earlier run, held to" if report.get("student") else "Copied from"
    if any(recipe[name] for name in ("hidden_size", "heads", "intermediate_size")):
        origin = "Of a shape of its own, held to"
    lines = [
        f"{origin} the teacher's layers {maps}. Method `{recipe['method']}`, task `{recipe['task']}`."
        + (f" Numerics `{recipe['numerics']}`, stored as `{recipe['storage']}`." if _quantized(report) else "")
    ]
    if "training" in report["seconds"]:
        length = f"{recipe['max_steps']} steps" if recipe["max_steps"] else f"{recipe['epochs']:g} epochs"
        losses = ", ".join(f"{name} {weight:g}" for name, weight in recipe["losses"].items() if weight)
        length += _more_stages(report)
        lines.append(
            f"Distilled for {length}, batch {recipe['batch_size']} x {recipe['gradient_accumulation']}, learning rate "
            f"{recipe['learning_rate']:g}, losses {losses}, seed {recipe['seed']}; "
            f"{report['seconds']['training'] / 60:.1f} minutes."
        )
    else:
        lines.append("Quantized without training." if _quantized(report) else "Not trained.")
    if recipe["skip"]:
        lines.append(f"Left in float: `{', '.join(recipe['skip'])}`.")
    if data:
        counts = ", ".join(f"{data[split]:,} for {use}" for split, use in (("train", "training"), ("dev", "scores")) if
                           data.get(split))  # fmt: skip
        lines.append(f"Data: `{data['name']}`" + (f" ({counts})." if counts else "."))
    gate = report["gate"]
    lines.append(
        f"Checked in a fresh process: logits within {gate['max_logit_difference']:.1e} of the student's"
        f"{', greedy ids equal' if gate['greedy_ids_equal'] else ''}. The whole recipe is in `recipe.yaml`, "
        "all measurements are in `report.json`."
    )
    return "\n".join(f"- {line}" for line in lines)


def _more_stages(report: dict[str, Any]) -> str:
    recipe, more = report["recipe"], report.get("stages", 1) - 1

    def length(name: str) -> str:
        return f"{recipe['max_steps']} steps" if recipe["max_steps"] else f"{recipe[name]:g} epochs"

    if recipe["method"] != "dynabert":
        return f", then {length('prediction_epochs')} on predictions" if more else ""
    parts = [f"{length('label_epochs')} on labels"] if recipe["label_epochs"] else []
    if more > len(parts):
        parts.insert(0, f"{length('prediction_epochs')} at all depths")
    return ", then ".join([" at all widths", *parts])


def _limits(report: dict[str, Any]) -> str:
    bits = report["recipe"]["bits"]
    weights = int(bits.split("-")[0])
    lines = [
        "It makes the teacher's mistakes and some of its own. Measure it on your own data: `dqbart eval`.",
        "The licence is the base model's; add it to this card's metadata before publishing.",
    ]
    if weights < 32:
        lines.append("`import dqbart` comes first: without it transformers refuses the file.")
    if weights < 8:
        lines.append(f"Weights take {weights} bits on disk; on CPU the torch engine expands them to 8 bits in memory.")
    if "training" not in report["seconds"] and weights < 3:
        lines.insert(0, f"At {bits} bits without training it is of no use: compress it again with data.")
    return "\n".join(f"- {line}" for line in lines)
