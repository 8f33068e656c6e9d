"""`paper` numerics against what the DQ-BART authors' own code gave."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "goldens" / "paper"


def test_all_figures_hold() -> None:
    """The command as README gives it."""
    done = subprocess.run(
        [sys.executable, "benchmarks/authors.py"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout, done.stderr
    code, lines = done.returncode, done.stdout.splitlines()
    gold = json.loads((FOLDER / "gold.json").read_text())
    assert code == 0 and json.loads(lines[-1]) == {"folder": "paper", "figures_off": 0, "tolerance": 1e-4}
    assert len(gold["cases"]) >= 2 and not any("OFF" in line or "DIFFERENT" in line for line in lines)
    for case in gold["cases"]:
        label = f"{case['bits']}-bit {case['layers']}"
        figures = [line for line in lines if line.startswith(label)]
        assert len(figures) == 8 + 1 + len(case["grad_norm"]) + 3 + 2  # losses, total, norms, logits, ids


def test_one_figure_off_by_a_hundredth_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import authors

    for name in ("config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, tmp_path)
    gold = json.loads((FOLDER / "gold.json").read_text())
    gold["cases"] = [case for case in gold["cases"] if case["bits"] == 2][:1]
    gold["cases"][0]["losses"]["crs_att"] *= 1.01
    (tmp_path / "gold.json").write_text(json.dumps(gold))
    monkeypatch.setattr(sys, "argv", ["authors.py", str(tmp_path)])
    code, lines = authors.main(), capsys.readouterr().out.splitlines()
    off = [line for line in lines if line.endswith("OFF")]
    assert code == 1 and len(off) == 1 and "crs_att" in off[0] and "1.0e-02" in off[0].replace("9.9e-03", "1.0e-02")
    assert json.loads(lines[-1])["figures_off"] == 1


def _first_grad(case: dict[str, Any]) -> None:
    case["grad_norm"][next(iter(case["grad_norm"]))] *= 0.99


def _largest_logit(case: dict[str, Any]) -> None:
    shown = torch.tensor(case["logits"])
    shown.view(-1)[shown.abs().argmax()] *= 1.01
    case["logits"] = shown.tolist()


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "task": lambda case: case["losses"].update(task=case["losses"]["task"] * 1.01),
    "enc_hid_last": lambda case: case["losses"].update(enc_hid_last=case["losses"]["enc_hid_last"] * 1.01),
    "total": lambda case: case.update(total=case["total"] * 1.01),
    "grad ": _first_grad,
    "logits shown": _largest_logit,
    "logits sum": lambda case: case.update(logits_sum=case["logits_sum"] * 1.01),
    "logits square": lambda case: case.update(logits_sq=case["logits_sq"] * 0.99),
}


def test_every_kind_of_figure_and_the_ids_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSeq2SeqLM

    from benchmarks import authors
    from dqbart.quant.attention import use_attention

    gold = json.loads((FOLDER / "gold.json").read_text())
    teacher = AutoModelForSeq2SeqLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    use_attention(teacher)
    batch = {k: torch.tensor(gold[k]) for k in ("input_ids", "attention_mask", "labels")}
    case = next(c for c in gold["cases"] if c["bits"] == 2)
    changed = copy.deepcopy(case)
    for change in CHANGES.values():
        change(changed)
    errors = authors.figures(teacher, changed, batch)
    off = [name for name, error in errors.items() if error > authors.TOLERANCE]
    assert len(off) == len(CHANGES) and all(any(name.startswith(kind) for name in off) for kind in CHANGES)

    monkeypatch.setattr(authors, "RERUNS", 1)
    changed["greedy"][1][3] += 1
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    verdicts = authors.generated(teacher, changed, inputs)
    assert verdicts["greedy"][1] == "DIFFERENT"
    assert {*verdicts["greedy"][::2], *verdicts["beam4"]} <= {"identical", "search", "noise"}
