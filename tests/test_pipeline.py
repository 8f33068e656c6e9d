"""The whole road on a tiny model: train, resume, pack, gate, score, reload; and everything that must be refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import token_batch

import dqbart
from dqbart.packed.gate import GateError, check_in_fresh_process, probe_inputs
from dqbart.pipeline import _trains_outputs
from dqbart.recipe import LossWeights

RECIPE = dqbart.Recipe(
    layers="2-1", max_steps=6, batch_size=8, evaluations=2, dev_subset=4, losses=LossWeights(encoder_hidden=0.1)
)


def test_compress_load_and_rerun(teacher_folder: Path, pairs_file: Path, tmp_path: Path, capfd) -> None:
    output = tmp_path / "small"
    result = dqbart.compress(str(teacher_folder), pairs_file, recipe=RECIPE, output=output)
    names = {file.name for file in output.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "recipe.yaml"}
    assert names >= {"report.json", "README.md"} and "training_args.bin" not in names
    report = json.loads((output / "report.json").read_text())
    assert report["sizes"]["file_bytes"] == (output / "model.safetensors").stat().st_size
    assert sum(report["sizes"]["groups"].values()) == report["sizes"]["file_bytes"]
    assert report["gate"]["greedy_ids_equal"] and report["gate"]["max_logit_difference"] <= 1e-4
    assert report["scores"]["examples"] == 6 and "rougeL" in report["scores"]["student"]["values"]
    assert report["scores"]["student"]["generation"]["num_beams"] == 2
    assert dqbart.Recipe.from_yaml(output / "recipe.yaml").layers.text == "2-1"
    assert not (tmp_path / "small.training" / "checkpoints").exists()
    error = capfd.readouterr().err
    assert "columns: source 'source', target 'target'" in error and "left" in error and "logits" in error

    model = result.load()
    ids = model.generate(input_ids=torch.tensor([[0, 5, 6, 2]]))
    assert ids.shape[0] == 1 and model.config.decoder_layers == 1
    before = (output / "model.safetensors").stat().st_mtime_ns
    again = dqbart.compress(str(teacher_folder), pairs_file, recipe=RECIPE, output=output)
    assert again.report == report and (output / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_is_refused_then_overwritten(teacher_folder: Path, tmp_path: Path) -> None:
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0)
    dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "out")
    other = dqbart.Recipe(bits="2-2-8", epochs=0)
    with pytest.raises(FileExistsError, match=r"another recipe \(bits '8-8-8', now '2-2-8'\).*--overwrite"):
        dqbart.compress(str(teacher_folder), recipe=other, output=tmp_path / "out")
    settings = teacher_folder / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"num_beams": 3}))
    with pytest.raises(FileExistsError, match="made with another teacher"):  # the same weights, other outputs
        dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "out")
    settings.write_text(before)
    run = json.loads((tmp_path / "out" / "report.json").read_text())
    del run["run"]["recipe"]["dropout"]  # a field that came later, whose default may not be what was done before
    (tmp_path / "out" / "report.json").write_text(json.dumps(run))
    with pytest.raises(FileExistsError, match="made by another version of dqbart, whose recipes have no 'dropout'"):
        dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "out")
    result = dqbart.compress(str(teacher_folder), recipe=other, output=tmp_path / "out", overwrite=True)
    assert result.report["recipe"]["bits"] == "2-2-8"


def test_a_link_is_written_where_it_points_and_a_second_gpu_is_not_taken(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0)
    result = dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "link")
    assert result.folder == tmp_path / "disk" and (tmp_path / "link" / "report.json").is_file()
    with pytest.raises(ValueError, match="'cuda:1': expected 'cuda' in training; choose with CUDA_VISIBLE_DEVICES=1"):
        dqbart.compress(str(teacher_folder), output=tmp_path / "out", device="cuda:1")


def test_a_foreign_folder_is_never_touched(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not written by"):
            dqbart.compress(str(teacher_folder), recipe=dqbart.Recipe(epochs=0), output=tmp_path, overwrite=overwrite)
    assert (tmp_path / "letters.txt").read_text() == "mine" and not Path(f"{tmp_path}.training").exists()


def test_interrupted_command_resumes_to_the_same_weights(
    teacher_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """SIGINT in the middle, the same command again: bit for bit what an uninterrupted run gives."""
    config = tmp_path / "run.yaml"
    config.write_text("layers: 2-1\nmax_steps: 40\nbatch_size: 8\nevaluations: 2\ndev_subset: 4\ndropout: 0.1\n")
    command = [sys.executable, "-m", "dqbart", "compress", str(teacher_folder), "--data", str(pairs_file)]
    command += ["--config", str(config), "--seed", "3", "--device", "cpu", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, env=environment)
    assert straight.returncode == 0, straight.stderr

    process = subprocess.Popen([*command, str(tmp_path / "b")], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 7/"):
            process.send_signal(signal.SIGINT)
            break
    process.stderr.read()
    assert process.wait(timeout=120) == 130
    before = json.loads((tmp_path / "b.training" / "seconds.json").read_text())["training"]
    assert not (tmp_path / "b").exists() and list((tmp_path / "b.training" / "checkpoints").iterdir())
    resumed = subprocess.run([*command, str(tmp_path / "b")], capture_output=True, text=True, env=environment)
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr, resumed.stderr
    found = json.loads(resumed.stdout.splitlines()[-1])
    assert found["output"] == str(tmp_path / "b") and found["seconds"]["training"] > before > 0  # of both attempts
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"eos_token_id": [2, -1]}, r"eos_token_id \[2, -1\]: not a value that generate takes"),
        ({"num_beams": 4.0}, "num_beams 4.0: not a value"), ({"max_length": 10**30}, "max_length 10+: not a value"),
        ({"forced_bos_token_id": 250004}, "forced_bos_token_id 250004: not a value"),
        ({"max_new_tokens": "5"}, "max_new_tokens '5': not a value"),
        ({"output_scores": True}, "output_scores.*correct it in the teacher's, or under generation in --config"),
    ],
)  # fmt: skip
def test_settings_that_no_folder_could_have_are_refused_before_training(
    settings: dict[str, Any], words: str, teacher_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    file = teacher / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=words) as error:
        dqbart.compress(teacher, pairs_file, recipe=RECIPE, output=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out.training").exists()


def test_a_first_token_that_the_recipe_makes_up_is_refused_before_training(
    teacher_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, generation={"forced_bos_token_id": 5000})
    with pytest.raises(ValueError, match=r"^generation_config.json: forced_bos_token_id 5000: not .*in --config$"):
        dqbart.compress(teacher_folder, pairs_file, recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_sampling_settings_of_old_are_left_out(file: str, teacher_folder: Path, tmp_path: Path, capfd) -> None:
    """Checkpoints have them beside do_sample false, or in config.json, and transformers refuses to save that again."""
    teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    if file == "config.json":
        (teacher / "generation_config.json").unlink()
    values = json.loads((teacher / file).read_text()) | {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
    (teacher / file).write_text(json.dumps(values))
    dqbart.compress(teacher, recipe=dqbart.Recipe(bits="8-8-8", epochs=0), output=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not {"temperature", "top_k", "top_p"} & found.keys()
    assert "not sampling: temperature 0.7, top_k 0, top_p 0.9 left out of the settings" in capfd.readouterr().err
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0, generation={"do_sample": True})
    dqbart.compress(teacher, recipe=recipe, output=tmp_path / "sampling")
    assert json.loads((tmp_path / "sampling" / "generation_config.json").read_text())["temperature"] == 0.7


def test_teacher_writes_missing_targets(teacher_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.csv"
    file.write_text("text\n" + "\n".join(f"the cat sees a {w} tree" for w in ("big", "red", "old", "new")) + "\n")
    recipe = dqbart.Recipe(layers="1-1", max_steps=2, batch_size=2)
    result = dqbart.compress(str(teacher_folder), file, recipe=recipe, output=tmp_path / "out")
    assert "scores" not in result.report
    assert len(list((tmp_path / "out.training" / "targets").glob("targets-*.jsonl"))) == 1


@pytest.mark.parametrize("bits", ["8-8-8", "4-4-8", "3-3-8", "1-1-8", "2-4-32", "32-32-32", "8-32-8"])
def test_every_width_passes_the_gate(teacher_folder: Path, tmp_path: Path, bits: str) -> None:
    """The gate itself compares a fresh process with the student; here it runs for every kind of storage."""
    recipe = dqbart.Recipe(bits=bits, epochs=0, storage="trits" if bits.startswith("2") else "planar32")
    report = dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "out").report
    assert report["gate"]["max_logit_difference"] <= 1e-4


@pytest.mark.parametrize("preset", ["paper-8-8-8", "paper-2-2-8"])
def test_paper_numerics_pass_the_gate(teacher_folder: Path, tmp_path: Path, preset: str) -> None:
    recipe = dqbart.Recipe.preset(preset, epochs=0)
    report = dqbart.compress(str(teacher_folder), recipe=recipe, output=tmp_path / "out").report
    assert report["gate"]["max_logit_difference"] <= 1e-4


def test_the_gate_sees_a_wrong_model(teacher_folder: Path, tmp_path: Path) -> None:
    dqbart.compress(str(teacher_folder), recipe=dqbart.Recipe(bits="8-8-8", epochs=0), output=tmp_path / "out")
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    teacher = AutoModelForSeq2SeqLM.from_pretrained(teacher_folder).eval()
    inputs = probe_inputs(teacher, AutoTokenizer.from_pretrained(teacher_folder), ["the cat"], 16)
    with pytest.raises(GateError, match=r"differ from the student's by .* \(allowed 1e-04\)"):
        check_in_fresh_process(teacher, tmp_path / "out", inputs)


def test_the_gate_imports_nothing_of_the_users_folder(
    bart: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("secrets", "types", "datasets", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    shutil.copytree(bart[1], tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    assert check_in_fresh_process(bart[0], Path("small"), token_batch([5, 3]))["greedy_ids_equal"]


def test_the_gate_imports_from_where_this_process_does(
    bart: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('taken from there')")  # imported at every start
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(GateError, match="taken from there"):
        check_in_fresh_process(bart[0], bart[1], token_batch([5, 3]))


def test_full_disk_leaves_nothing(teacher_folder: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: one line, exit code 2, no folder."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from dqbart.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "compress", str(teacher_folder), "--epochs", "0", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("run.json", "seconds.json", "dqbart.lock")]
    assert left == [], left


def test_importing_dqbart_is_light() -> None:
    code = "import sys, dqbart; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers'}))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and start is not None


@pytest.mark.parametrize(
    "task, terms, chooses",
    [
        ("classification", {"task": 1.0}, True), ("classification", {"logits": 1.0, "hidden": 1.0}, True),
        ("classification", {"hidden": 1.0, "scores": 1.0}, False), ("questions", {"values": 1.0}, False),
        ("seq2seq", {"encoder_hidden": 1.0}, True), ("sentences", {"hidden": 1.0}, True),
    ],
)  # fmt: skip
def test_a_head_that_learns_nothing_does_not_choose_the_student(task, terms, chooses) -> None:
    """TinyBERT's inner layers are trained under a head that is random: its dev score is noise."""
    losses = LossWeights(**dict(task=0.0, logits=0.0) | terms)
    assert _trains_outputs(dqbart.Recipe(task=task, losses=losses)) is chooses
