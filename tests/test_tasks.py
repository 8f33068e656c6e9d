"""Every task from a data file to a packed folder and back, on small encoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FEW, bert_tokenizer, sentences, write
from tiny_models import tiny_encoder
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

import dqbart
from dqbart.cli import main
from dqbart.data.columns import hold_out
from dqbart.data.files import load_rows
from dqbart.data.labelled import guess_label_columns, read_labelled
from dqbart.packed.plain import is_plain
from dqbart.packed.sentence import Pooling, write_pooling
from dqbart.tasks import open_task
from dqbart.tasks.run import evaluate
from dqbart.teacher import load_teacher


def test_finetuning_leaves_a_plain_checkpoint_that_knows_its_classes(classifier: Path, labelled: Path) -> None:
    assert is_plain(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)  # transformers alone
    assert model.config.id2label == {0: "dog", 1: "other"}
    assert json.loads((classifier / "report.json").read_text())["scores"]["student"]["values"]["accuracy"] > 80
    assert type(dqbart.load(classifier)) is type(model)
    with pytest.raises(ValueError, match=r"engine 'cpu': .* is a float model \(bits 32-32-32\); expected 'auto'"):
        dqbart.load(classifier, engine="cpu")
    score, rows = evaluate(str(classifier), labelled)
    assert score.values["accuracy"] > 80 and {row["output"] for row in rows} <= {"dog", "other"}
    assert rows[0].keys() == {"source", "reference", "output"}


@pytest.mark.parametrize("method", ["dq", "prediction", "tinybert", "minilm", "minilm2", "ternarybert"])
def test_a_classifier_is_distilled_by_every_method(
    method: str, classifier: Path, labelled: Path, tmp_path: Path
) -> None:
    layers = "3" if method == "ternarybert" else "1"
    settings: dict[str, Any] = FEW | ({"prediction_epochs": 0.1} if method == "tinybert" else {})
    recipe = dqbart.Recipe(bits="2-2-8", layers=layers, method=method, **settings)
    result = dqbart.compress(classifier, labelled, recipe=recipe, output=tmp_path / "small")
    report = result.report
    assert report["recipe"]["task"] == "classification" and report["gate"]["max_logit_difference"] <= 1e-4
    assert report["gate"]["greedy_ids_equal"] is None and {"teacher", "student"} <= report["scores"].keys()
    assert report["scores"]["outputs"][0].keys() == {"source", "reference", "teacher", "student"}
    assert (tmp_path / "small.training" / "stage-2" / "metrics.jsonl").exists() == (method == "tinybert")
    model = result.load()
    assert model.config.id2label == {0: "dog", 1: "other"} and model.config.num_hidden_layers == int(layers)
    assert not any("distill" in name for name in model.state_dict())
    score, _ = evaluate(str(tmp_path / "small"), labelled)
    assert score.n == 300


def test_a_narrow_student_general_then_task(bert: Path, classifier: Path, labelled: Path, tmp_path: Path) -> None:
    """MiniLM's way: plain text first, then the student is what the next run starts from; one more for its teacher."""
    texts = write(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(60, seed=2)])
    shape = dict(layers="2", hidden_size=16, heads=4, intermediate_size=24)
    general = dqbart.Recipe(bits="32-32-32", method="minilm", **shape, **FEW)  # type: ignore[arg-type]
    first = dqbart.compress(bert, texts, recipe=general, output=tmp_path / "general")
    assert first.report["recipe"]["task"] == "text" and "scores" not in first.report
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "general")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (16, 2)

    task = dqbart.Recipe(bits="8-8-8", method="tinybert", layer_map="top", **FEW)  # type: ignore[arg-type]
    second = dqbart.compress(
        classifier, labelled, student=tmp_path / "general", recipe=task, output=tmp_path / "task", device="cpu"
    )
    assert second.load().config.hidden_size == 16 and second.report["layer_maps"] == {"num_hidden_layers": [1, 2]}
    assert "Begun as a student of an earlier run" in (tmp_path / "task" / "README.md").read_text()
    other = dqbart.Recipe(bits="8-8-8", layers="1", **FEW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers 1: the student that is given has 2 and a shape; leave these out"):
        dqbart.compress(classifier, labelled, student=tmp_path / "general", recipe=other, output=tmp_path / "no")


def test_heads_stay_in_float_unless_asked(classifier: Path, labelled: Path, tmp_path: Path) -> None:
    found = {}
    for heads in (False, True):
        recipe = dqbart.Recipe(bits="8-8-8", epochs=0, quantize_heads=heads)  # type: ignore[arg-type]
        result = dqbart.compress(classifier, dev_data=labelled, recipe=recipe, output=tmp_path / str(heads))
        model = result.load(engine="torch")
        found[heads] = {n for n, m in model.named_modules() if type(m).__name__ == "PackedLinear"}
        assert result.report["scores"]["student"]["values"]["accuracy"] > 80
    assert found[True] - found[False] == {"bert.pooler.dense", "classifier"} and len(found[False]) == 18


@pytest.mark.parametrize(
    "shape", [dict(family="albert", embedding_size=16, sharing="attention"), dict(family="distilbert")], ids=str
)
def test_students_of_another_family(shape: dict[str, Any], classifier: Path, labelled: Path, tmp_path: Path) -> None:
    recipe = dqbart.Recipe(bits="2-2-8", layers="2", losses={"hidden": 1}, **shape, **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(classifier, labelled, recipe=recipe, output=tmp_path / "small")
    model = result.load()
    assert model.config.model_type == shape["family"] and model.config.id2label == {0: "dog", 1: "other"}
    inputs = AutoTokenizer.from_pretrained(tmp_path / "small")("the dog", "a cat", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2)  # without token types for DistilBERT
    assert evaluate(str(tmp_path / "small"), labelled)[0].n == 300
    plain = dqbart.Recipe(bits="32-32-32", epochs=0, layers="2", **shape)  # type: ignore[arg-type]
    first = dqbart.compress(classifier, recipe=plain, output=tmp_path / "plain").load()
    again = dqbart.compress(tmp_path / "plain", recipe=dqbart.Recipe(epochs=0), output=tmp_path / "again")
    assert first.num_parameters() == AutoModelForSequenceClassification.from_config(first.config).num_parameters() or (
        shape["family"] == "albert"  # transformers knows nothing of shared attention
    )
    assert again.load().config.model_type == shape["family"]


@pytest.mark.parametrize("task", ["classification", "sentences"])
def test_a_prefix_is_before_every_input(task: str, classifier: Path, labelled: Path, capsys: Any) -> None:
    model, tokenizer, _ = load_teacher(classifier, None, "cpu", task)
    work = open_task(dqbart.Recipe(task=task, source_prefix="query: "), tokenizer, model, classifier)
    found = work.read_split(labelled, "train")
    assert len(found) and all(text.startswith("query: ") for text in found.texts)


@pytest.mark.parametrize("method", ["distilbert", "tinybert", "dq", "albert's"])
def test_plain_text(method: str, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": text + " .", "doc": i // 10} for i, text in enumerate(sentences(200, seed=3))]
    own: dict[str, Any] = {"tinybert": dict(segments=2)}.get(method, {})
    if method == "albert's":  # masked words of n-grams and the order of sentences, as a student of a BERT
        losses = dict(task=1, order=1)
        method, own = "finetune", dict(family="albert", embedding_size=16, segments=2, losses=losses, masking="ngram")
    recipe = dqbart.Recipe(bits="8-8-8", layers="1", method=method, **own, **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(bert, write(tmp_path / "text.jsonl", rows), recipe=recipe, output=tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out.training" / "metrics.jsonl").read_text().splitlines()]
    assert set(recipe.terms) <= log[0].keys()
    assert not any("distill" in name for name in result.load().state_dict())
    if method == "tinybert":  # looks at inner layers alone: nothing to choose by
        assert "scores" not in result.report
    else:
        assert list(result.report["scores"]["student"]["values"]) == ["accuracy"]
    assert torch.isfinite(result.load()(input_ids=torch.tensor([[0, 5, 2]])).logits).all()


def test_numbers(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"sentence1": a, "sentence2": b, "score": len(set(a.split()) & set(b.split())) + 0.5}
        for a, b in zip(sentences(90, seed=4), sentences(90, seed=5), strict=True)
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    base = dict(task="regression", **FEW)
    teacher = dqbart.compress(
        bert, data, recipe=dqbart.Recipe(bits="32-32-32", method="finetune", **base), output=tmp_path / "teacher"
    )  # type: ignore[arg-type]
    assert teacher.load().config.num_labels == 1 and teacher.report["scores"]["student"]["metric"] == "spearman"
    recipe = dqbart.Recipe(bits="2-2-8", layers="1", method="tinybert", prediction_epochs=0.2, **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(tmp_path / "teacher", data, recipe=recipe, output=tmp_path / "small")
    assert result.report["recipe"]["task"] == "regression"  # one label: a number
    log = (tmp_path / "small.training" / "stage-2" / "metrics.jsonl").read_text()
    assert '"task":' in log and '"logits":' not in log  # TinyBERT's second stage learns from labels here


def test_questions(bert: Path, tmp_path: Path) -> None:
    rows = []
    for i, text in enumerate(sentences(60, seed=6)):
        words = text.split()
        start = text.index(words[1]) if words[1] != words[0] else 0
        answers = {"text": [words[1]], "answer_start": [start]} if i % 5 else {"text": [], "answer_start": []}
        rows.append({"id": str(i), "question": words[0], "context": text, "answers": answers})
    data = write(tmp_path / "squad.jsonl", rows)
    base = dict(task="questions", **FEW)
    finetune = dqbart.Recipe(bits="32-32-32", method="finetune", **base)  # type: ignore[arg-type]
    teacher = dqbart.compress(bert, data, recipe=finetune, output=tmp_path / "teacher")
    assert list(teacher.report["scores"]["student"]["values"])[:2] == ["f1", "exact"]
    recipe = dqbart.Recipe(bits="2-2-8", layers="2", **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(tmp_path / "teacher", data, recipe=recipe, output=tmp_path / "small")
    assert (
        result.report["recipe"]["task"] == "questions"
        and "question-answering" in (tmp_path / "small" / "README.md").read_text()
    )
    score, rows_out = evaluate(str(tmp_path / "small"), data)
    assert score.n == 60 and all(row["output"] in row["source"] for row in rows_out)
    best = score.generation["best_f1_null_threshold"]
    assert score.generation["null_threshold"] == 0 and score.values["best_f1"] >= score.values["f1"]
    found, rows_out = evaluate(str(tmp_path / "small"), data, generation={"null_threshold": best})
    assert found.values["f1"] == pytest.approx(score.values["best_f1"]) and found.generation["null_threshold"] == best
    _, rows_out = evaluate(str(tmp_path / "small"), data, generation={"null_threshold": -1000})
    assert {row["output"] for row in rows_out} == {""}
    _, rows_out = evaluate(str(tmp_path / "small"), data, generation={"null_threshold": 1000})
    assert "" not in {row["output"] for row in rows_out}
    with pytest.raises(ValueError, match="generation 'num_beams': 4: questions have 'null_threshold' alone"):
        evaluate(str(tmp_path / "small"), data, generation={"num_beams": 4})
    always = [row for row in rows if row["answers"]["text"]]  # type: ignore[index]
    score, _ = evaluate(str(tmp_path / "small"), write(tmp_path / "always.jsonl", always))
    assert set(score.values) == {"f1", "exact"} and not score.generation


def test_sentence_embeddings(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    tiny_encoder("bert").bert.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    write_pooling(folder, Pooling(mode="mean", normalize=True, max_seq_length=16))
    pairs = [
        {"sentence1": a, "sentence2": b, "score": i % 6}
        for i, (a, b) in enumerate(zip(sentences(30, seed=7), sentences(30, seed=8), strict=True))
    ]
    texts = write(tmp_path / "texts.jsonl", [{"sentence": text} for text in sentences(80, seed=9)])
    recipe = dqbart.Recipe(bits="4-4-8", layers="2", method="sentence", **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(
        folder, texts, dev_data=write(tmp_path / "dev.jsonl", pairs), recipe=recipe, output=tmp_path / "small"
    )
    assert result.report["recipe"]["task"] == "sentences" and "spearman" in result.report["scores"]["teacher"]["values"]
    encoder = dqbart.load(tmp_path / "small")
    vectors = encoder.encode(["the cat", "a dog sees the red house"])
    assert vectors.shape == (2, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    code = (tmp_path / "small" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "model.encode" in code


def test_writing_with_an_encoder(bert: Path, classifier: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"source": text, "target": " ".join(text.split()[:2])} for text in sentences(80, seed=10)]
    data = write(tmp_path / "pairs.jsonl", rows)
    made = dqbart.Recipe(bits="32-32-32", method="finetune", task="s2s", max_target_length=6, **FEW)  # type: ignore[arg-type]
    dqbart.compress(bert, data, recipe=made, output=tmp_path / "teacher")
    recipe = dqbart.Recipe(bits="8-8-8", layers="2", max_target_length=6, **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(tmp_path / "teacher", data, recipe=recipe, output=tmp_path / "small")
    assert result.report["recipe"]["task"] == "s2s"  # as the teacher's run
    assert evaluate(str(tmp_path / "teacher"), data, limit=5)[0].n >= 5
    with pytest.raises(ValueError, match="nothing says that it can write; fine-tune it first, with --task s2s --meth"):
        again = dqbart.Recipe(task="s2s", max_target_length=6, **FEW)  # type: ignore[arg-type]
        dqbart.compress(bert, data, recipe=again, output=tmp_path / "no")
    roberta = dqbart.Recipe(task="s2s", family="albert", method="finetune", max_target_length=6, **FEW)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with pytest.raises(
        ValueError, match=r"begin at 2 in the teacher \(roberta\), at 0 in the student \(albert\); expected"
    ):
        dqbart.compress(tiny_encoder("roberta"), data, tokenizer=tokenizer, recipe=roberta, output=tmp_path / "no")
    assert "rougeL" in result.report["scores"]["student"]["values"]
    assert len(result.report["scores"]["outputs"]) == 8
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "small"), "--text", "the cat", "--generation", '{"num_beams": 2}']) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]) == 1
    assert main(["generate", str(classifier), "--text", "the cat"]) == 2
    assert "task 'classification' writes no texts; score the model with 'dqbart eval'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="losses.hidden: task 's2s' compares outputs alone"):
        other = dqbart.Recipe(task="s2s", losses={"hidden": 1}, max_target_length=6, **FEW)  # type: ignore[arg-type]
        dqbart.compress(bert, data, recipe=other, output=tmp_path / "no")


def test_a_model_of_few_positions_passes_the_gate_on_long_texts(tmp_path: Path) -> None:
    config = tiny_encoder("bert").config
    config.max_position_embeddings = 24
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    rows = [{"text": " ".join(sentences(12, seed=seed))} for seed in range(20)]
    recipe = dqbart.Recipe(bits="32-32-32", method="finetune", task="text", **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(tmp_path / "bert", write(tmp_path / "t.jsonl", rows), recipe=recipe, output=tmp_path / "o")
    assert result.report["recipe"]["max_source_length"] == 24


def test_unlabelled_texts_need_no_labels_where_nothing_is_trained(classifier: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"sentence": text} for text in sentences(30)])
    result = dqbart.compress(classifier, texts, recipe=dqbart.Recipe(bits="8-8-8", epochs=0), output=tmp_path / "out")
    assert "scores" not in result.report


def test_class_names_that_are_numbers(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "numbers")
    (tmp_path / "numbers" / "recipe.yaml").unlink()
    config = json.loads((classifier / "config.json").read_text())
    config |= {"id2label": {"0": 0, "1": 5}, "label2id": {"0": 0, "5": 1}}
    (tmp_path / "numbers" / "config.json").write_text(json.dumps(config))
    rows = [{"sentence": text, "label": [0, 5]["dog" in text]} for text in sentences(40)]
    assert evaluate(str(tmp_path / "numbers"), write(tmp_path / "d.jsonl", rows))[0].n == 40


def test_a_student_of_fewer_positions_reads_shorter_texts(classifier: Path, labelled: Path, tmp_path: Path) -> None:
    config = tiny_encoder("bert").config
    config.max_position_embeddings = 12
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "short")
    recipe = dqbart.Recipe(bits="8-8-8", method="prediction", **FEW)  # type: ignore[arg-type]
    rows = [{"sentence": " ".join(sentences(3, seed=i)), "label": ["dog", "other"][i % 2]} for i in range(30)]
    result = dqbart.compress(
        classifier,
        write(tmp_path / "long.jsonl", rows),
        recipe=recipe,
        student=tmp_path / "short",
        output=tmp_path / "o",
    )
    assert result.report["recipe"]["max_source_length"] == 12


def test_eval_keeps_a_folder_s_own_settings(bert: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"source": text, "target": " ".join(text.split()[:2])} for text in sentences(40, seed=10)]
    data = write(tmp_path / "pairs.jsonl", rows)
    recipe = dqbart.Recipe(
        bits="32-32-32", method="finetune", task="s2s", max_target_length=6,
        generation={"num_beams": 3, "min_new_tokens": 2}, **FEW,  # type: ignore[arg-type]
    )  # fmt: skip
    dqbart.compress(bert, data, recipe=recipe, output=tmp_path / "small")
    for given, beams in (("{}", 3), ('{"num_beams": 2}', 2)):
        capsys.readouterr()
        words = ["eval", str(tmp_path / "small"), "--data", str(data), "--limit", "4", "--generation", given]
        assert main([*words, "--out", str(tmp_path / "new" / "folder" / "rows.jsonl")]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["generation"]
        assert (found["num_beams"], found["min_new_tokens"]) == (beams, 2)
    assert len((tmp_path / "new" / "folder" / "rows.jsonl").read_text().splitlines()) == 4


def test_classes_of_pairs_are_no_similarities(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    tiny_encoder("bert").bert.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    write_pooling(folder, Pooling())
    pairs = list(zip(sentences(30, seed=7), sentences(30, seed=8), strict=True))
    for labels, scored in ((["entailment", "neutral"], False), ([0, 2], False), ([0.5, 2], True)):
        rows = [{"premise": a, "hypothesis": b, "label": labels[i % 2]} for i, (a, b) in enumerate(pairs)]
        data = write(tmp_path / "pairs.jsonl", rows)
        recipe = dqbart.Recipe(bits="8-8-8", epochs=0, method="sentence")
        result = dqbart.compress(folder, data, recipe=recipe, output=tmp_path / "small", overwrite=True)
        assert ("scores" in result.report) == scored
    asked = dqbart.Recipe(bits="8-8-8", epochs=0, method="sentence", target_column="label")
    with pytest.raises(ValueError, match="row 1: column 'label' holds 'entailment', expected a finite number"):
        named = write(
            tmp_path / "named.jsonl", [{"premise": a, "hypothesis": b, "label": "entailment"} for a, b in pairs]
        )
        dqbart.compress(folder, named, recipe=asked, output=tmp_path / "small", overwrite=True)


def test_home_is_found_without_a_shell(classifier: Path, labelled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(classifier, tmp_path / "teacher")
    shutil.copy(labelled, tmp_path / "l.jsonl")
    result = dqbart.compress("~/teacher", "~/l.jsonl", recipe=dqbart.Recipe(bits="8-8-8", epochs=0), output="~/small")
    assert (tmp_path / "small" / "config.json").is_file() and not (tmp_path / "~").exists()
    assert result.report["data"]["name"] == "l.jsonl" and not result.report["data"]["on_hub"]


def test_augmentation_is_a_file_that_compress_reads(bert: Path, classifier: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"sentence": text, "label": i % 2, "n": i} for i, text in enumerate(sentences(6, seed=11))]
    data = write(tmp_path / "few.jsonl", rows)
    out = tmp_path / "more.jsonl"
    assert main(["augment", str(bert), "--data", str(data), "--out", str(out), "--variants", "3"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) < len(found) <= 4 * len(rows) and json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 6
    for row in found:
        assert (row["label"], row["n"]) == (rows[row["n"]]["label"], rows[row["n"]]["n"])  # all else is copied
    assert [row for row in found if row["sentence"] == rows[row["n"]]["sentence"]] == rows
    assert main(["augment", str(bert), "--data", str(data), "--out", str(out)]) == 2
    assert "more.jsonl: exists already" in capsys.readouterr().err
    assert main(["augment", str(classifier), "--data", str(data), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "BertForSequenceClassification has no head for masked words; expected a fill" in capsys.readouterr().err
    assert load_rows(out) == found


def test_unlabelled_texts_teach_predictions(classifier: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "plain.jsonl", [{"sentence": text} for text in sentences(40)])
    recipe = dqbart.Recipe(bits="8-8-8", method="prediction", **FEW)  # type: ignore[arg-type]
    result = dqbart.compress(classifier, data, recipe=recipe, output=tmp_path / "out")
    assert "scores" not in result.report and len(load_rows(data)) == result.report["data"]["train"]


def test_a_student_with_a_head_of_its_own_says_what_the_teacher_says(
    classifier: Path, labelled: Path, tmp_path: Path
) -> None:
    """Its classes in another order, or without names: the packed folder names them as the data does."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0)  # type: ignore[arg-type]
    for name, swap in (("swapped", True), ("unnamed", False)):
        names = {0: "other", 1: "dog"} if swap else {0: "LABEL_0", 1: "LABEL_1"}
        model.config.id2label, model.config.label2id = names, {text: i for i, text in names.items()}
        if swap:
            for tensor in (model.classifier.weight, model.classifier.bias):
                tensor.data = tensor.data.flip(0)
        model.save_pretrained(tmp_path / name)
        if swap:
            for tensor in (model.classifier.weight, model.classifier.bias):
                tensor.data = tensor.data.flip(0)
        result = dqbart.compress(
            classifier, dev_data=labelled, student=tmp_path / name, recipe=recipe, output=tmp_path / f"{name}-small"
        )
        assert result.report["scores"]["student"]["values"]["accuracy"] > 80
        assert result.load().config.id2label == {0: "dog", 1: "other"}
        assert evaluate(str(tmp_path / f"{name}-small"), labelled)[0].value > 80


@pytest.mark.parametrize("sharing", ["all", "attention"])
def test_a_new_head_leaves_the_sharing(sharing: str, bert: Path, labelled: Path, tmp_path: Path) -> None:
    """An ALBERT student made on plain text is still one once it has been fine-tuned."""
    shape: dict[str, Any] = dict(family="albert", sharing=sharing, embedding_size=16, layers="3")
    dqbart.compress(bert, recipe=dqbart.Recipe(bits="32-32-32", epochs=0, **shape), output=tmp_path / "general")  # type: ignore[arg-type]
    recipe = dqbart.Recipe(bits="8-8-8", method="finetune", task="classification", **FEW)  # type: ignore[arg-type]
    model = dqbart.compress(tmp_path / "general", labelled, recipe=recipe, output=tmp_path / "tuned").load(
        engine="torch"
    )
    assert model.config.dqbart_sharing == sharing
    groups = model.albert.encoder.albert_layer_groups
    assert len(groups) == 1 or groups[0].albert_layers[0].attention is groups[2].albert_layers[0].attention


def test_the_dev_subset_is_no_beginning_of_a_file(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that is sorted by class the first rows are all of one."""
    from dqbart.tasks import labels

    rows = [{"sentence": text, "label": "ab"[i >= 100]} for i, text in enumerate(sentences(200, seed=12))]
    seen: list[set[int]] = []
    score = labels.Labels.score

    def watched(self: Any, model: Any, examples: Any, **more: Any) -> Any:
        if len(examples) <= 40:
            seen.append(set(examples.labels))
        return score(self, model, examples, **more)

    monkeypatch.setattr(labels.Labels, "score", watched)
    dev = write(tmp_path / "dev.jsonl", rows)
    settings = FEW | dict(dev_subset=20)
    recipe = dqbart.Recipe(bits="32-32-32", method="finetune", task="classification", **settings)  # type: ignore[arg-type]
    dqbart.compress(bert, dev, dev_data=dev, recipe=recipe, output=tmp_path / "out", device="cpu")
    assert seen and all(labels == {0, 1} for labels in seen)


def test_lines_of_text_are_augmented(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("the cat sees a dog\n\nthe old house\n")
    assert main(["augment", str(bert), "--data", str(file), "--out", str(tmp_path / "more.jsonl")]) == 0
    found = [json.loads(line)["text"] for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert {"the cat sees a dog", "the old house"} < set(found)
    rows = load_rows(tmp_path / "more.jsonl")
    assert {row.get("variant_of") for row in rows} == {"the cat sees a dog", "the old house", None} and len(rows) > 4
    labelled = read_labelled(rows, guess_label_columns(rows))  # the only text is still the text
    train, dev = hold_out(labelled, len(rows) // 2)
    assert not {*train.sources} & {*dev.sources} and len(train) + len(dev) == len(rows)
