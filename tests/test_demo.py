"""The shipped teacher and the demo's road, on a handful of docstrings."""

import json
from pathlib import Path

from dqbart.cli import main
from dqbart.demo import TEACHER, demo

PAIRS = [
    ("Close the file and free its handle. Calling it twice does nothing.", "Close the file."),
    ("Every item of the list is passed to the function, results are collected.", "Apply a function to every item."),
    ("The path may be relative, then it is resolved against the working directory.", "Return an absolute path."),
    ("Raises KeyError if the key is not found and no default was given.", "Remove a key and return its value."),
]


def test_the_shipped_teacher_is_small_and_whole() -> None:
    names = {file.name for file in TEACHER.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert (TEACHER / "model.safetensors").stat().st_size <= 12_000_000
    config = json.loads((TEACHER / "config.json").read_text())
    assert (config["model_type"], config["encoder_layers"], config["decoder_layers"]) == ("bart", 6, 6)


def test_demo_compresses_scores_and_shows(tmp_path: Path, capsys) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(rows)
    answer = demo(tmp_path, max_steps=2, batch_size=2)
    shown = capsys.readouterr().out
    assert shown.count("student  ") == len(PAIRS) + 1 and "x smaller than the teacher" in shown
    assert answer["ratio_to_fp32"] > 10 and set(answer["test"]) == {"teacher", "student"}
    assert main(["generate", answer["output"], "--text", PAIRS[0][0]]) == 0
