"""What a person reads about a packed model: the size table on the terminal and the model card in the folder."""

import json
from pathlib import Path
from typing import Any

MIB = 2**20


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


def score_line(scores: dict[str, Any], who: str) -> str:
    result = scores[who]
    return ", ".join(
        f"{name} {value:.2f}"
        + ("" if name not in result["intervals"] else " [{:.2f}, {:.2f}]".format(*result["intervals"][name]))
        for name, value in result["values"].items()
    )


def write(folder: Path, report: dict[str, Any], base_model: str | None, called: str) -> None:
    """README.md of a packed folder (to be `called` that), with the hub's metadata: base model, relation, tags."""
    recipe, sizes, scores = report["recipe"], report["sizes"], report.get("scores")
    on_hub = base_model if base_model is not None and not Path(base_model).exists() else None
    metadata = ["library_name: transformers", "tags:", "- dqbart", "- quantized", "- distillation"]
    if on_hub:
        metadata += [f"base_model: {on_hub}", "base_model_relation: quantized"]
    name = on_hub or (Path(base_model).name if base_model else report["teacher"]["architecture"])
    lines = [
        "---", *metadata, "---", "",
        f"# {name}, {recipe['bits']} bits, {recipe['layers']} layers", "",
        "Compressed with dqbart: distillation-aware quantization (DQ-BART, arXiv 2203.11239). "
        f"Bits are weights-embeddings-activations, layers encoder-decoder; numerics `{recipe['numerics']}`.", "",
        "```python", "import dqbart", "from transformers import AutoTokenizer", "",
        f'tokenizer = AutoTokenizer.from_pretrained("{called}")',
        f'model = dqbart.load("{called}")',
        'ids = model.generate(**tokenizer("...", return_tensors="pt"))',
        "print(tokenizer.decode(ids[0], skip_special_tokens=True))", "```", "",
        "| | |", "| --- | --- |",
        f"| file | {sizes['file_bytes']:,} bytes ({sizes['file_bytes'] / MIB:.1f} MiB) |",
        f"| teacher in fp32 | {report['teacher']['fp32_bytes']:,} bytes, {sizes['ratio_to_fp32']} x as large |",
        f"| checked | logits within {report['gate']['max_logit_difference']:.1e} of the student's, greedy ids equal, "
        "in a fresh process |",
    ]  # fmt: skip
    if scores:
        lines += [f"| teacher, {scores['examples']:,} dev examples | {score_line(scores, 'teacher')} |"]
        lines += [f"| this model | {score_line(scores, 'student')} |"]
        result = scores["student"]
        lines += ["", f"Metric: `{result['definition']}`. Generation: `{json.dumps(result['generation'])}`."]
    else:
        lines += ["", "No scores: it was made without a dev set."]
    lines += [
        "", "## Limits", "",
        "Weights stay packed on disk; on CPU the torch engine expands them to 8 bits in memory. What the teacher gets "
        "wrong, this model gets wrong too. Measure it on your own data: `dqbart eval`.", "",
        "The recipe is in `recipe.yaml`, all measurements in `report.json`.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
