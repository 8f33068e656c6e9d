"""The model card: metadata that the hub reads as meant, numbers with their settings, and a snippet that runs."""

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_generate import TEXTS, mbart_tokenizer
from tiny_models import tiny_seq2seq
from transformers import MBartTokenizer

import dqbart
from dqbart.cli import main
from dqbart.evaluation import card
from dqbart.evaluation.report import report
from dqbart.pipeline import Result


@pytest.fixture(scope="module")
def scored(teacher_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A tiny BART, distilled for two steps and scored."""
    recipe = dqbart.Recipe(layers="2-1", max_steps=2, batch_size=8, evaluations=1, dev_subset=2)
    return dqbart.compress(
        str(teacher_folder), pairs_file, recipe=recipe, output=tmp_path_factory.mktemp("card") / "it's small"
    )


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A tiny mBART, quantized without training or data."""
    folder = tmp_path_factory.mktemp("mbart")
    tokenizer = mbart_tokenizer(MBartTokenizer)
    model = tiny_seq2seq("mbart", vocab_size=len(tokenizer))
    model.generation_config.update(max_length=12, num_beams=2)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0, source_lang="de_DE", target_lang="en_XX")
    return dqbart.compress(folder / "teacher", recipe=recipe, output=folder / "small")


def written(report: dict[str, Any], folder: Path, base_model: str | None = None, called: str = "small") -> ModelCard:
    card.write(folder, report, base_model, called)
    return ModelCard.load(folder / "README.md")


def changed(report: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return copy.deepcopy(report) | parts


@pytest.mark.parametrize("which", ["scored", "translator"])
def test_the_snippet_runs_in_a_fresh_process(which: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(which)
    code = re.search(r"```python\n(.*?)\n```", (result.folder / "README.md").read_text(), re.S)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=result.folder.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    text = next(
        n.value for n in ast.walk(ast.parse(code[1])) if isinstance(n, ast.Constant) and "own text" in str(n.value)
    )
    ids = tokenizer(text, return_tensors="pt")
    if which == "translator":
        assert tokenizer.src_lang == "de_DE" and 'src_lang="de_DE"' in code[1]
    expected = tokenizer.decode(result.load().generate(**ids)[0], skip_special_tokens=True)
    assert done.stdout.rstrip("\n") == expected


def test_metadata_of_a_local_teacher(scored: Result) -> None:
    data = ModelCard.load(scored.folder / "README.md").data
    assert data.base_model is None and "base_model_relation" not in data.to_dict() and data.license is None
    assert data.library_name == "dqbart" and data.pipeline_tag == "summarization" and data.language is None
    assert data.model_name == "it's small" and data.metrics == ["rouge"]
    values = scored.report["scores"]["student"]["values"]
    assert {r.metric_name: r.metric_value for r in data.eval_results} == {
        card.NAMES[name]: round(value, 2) for name, value in values.items()
    }
    assert {(r.metric_type, r.dataset_type, r.task_type) for r in data.eval_results} == {
        ("rouge", "unknown", "summarization")
    }


def test_metadata_of_a_hub_teacher_and_data(scored: Result, tmp_path: Path) -> None:
    data = {"name": "knkarthick/samsum", "on_hub": True, "train": 14732, "dev": 818}
    found = written(changed(scored.report, data=data), tmp_path, "facebook/bart-base")
    assert found.data.base_model == "facebook/bart-base"
    assert found.data.to_dict()["base_model_relation"] == "quantized"
    assert (
        found.data.datasets == ["knkarthick/samsum"] and found.data.eval_results[0].dataset_type == "knkarthick/samsum"
    )
    assert "14,732 for training, 818 for scores" in found.text


def test_scores_of_examples_that_chose_the_student_say_so(scored: Result, tmp_path: Path) -> None:
    words, recipe = "best one on these examples", scored.report["recipe"]
    assert words in ModelCard.load(scored.folder / "README.md").text
    assert words not in written(changed(scored.report, seconds={"packing": 1.0}), tmp_path).text  # not trained
    assert words not in written(changed(scored.report, recipe=recipe | {"evaluations": 0}), tmp_path).text


def test_without_scores_nothing_is_claimed(translator: Result) -> None:
    found = ModelCard.load(translator.folder / "README.md")
    assert found.data.eval_results is None and "model-index" not in found.data.to_dict()
    assert found.data.pipeline_tag == "translation" and found.data.language == ["de", "en"]
    assert "without a dev set" in found.text and "Not measured" in found.text and "without training" in found.text


def test_the_language_is_the_one_that_was_given(scored: Result, tmp_path: Path) -> None:
    recipe = scored.report["recipe"] | {"language": "zh"}
    assert written(changed(scored.report, recipe=recipe), tmp_path).data.language == ["zh"]
    for given in ({"language": "pt-BR"}, {"source_lang": "pt_XX", "target_lang": "pt_XX"}):
        one = written(changed(scored.report, recipe=scored.report["recipe"] | given), tmp_path)
        assert one.data.language == ["pt"]


def test_only_what_had_a_teacher_is_tagged_as_distilled(scored: Result, translator: Result, tmp_path: Path) -> None:
    assert "distillation" in written(scored.report, tmp_path).data.tags
    recipe = scored.report["recipe"] | {"method": "finetune"}
    for other in (translator.report, changed(scored.report, recipe=recipe)):
        assert "distillation" not in written(other, tmp_path).data.tags


def test_measured_speed_is_put_into_the_folder(translator: Result, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "small"
    shutil.copytree(translator.folder, folder)
    card_before = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card_before.replace("## Limits", "My own words.\n\n## Limits"))
    command = ["bench", str(folder), "--source-length", "8", "--new-tokens", "2", "--rounds", "1", "--beams", "1"]
    assert main([*command, "--save"]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert {row["system"] for row in report["speed"]["rows"]} >= {"dqbart-torch"}
    text = (folder / "README.md").read_text()
    assert "| dqbart-torch" in text and "Not measured" not in text and "My own words." in text
    assert text.index("## Speed") < text.index("| dqbart-torch") < text.index("## How it was made")
    assert ModelCard.load(folder / "README.md").data == ModelCard.load(translator.folder / "README.md").data
    (folder / "README.md").unlink()
    assert main([*command, "--save"]) == 0 and not (folder / "README.md").exists()
    (folder / "report.json").unlink()
    assert main([*command, "--save"]) == 2
    assert "report.json: no such file; expected a folder that 'dqbart compress' wrote" in capsys.readouterr().err


def test_the_configuration_of_a_data_set_is_no_part_of_its_name(scored: Result, tmp_path: Path) -> None:
    data = {"name": "nyu-mll/glue:sst2", "on_hub": True, "train": 9, "dev": 9}
    found = written(changed(scored.report, data=data), tmp_path).data
    assert found.datasets == ["nyu-mll/glue"]
    assert {(r.dataset_type, r.dataset_config) for r in found.eval_results} == {("nyu-mll/glue", "sst2")}


def test_an_unscored_bart_has_no_pipeline_tag_of_summaries(scored: Result, tmp_path: Path) -> None:
    report = copy.deepcopy(scored.report)
    del report["scores"], report["seconds"]["training"]
    found = written(report, tmp_path)
    assert found.data.language is None and found.data.pipeline_tag == "text2text-generation"
    assert "2-2-8 bits without training it is of no use" in found.text


def test_scores_stand_with_settings_and_sizes_with_bytes(scored: Result) -> None:
    text = (scored.folder / "README.md").read_text()
    student = scored.report["scores"]["student"]
    assert student["definition"] in text and json.dumps(student["generation"]) in text
    low, high = student["intervals"]["rougeL"]
    assert f"{student['values']['rougeL']:.2f} [{low:.2f}, {high:.2f}]" in text
    assert f"| **the whole file** | {(scored.folder / 'model.safetensors').stat().st_size:,} |" in text
    assert "| ROUGE-L |" in text and "seed 28" in text


def test_speed_stands_with_its_machine(scored: Result, tmp_path: Path) -> None:
    row = {"device": "cpu", "shape": "tiny", "layers": "2-1", "system": "dqbart torch", "bits": "2-2-8"}
    row |= {"mode": "greedy", "source": 128, "batch": 1, "threads": 2, "median_ms": 12.3456}
    rows = [row, row | {"system": "ctranslate2 int8", "bits": None, "median_ms": None, "error": "not installed"}]
    environment = scored.report["environment"]
    text = written(changed(scored.report, speed={"environment": environment, "rows": rows}), tmp_path).text
    assert "| dqbart torch 2-2-8 | 2-1 | greedy | 128 | 1 | 2 | 12.35 |" in text and "| missing |" in text
    assert f"On {environment['processor']}, {environment['instructions']}" in text


def test_names_cannot_break_the_metadata(scored: Result, tmp_path: Path) -> None:
    name = 'a: "b"\n---\nlicense: mit # {'
    found = written(changed(scored.report, data={"name": name}), tmp_path, called=name)
    assert found.data.license is None and found.data.model_name == name
    assert found.data.eval_results[0].dataset_name == name


@pytest.mark.parametrize("pipe", ["a|b", "||"])
def test_table_cells_keep_their_pipes(pipe: str) -> None:
    assert card._table([pipe, "x"], [["1", "2"]]).splitlines()[0].count("|") - pipe.count("|") == 3
    assert pipe.replace("|", "\\|") in card._table([pipe, "x"], [["1", "2"]])


def test_texts_of_the_data_are_not_in_the_card(scored: Result) -> None:
    text = (scored.folder / "README.md").read_text()
    assert not any(row["source"] in text for row in scored.report["scores"]["outputs"]) and TEXTS[0] not in text


def test_what_layers_cost_is_put_into_the_folder(
    scored: Result, teacher_folder: Path, pairs_file: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(scored.folder, folder)
    config = str(folder / "recipe.yaml")
    command = ["sensitivity", str(teacher_folder), "--data", str(pairs_file), "--config", config, "--limit", "4"]
    assert main([*command, "--score", "--save", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads((folder / "report.json").read_text())["sensitivity"]
    layers = [f"{stack}.{i}" for stack in ("encoder", "decoder") for i in range(3)]
    assert [row["part"] for row in rows] == ["embedding", *layers]
    assert len(out) == len(rows) + 2 and all("KL" in line and "score" in line for line in out[1:-1])
    assert json.loads(out[-1])["rows"] == rows
    report([folder], tmp_path / "page.html")
    assert "What each layer costs" in (tmp_path / "page.html").read_text()
    assert main([*command, "--save", str(tmp_path)]) == 2
    assert "report.json: no such file" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("[]")
    assert main([*command, "--save", str(tmp_path)]) == 2 and "not a report" in capsys.readouterr().err
