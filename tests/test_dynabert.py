"""DynaBERT from a teacher to a folder, and from that to sub-networks: rewired, interrupted, cut, scored, refused."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FEW, sentences, write
from safetensors.torch import load_file
from tiny_models import tiny_encoder
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertForSequenceClassification,
)

import dqbart
from dqbart.cli import main
from dqbart.data.blocks import encode_blocks
from dqbart.data.columns import hold_out
from dqbart.data.masking import BlockCollator, MaskedItems, Masker
from dqbart.distill.elastic import ElasticObjective
from dqbart.distill.encoder_objective import EncoderObjective
from dqbart.distill.trainer import DistillationTrainer, train, training_arguments
from dqbart.extraction import extract
from dqbart.fitting import resolve
from dqbart.packed.plain import is_plain, load_plain
from dqbart.pipeline import quantize
from dqbart.quant.attention import use_attention
from dqbart.quant.narrow import FIELD
from dqbart.student.depth import make_student
from dqbart.student.importance import importance
from dqbart.student.maps import kept_layers
from dqbart.student.width import subnetwork
from dqbart.tasks import open_task
from dqbart.tasks.elastic import MOST, importance_examples, mean_score, rewire_student
from dqbart.tasks.run import evaluate

SETTINGS: dict[str, Any] = FEW | dict(method="dynabert", max_steps=6, prediction_epochs=0.2, learning_rate=1e-3)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stages(folder: Path) -> list[str]:
    return [(folder.with_name(folder.name + ".training") / f"stage-{i}" / "metrics.jsonl").read_text() for i in (1, 2)]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def trained(classifier: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 2-2-8: packed, and the float network beside."""
    folder = tmp_path_factory.mktemp("dynabert") / "whole"
    dqbart.compress(classifier, labelled, recipe=dqbart.Recipe(bits="2-2-8", **SETTINGS), output=folder)
    return folder


@pytest.fixture(scope="module")
def rewired(classifier: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 32-32-32, without training: a plain checkpoint."""
    folder = tmp_path_factory.mktemp("dynabert") / "plain"
    recipe = dqbart.Recipe(bits="32-32-32", method="dynabert", epochs=0)
    dqbart.compress(classifier, labelled, recipe=recipe, output=folder)
    return folder


@pytest.fixture(scope="module")
def part(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dqbart.extract(trained, output=tmp_path_factory.mktemp("parts") / "part", width=0.5, depth=0.75).folder


# One run


def test_two_stages_and_twelve_sub_networks(trained: Path, classifier: Path, labelled: Path) -> None:
    found = report(trained)
    assert found["stages"] == 2 and "importance" in found["seconds"]
    assert found["recipe"]["widths"] == [0.25, 0.5, 0.75, 1.0] and found["recipe"]["depths"] == [0.5, 0.75, 1.0]
    rows = found["subnetworks"]
    assert {(r["width"], r["depth"]) for r in rows} == {(w, d) for w in (0.25, 0.5, 0.75, 1) for d in (0.5, 0.75, 1)}
    assert len(rows) == 12 and all(row["score"]["n"] == found["scores"]["examples"] for row in rows)
    assert rows[0]["score"]["values"] == found["scores"]["student"]["values"]  # the whole network, as packed
    assert (rows[-1]["heads"], rows[-1]["neurons"], rows[-1]["layers"]) == (1, 12, [0, 2])
    assert [r["parameters"] for r in rows[:4]] == sorted({r["parameters"] for r in rows[:4]}, reverse=True)
    card = (trained / "README.md").read_text()
    assert "## Sub-networks" in card and "at all widths, then 6 steps at all depths" in card
    assert not is_plain(trained) and (trained / "elastic").is_dir()
    log = [json.loads(line) for line in "".join(stages(trained)).splitlines()]
    assert all({"logits", "hidden"} <= row.keys() for row in log if "loss" in row)
    assert not list(trained.with_name("whole.training").rglob("checkpoint-*"))
    recipe = dqbart.Recipe.from_yaml(trained / "recipe.yaml")
    assert dqbart.compress(classifier, labelled, recipe=recipe, output=trained).report == found  # done already


def test_the_best_student_is_chosen_by_the_mean_of_all(classifier: Path, labelled: Path) -> None:
    """By the whole network alone, which begins as the teacher, the first students would always win."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    use_attention(model)
    recipe = dqbart.Recipe(bits="32-32-32", method="dynabert", widths=(0.25, 1), depths=(0.5, 1))
    recipe = resolve(recipe, model.config, "classification")
    task = open_task(recipe, AutoTokenizer.from_pretrained(classifier), model)
    dev = task.read_split(labelled, "train").select(range(60))
    found = mean_score(task, model, dev, recipe)
    each = [task.score(subnetwork(model, w, d), dev).score.value for w in (0.25, 1) for d in (0.5, 1)]
    assert found.value == pytest.approx(sum(each) / 4) and found.value < each[-1] == max(each)
    assert found.definition.startswith("mean over 4 sub-networks: accuracy")


# Rewiring


def test_rewiring_leaves_the_teachers_outputs(rewired: Path, classifier: Path) -> None:
    """Without training, the folder is the teacher in another order, by importance on the dev set."""
    assert is_plain(rewired) and not (rewired / "elastic").exists() and len(report(rewired)["subnetworks"]) == 12
    teacher, student = (AutoModelForSequenceClassification.from_pretrained(f) for f in (classifier, rewired))
    inputs = AutoTokenizer.from_pretrained(classifier)(sentences(20, seed=6), padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits, rtol=1e-4, atol=1e-5)
    moved = [m.bert.encoder.layer[0].intermediate.dense.bias for m in (student, teacher)]
    assert not torch.equal(*moved) and torch.equal(*(bias.sort().values for bias in moved))


def test_importance_is_measured_on_labels_of_the_dev_set(classifier: Path, labelled: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    recipe = resolve(dqbart.Recipe(method="dynabert"), model.config, "classification")
    task = open_task(recipe, AutoTokenizer.from_pretrained(classifier), model)
    train = task.read_split(labelled, "train")
    dev = train.select(range(7))
    unlabelled = dataclasses.replace(dev, labels=None)
    assert importance_examples(task, train, dev) is dev and importance_examples(task, None, dev) is dev
    assert importance_examples(task, train, unlabelled) is train
    large = train.select([i % 300 for i in range(3000)])
    assert MOST <= len(importance_examples(task, large, None)) < 3000
    with pytest.raises(ValueError, match="is measured on labels, and there are none"):
        importance_examples(task, unlabelled, unlabelled)


def test_importance_is_bounded_where_a_text_is_one_document(bert: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = AutoModelForMaskedLM.from_pretrained(bert)
    recipe = resolve(dqbart.Recipe(method="dynabert", max_source_length=10), model.config, "text")
    task = open_task(recipe, AutoTokenizer.from_pretrained(bert), model)
    (tmp_path / "book.txt").write_text("\n".join(sentences(50)))
    texts = task.read_split(tmp_path / "book.txt", "train")
    assert len(texts) == 1 and len(task.training_set(texts, model, tmp_path)[0]) > 20
    seen = []
    monkeypatch.setattr("dqbart.tasks.elastic.MOST", 20)
    watched = lambda model, batches, loss: seen.extend(batches) or importance(model, seen, loss)  # noqa: E731
    monkeypatch.setattr("dqbart.tasks.elastic.importance", watched)
    rewire_student(AutoModelForMaskedLM.from_pretrained(bert), model, task, texts, tmp_path)
    assert 10 <= sum(len(batch["input_ids"]) for batch in seen) <= 20


# Sub-networks


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_a_sub_network_is_extracted(kind: str, request: pytest.FixtureRequest, labelled: Path, tmp_path: Path) -> None:
    width, depth = (0.5, 0.75) if kind == "packed" else (0.25, 0.5)
    whole: Path = request.getfixturevalue("trained" if kind == "packed" else "rewired")
    if kind == "packed":
        folder = request.getfixturevalue("part")
    else:
        folder = dqbart.extract(whole, output=tmp_path / "part", width=width, depth=depth).folder
    (row,) = [row for row in report(whole)["subnetworks"] if (row["width"], row["depth"]) == (width, depth)]
    found = report(folder)
    assert found["subnetwork"] == row and found["scores"]["student"] == row["score"]
    assert found["sizes"]["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["sizes"]["file_bytes"] < report(whole)["sizes"]["file_bytes"]
    assert not (folder / "elastic").exists() and is_plain(folder) == (kind == "plain")
    model, kept = dqbart.load(folder), kept_layers(3, depth)
    assert model.config.num_hidden_layers == len(kept) and model.config.intermediate_size == 48 * width
    assert getattr(model.config, FIELD) == 4 * width and model.config.id2label == {0: "dog", 1: "other"}

    float_whole = load_plain(whole if kind == "plain" else whole / "elastic")
    use_attention(float_whole)
    cut = subnetwork(quantize(float_whole, dqbart.Recipe.from_yaml(whole / "recipe.yaml")), width, depth)
    inputs = AutoTokenizer.from_pretrained(folder)(sentences(8, seed=5), padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, cut(**inputs).logits, rtol=0, atol=1e-4)
    task = open_task(dqbart.Recipe.from_yaml(folder / "recipe.yaml"), AutoTokenizer.from_pretrained(folder), model)
    dev = hold_out(task.read_split(labelled, "train"), 30)[1]  # as the run held it out
    assert task.score(model, dev).score.to_dict() == row["score"]
    score, rows = evaluate(str(folder), labelled)
    assert score.n == 300 and rows[0]["output"] in ("dog", "other")
    card = (folder / "README.md").read_text()
    assert f", {len(kept)} layers, {4 * width:g} heads and {48 * width:g} neurons each" in card
    assert "## Sub-networks" not in card
    with pytest.raises(ValueError, match="part: a sub-network itself; give the folder that it was extracted from"):
        extract(folder, output=tmp_path / "twice", width=0.5)
    with pytest.raises(FileExistsError, match="part: exists and is not empty"):
        extract(whole, output=folder)


@pytest.mark.parametrize(
    ("whole", "why"),
    [("trained", "(widths (0.25, 0.5, 0.75, 1.0), depths (0.5, 0.75, 1.0))"), ("rewired", "(nothing of this")],
)
def test_a_width_that_was_not_trained(
    whole: str, why: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(whole)
    capsys.readouterr()
    assert main(["extract", str(folder), "--width", "0.6", "--out", str(tmp_path / "part")]) == 0
    said = capsys.readouterr()
    assert f"width 0.6, depth 1.0: not trained {why}" in said.err
    last = json.loads(said.out.splitlines()[-1])
    assert last["scores"] is None and last["subnetwork"]["heads"] == 2 and last["subnetwork"]["neurons"] == 29
    assert "scores" not in report(tmp_path / "part") and [f.name for f in tmp_path.iterdir()] == ["part"]


# Interrupted


class InterruptAt:
    """A stderr that sends this process Ctrl-C once it has been told these lines, one after the other."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.text = list(lines), ""

    def write(self, text: str) -> int:
        self.text += text
        if self.lines and text.startswith(self.lines[0]):
            self.lines.pop(0)
            if not self.lines:
                os.kill(os.getpid(), signal.SIGINT)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def interrupted(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], *lines: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", watch := InterruptAt(*lines))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not watch.lines


@pytest.mark.parametrize("dev", [True, False], ids=["dev", "no-dev"])
def test_interrupted_in_the_second_stage(
    dev: bool, classifier: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen copy of the first stage's result is the same after a resume, and so is all that follows."""
    data = labelled
    if not dev:  # too few for a dev set; importance is measured on the training data then
        rows = [json.loads(line) for line in labelled.read_text().splitlines()[:9]]
        data = write(tmp_path / "few.jsonl", rows)
    few = SETTINGS | dict(max_steps=5, batch_size=4, prediction_epochs=0.2 if dev else 3, label_epochs=0.1)
    recipe = dqbart.Recipe(bits="8-8-8", widths=(0.5, 1), depths=(0.5, 1), **few)

    def run(name: str) -> Any:
        return dqbart.compress(classifier, data, recipe=recipe, output=tmp_path / name, device="cpu")

    straight = run("a").report
    assert straight["stages"] == 3 and ("scores" in straight) == dev
    for step in (1, 4):  # twice: nothing may creep into a stage that is done
        interrupted(monkeypatch, lambda: run("b"), "stage 2 of 3", f"step {step}/")
        assert not (tmp_path / "b").exists()
    resumed = run("b").report
    assert same(tmp_path / "a", tmp_path / "b") and same(tmp_path / "a" / "elastic", tmp_path / "b" / "elastic")
    assert stages(tmp_path / "a") == stages(tmp_path / "b")
    assert resumed.get("subnetworks") == straight.get("subnetworks")


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_a_resumed_run_draws_the_same_masks(
    strategy: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ones in every epoch, wherever a run was interrupted, whatever sampler accelerate wraps."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    settings = FEW | dict(max_steps=12, batch_size=4, learning_rate=1e-3)
    recipe = dqbart.Recipe(bits="32-32-32", method="distilbert", task="text", **settings)  # type: ignore[arg-type]

    class Items(MaskedItems):
        drawn: list[tuple[int, int]] = []

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.drawn.append((int(self._epoch), index))
            return super().__getitem__(index)

    def run(name: str) -> dict[str, torch.Tensor]:
        teacher = load_plain(bert)
        student = make_student(teacher, dqbart.Layers("1"))
        for model in (teacher, student):
            use_attention(model)
        blocks = encode_blocks(tokenizer, [[text] for text in sentences(18, seed=3)], 16, progress=False)
        items = Items(blocks, Masker(tokenizer, 0.3, recipe.masking, blocks.counts_V), 28)
        arguments = training_arguments(recipe, tmp_path / name, len(items), "cpu")
        arguments.train_sampling_strategy = strategy
        trainer = DistillationTrainer(
            model=student, teacher=teacher, objective=EncoderObjective(recipe, [2], student, teacher), args=arguments,
            train_dataset=items, data_collator=BlockCollator(1),
        )  # fmt: skip
        train(trainer)
        return student.state_dict()

    straight = run("a")
    epochs = {epoch for epoch, _ in Items.drawn}
    assert epochs == {0, 1, 2} and len(Items.drawn) >= 12 * 4 - 9
    interrupted(monkeypatch, lambda: run("b"), "step 7/")
    resumed = run("b")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


# Other tasks, other families


def test_plain_text(bert: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", [{"text": text} for text in sentences(150, seed=3)])
    recipe = dqbart.Recipe(bits="32-32-32", **SETTINGS | dict(widths=[0.5, 1]))
    result = dqbart.compress(bert, data, recipe=recipe, output=tmp_path / "whole")
    assert result.report["recipe"]["task"] == "text" and len(result.report["subnetworks"]) == 6


def test_a_distilbert_and_token_types(bert: Path, labelled: Path, tmp_path: Path) -> None:
    """The tokenizer makes token types, and DistilBERT has none."""
    config = tiny_encoder("distilbert").config
    config.id2label, config.label2id = {0: "dog", 1: "other"}, {"dog": 0, "other": 1}
    recipe = dqbart.Recipe(bits="8-8-8", **SETTINGS | dict(widths=[0.5, 1.0], depths=[1]))
    result = dqbart.compress(
        DistilBertForSequenceClassification(config), labelled, tokenizer=AutoTokenizer.from_pretrained(bert),
        recipe=recipe, output=tmp_path / "whole",
    )  # fmt: skip
    assert result.report["stages"] == 1 and len(result.report["subnetworks"]) == 2
    assert "at all widths, batch 8" in (tmp_path / "whole" / "README.md").read_text()


# What doesn't fit


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dqbart: error: ")
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers=2), "layers 2: method 'dynabert' trains all of its teacher, and parts are cut from that"),
        (dict(layer_map=[2, 1, 0]), r"layer_map [2, 1, 0]: method 'dynabert' trains all"),
        (dict(hidden_size=16), "hidden_size 16: method 'dynabert' trains all"),
        (dict(family="distilbert"), "family distilbert: method 'dynabert' trains all"),
        (dict(widths=[0.1, 1]), "width 0.1 of 4 heads and 48 neurons: expected 1/4 to 1, to leave one of each"),
        (dict(depths=[0.1, 1]), "depth 0.1 of 3 layers: expected above 0 to 1, and to leave a layer"),
        (dict(widths=[0.25, 0.5]), "widths [0.25, 0.5]: expected a list of shares above 0 to 1, each once; 1, the"),
        (dict(widths=[]), "widths []: expected a list"),
        (dict(depths=[1, 1.0]), "depths [1, 1.0]: expected a list"),
        (dict(depths=0.5), "depths 0.5: expected a list"),
        (dict(depths=[1, True]), "depths [1, True]: expected a list"),
        (dict(depths=[1, 2]), "depths [1, 2]: expected a list"),
        (dict(widths=[1, "half"]), "widths 'half': expected a number"),
        (dict(losses={"scores": 1}), "losses.scores: method 'dynabert' has task, logits, hidden"),
        (dict(temperature=2), "temperature 2: method 'dynabert' has 1 alone; leave it out"),
        (dict(logits_loss="mse"), "logits_loss 'mse': method 'dynabert' has 'kl' alone"),
        (
            dict(method="finetune", label_epochs=1),
            "label_epochs 1: only method 'dynabert' would read it; leave it out",
        ),
        (
            dict(method="finetune", widths=[1]),
            "widths (1.0,): only method 'dynabert' would read it; leave it out",
        ),
        (dict(label_epochs=-1), "label_epochs -1: expected at least 0"),
        (dict(task="sentences"), "task 'sentences' with method 'dynabert': it compares what heads say; expected one"),
        (dict(task="s2s"), "expected one of classification, regression, questions, text"),
    ],
    ids=str,
)
def test_unsuitable_recipes(
    changes: dict[str, Any], message: str, classifier: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(dict(method="dynabert") | changes))
    said = refused(capsys, "compress", classifier, "--data", labelled, "--config", file, "--out", tmp_path / "out")
    assert message in said and [f.name for f in tmp_path.iterdir()] == ["run.yaml"]


def test_unsuitable_models_and_data(
    classifier: Path, labelled: Path, trained: Path, teacher_folder: Path, pairs_file: Path, bert: Path, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    method = ("--method", "dynabert", "--out", tmp_path / "out")
    said = refused(capsys, "compress", teacher_folder, "--data", pairs_file, *method)
    assert "method 'dynabert' is for encoders, and a bart model has a decoder" in said
    said = refused(capsys, "compress", classifier, "--data", labelled, "--student", classifier, *method)
    assert "student bert: method 'dynabert' trains all of its teacher" in said
    albert = tmp_path / "albert"
    tiny_encoder("albert").save_pretrained(albert)
    AutoTokenizer.from_pretrained(bert).save_pretrained(albert)
    texts = write(tmp_path / "texts.jsonl", [{"sentence": text} for text in sentences(40)])
    said = refused(capsys, "compress", albert, "--data", texts, *method)
    assert "architecture 'albert': width is elastic for bert, roberta, xlm-roberta, distilbert" in said
    said = refused(capsys, "compress", classifier, "--data", texts, *method)
    assert "method 'dynabert': the importance of heads and neurons is measured on labels, and there are none" in said
    said = refused(capsys, "compress", classifier, "--epochs", "0", *method)
    assert "importance of heads and neurons is measured on labels" in said
    said = refused(capsys, "extract", classifier, "--out", tmp_path / "out")
    assert "made by method 'finetune', of which no part works alone; expected what 'dqbart compress --method" in said
    said = refused(capsys, "extract", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "nowhere: no such folder; expected what 'dqbart compress --method dynabert' left" in said
    said = refused(capsys, "extract", trained, "--width", "0.1", "--out", tmp_path / "out")
    assert "width 0.1 of 4 heads and 48 neurons: expected 1/4 to 1" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_a_sub_network_is_no_teacher_and_no_place_for_a_run(
    part: Path, trained: Path, classifier: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    plain = tmp_path / "plain"
    subnetwork(AutoModelForSequenceClassification.from_pretrained(classifier), 0.5).save_pretrained(plain)
    for role in ([part], [plain], [classifier, "--student", plain]):
        said = refused(capsys, "compress", *role, "--data", labelled, "--out", tmp_path / "out")
        assert "a sub-network, 2 of 4 heads; give the whole network, or make that with other --bits" in said
    whole = dqbart.Recipe.from_yaml(trained / "recipe.yaml")
    with pytest.raises(FileExistsError, match="part: a sub-network that was extracted from another folder; choose"):
        dqbart.compress(classifier, labelled, recipe=whole, output=part)


def test_labels_alone_need_labels(classifier: Path, labelled: Path, tmp_path: Path) -> None:
    """Said at the start, not after two stages; importance has its labels from the dev set."""
    texts = write(tmp_path / "texts.jsonl", [{"sentence": text} for text in sentences(40)])
    recipe = dqbart.Recipe(bits="8-8-8", **SETTINGS | dict(label_epochs=1))
    with pytest.raises(ValueError, match="no labels, which losses.task needs; give --target-column"):
        dqbart.compress(classifier, texts, dev_data=labelled, recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


def test_a_folder_without_its_float_network(trained: Path, tmp_path: Path) -> None:
    (trained / "elastic").rename(tmp_path / "elastic")
    try:
        with pytest.raises(FileNotFoundError, match="elastic: no such folder; sub-networks are cut from the float"):
            extract(trained, output=tmp_path / "part")
        assert dqbart.load(trained).config.num_hidden_layers == 3  # runs without
    finally:
        (tmp_path / "elastic").rename(trained / "elastic")


def test_an_objective_of_a_recipe(classifier: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    recipe = resolve(dqbart.Recipe(bits="32-32-32", method="dynabert", label_epochs=1), model.config, "classification")
    assert recipe.learning_rate == pytest.approx(2e-5 * (768 / 32) ** 0.5, rel=0.05)
    found = [ElasticObjective.of(stage, model, model).stage for stage in recipe.stages()]
    assert [stage.weights for stage in found] == [{"logits": 1, "hidden": 0.1}, {"logits": 1, "hidden": 1}, {"task": 1}]
    assert [stage.depths for stage in found] == [(1.0,), (0.5, 0.75, 1.0), (0.5, 0.75, 1.0)]
    assert [stage.same_width for stage in found[:2]] == [False, True]
