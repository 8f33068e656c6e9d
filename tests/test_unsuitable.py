"""Requests that don't suit the model or the data: one line with the way out, and no folder left behind."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import FEW, bert_tokenizer, sentences, write
from tiny_models import tiny_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dqbart
from dqbart.cli import main
from dqbart.packed.sentence import Pooling, write_pooling
from dqbart.tasks.run import evaluate


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["compress", *map(str, arguments)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dqbart: error: ")
    return line


def test_what_a_model_lacks_is_said_at_once(
    bert: Path, classifier: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out = ("--out", tmp_path / "out")
    said = refused(
        capsys, bert, "--task", "classification", "--method", "finetune", "--bits", "32-32-32", "--epochs", "0", *out
    )
    assert "no classes are known: neither the checkpoint nor any training data has them; give --data" in said
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(tmp_path / "padless")
    said = refused(capsys, tmp_path / "padless", "--data", labelled, "--method", "prediction", *out)
    assert "padless' has no padding token; give the one of the checkpoint" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_sentence_encoders_have_nothing_to_say(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "encoder"
    tiny_encoder("bert").bert.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    texts = write(tmp_path / "texts.jsonl", [{"sentence": text} for text in sentences(30)])
    assert main(["compress", str(folder), "--bits", "8-8-8", "--epochs", "0", "--out", str(tmp_path / "bare")]) == 0
    write_pooling(folder, Pooling())
    for method in ("dq", "finetune", "prediction", "distilbert", "ternarybert"):
        said = refused(capsys, folder, "--data", texts, "--method", method, "--out", tmp_path / "out")
        assert f"method '{method}' with task 'sentences'" in said and "give --method sentence" in said
    assert not (tmp_path / "out.training").exists()
    assert main(["compress", str(folder), "--bits", "8-8-8", "--epochs", "0", "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "out"), "--data", str(texts)]) == 2
    assert (
        "no pairs of sentences with similarities to score against; give --pair-column and --target-column"
        in capsys.readouterr().err
    )


def test_s2s_says_who_took_the_positions(bert: Path, tmp_path: Path, capsys: Any) -> None:
    data = write(tmp_path / "p.jsonl", [{"source": text, "target": "cat"} for text in sentences(30)])
    said = refused(capsys, bert, "--data", data, "--task", "s2s", "--method", "finetune", "--out", tmp_path / "out")
    assert "source and target share the model's" in said and "are left for sources; give less in --config" in said


def test_what_does_not_fit(
    bert: Path, classifier: Path, labelled: Path, teacher_folder: Path, pairs_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = ("--out", tmp_path / "out")
    said = refused(capsys, bert, "--data", labelled, "--task", "classification", *out)
    assert "has no head for classification; train one first, with --method finetune --bits 32-32-32" in said
    said = refused(capsys, teacher_folder, "--data", pairs_file, "--method", "tinybert", *out)
    assert "method 'tinybert' is for encoders, and a bart model has a decoder" in said
    said = refused(capsys, classifier, "--data", labelled, "--method", "tinybert", "--layers", "2", *out)
    assert "layer map 'uniform': 2 student layers don't divide the teacher's 3" in said
    unlabelled = write(tmp_path / "plain.jsonl", [{"sentence": text} for text in sentences(30)])
    said = refused(capsys, classifier, "--data", unlabelled, *out)
    assert "no labels, which losses.task needs; give --target-column, or learn from the teacher alone" in said
    wrong = write(tmp_path / "wrong.jsonl", [{"sentence": "the cat", "label": "fish"}] * 30)
    said = refused(capsys, classifier, "--data", wrong, *out)
    assert "'fish'" in said and "dog" in said
    (tmp_path / "recipe.yaml").write_text("hidden_size: 18\nheads: 4\nmethod: minilm2\n")
    said = refused(capsys, bert, "--data", unlabelled, "--config", tmp_path / "recipe.yaml", *out)
    assert "heads 4" in said and "18" in said
    silent = tmp_path / "no-mask"
    tiny_encoder("bert").save_pretrained(silent)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(silent)
    said = refused(capsys, silent, "--data", unlabelled, "--method", "distilbert", *out)
    assert "has no mask token, which masked language modelling needs; use a method without it" in said
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_fit(classifier: Path, labelled: Path, tmp_path: Path, capsys: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    model.config.id2label, model.config.label2id = {0: "dog", 1: "cat"}, {"dog": 0, "cat": 1}
    model.save_pretrained(tmp_path / "cats")
    out = ("--data", labelled, "--out", tmp_path / "out")
    said = refused(capsys, classifier, "--student", tmp_path / "cats", *out)
    assert "BertForSequenceClassification has classes dog, cat; expected dog, other: give a checkpoint without" in said
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "several")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / "several")
    said = refused(capsys, tmp_path / "several", *out)
    assert "problem_type 'multi_label_classification'; expected one label a text, or a number" in said
    said = refused(capsys, classifier, "--task", "regression", *out)
    assert "task 'regression': BertForSequenceClassification has 2 outputs; expected task 'classification'" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_text_without_masks_or_neighbours(bert: Path, tmp_path: Path, capsys: Any) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(60, seed=13)])
    books = write(
        tmp_path / "books.jsonl", [{"text": f"{t} .", "doc": i // 10} for i, t in enumerate(sentences(90, seed=14))]
    )
    config = tmp_path / "run.yaml"
    config.write_text("mask_rate: 0\nmethod: distilbert\n")
    said = refused(capsys, bert, "--data", texts, "--config", config, "--out", tmp_path / "out")
    assert "mask_rate 0 with losses.task, which learns masked words; expected above 0, such as 0.15" in said
    config.write_text("mask_rate: 0\nmethod: dynabert\n")
    said = refused(capsys, bert, "--data", texts, "--config", config, "--out", tmp_path / "y")
    assert "mask_rate 0 with method 'dynabert', which measures on masked words" in said
    recipe = dqbart.Recipe(bits="32-32-32", method="finetune", task="text", segments=2, **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(bert, books, dev_data=texts, recipe=recipe, output=tmp_path / "out")
    assert result.report["scores"]["examples"] == 60  # sentences by themselves, though trained on pairs
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method finetune, 3 layers" in card and "An ordinary checkpoint, in float." in card
    assert "library_name: transformers" in card and "quantized" not in card.split("## Size")[0]


def test_eval_says_what_a_folder_is_not_for(bert: Path, classifier: Path, labelled: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(60, seed=15)])
    recipe = dqbart.Recipe(bits="32-32-32", method="minilm2", layers="1", **FEW)  # type: ignore[arg-type]
    dqbart.compress(bert, texts, recipe=recipe, output=tmp_path / "general")
    with pytest.raises(
        ValueError, match="method 'minilm2' looks at inner layers alone, so there are no words to guess"
    ):
        evaluate(str(tmp_path / "general"), texts)
    unread = "generation {'num_beams': 4}: only tasks that write or answer would read it; leave it out"
    with pytest.raises(ValueError, match=re.escape(unread)):
        evaluate(str(classifier), labelled, generation={"num_beams": 4})
    with pytest.raises(ValueError, match="source_lang 'en_XX': only tasks that write would read it; leave it out"):
        evaluate(str(classifier), labelled, source_lang="en_XX")
    with pytest.raises(ValueError, match="task 'regression': .* was made for task 'classification'; leave --task out"):
        evaluate(str(classifier), labelled, task="regression")
    unlabelled = write(tmp_path / "plain.jsonl", [{"sentence": text} for text in sentences(9)])
    with pytest.raises(
        ValueError, match=r"data 'plain.jsonl': no target column to score against; give --target-column"
    ):
        evaluate(str(classifier), unlabelled)
    again = dqbart.Recipe(bits="8-8-8", epochs=0)  # type: ignore[arg-type]
    for name in ("one", "two"):
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        model.classifier.bias.data += len(name) + (name == "two")
        model.save_pretrained(tmp_path / name)
    dqbart.compress(classifier, student=tmp_path / "one", recipe=again, output=tmp_path / "out")
    with pytest.raises(FileExistsError, match="made with another student to begin with; choose another --out"):
        dqbart.compress(classifier, student=tmp_path / "two", recipe=again, output=tmp_path / "out")
