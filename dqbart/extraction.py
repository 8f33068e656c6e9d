"""Sub-networks of a finished DynaBERT run, each a folder of its own: train once, deploy many.

A part of the network is quantized anew, from the float network that the run keeps: in `elastic/` of its folder, or the
folder itself with bits 32-32-32. Training did the same, so the part is what was trained, bit for bit. Rejected: cutting
rows and columns of packed codes, which needs no second file. Behind a narrower attention and feed-forward block a row
has fewer columns and so another scale, and of ternary rows other zeros: what comes out was never trained.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dqbart.notation import Layers
from dqbart.pipeline import ELASTIC, Result, pack, quantize, say, sizes
from dqbart.recipe import Recipe


def extract(folder: str | Path, *, output: str | Path, width: float = 1.0, depth: float = 1.0) -> Result:
    """Write the sub-network of a width and a depth, each above 0 to 1, as a folder that `dqbart.load` opens.

    `folder`: what `compress` with method "dynabert" left. Heads, neurons and layers are rounded to whole ones.
    report.json has the run's score of this sub-network if it was one of those trained. Raises `FileNotFoundError`,
    `FileExistsError` or `ValueError`, one line, for whatever doesn't fit, `GateError` if a fresh process finds another
    model in the new folder.
    """
    from transformers import AutoTokenizer

    from dqbart.evaluation import card
    from dqbart.packed.gate import check_in_fresh_process, probe_inputs
    from dqbart.packed.plain import is_plain, load_plain
    from dqbart.quant.attention import use_attention
    from dqbart.student.maps import kept_layers
    from dqbart.student.width import subnetwork, width_sizes

    folder, output = Path(folder), Path(os.path.abspath(output))
    recipe, report = _read_run(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: exists and is not empty; choose another --out")
    whole = load_plain(folder if is_plain(folder) else folder / ELASTIC)
    heads, neurons = width_sizes(whole.config, width)
    kept = kept_layers(whole.config.num_hidden_layers, depth)
    last = recipe.stages()[-1]
    trained = "training" in report["seconds"]
    if not trained or width not in last.widths or depth not in last.depths:
        what = f"widths {last.widths}, depths {last.depths}" if trained else "nothing of this network was"
        say(f"width {width}, depth {depth}: not trained ({what}): measure it")
    use_attention(whole)
    part = subnetwork(quantize(whole, recipe), width, depth)
    recipe = dataclasses.replace(recipe, layers=Layers(str(len(kept))))
    scored = {(row["width"], row["depth"]): row["score"] for row in report.pop("subnetworks", [])}
    score = scored.get((width, depth))
    cut = {
        "width": width, "depth": depth, "heads": heads, "neurons": neurons, "layers": kept,
        "parameters": part.num_parameters(), "score": score,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        staged = pack(part, tokenizer, recipe, Path(scratch) / output.name)
        gate = check_in_fresh_process(part, staged, probe_inputs(part, tokenizer, [], 0))
        report |= {
            "recipe": recipe.to_dict(),
            "subnetwork": cut,
            "layer_maps": dict.fromkeys(report["layer_maps"], kept),
            "sizes": sizes(staged, report["teacher"]["fp32_bytes"]),
            "gate": gate,
            "run": report["run"] | {"subnetwork": [width, depth]},
        }
        if "scores" in report:
            if score is None:
                del report["scores"]
            else:
                report["scores"] |= {"student": score, "outputs": []}
        card.write(staged, report, report["teacher"].get("hub_id"), output.name)
        (staged / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if output.exists():
            output.rmdir()
        os.replace(staged, output)
    say(card.size_lines(report))
    return Result(output, report)


def _read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    if not (folder / "recipe.yaml").is_file() or not (folder / "report.json").is_file():
        what = "no recipe.yaml and report.json in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}; expected what 'dqbart compress --method dynabert' left")
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    if not recipe.elastic:
        raise ValueError(
            f"{folder}: made by method {recipe.method!r}, of which no part works alone; expected what 'dqbart compress "
            "--method dynabert' left"
        )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if "subnetwork" in report:
        raise ValueError(f"{folder}: a sub-network itself; give the folder that it was extracted from")
    if recipe.bits.quantized and not (folder / ELASTIC).is_dir():
        raise FileNotFoundError(
            f"{folder / ELASTIC}: no such folder; sub-networks are cut from the float network in it: make the run again"
        )
    return recipe, report
