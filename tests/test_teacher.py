"""What comes in: which class a checkpoint becomes, and what is refused before anything is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import bert_tokenizer, word_tokenizer
from tiny_models import tiny, tiny_encoder, tiny_seq2seq

import dqbart
from dqbart.recipe import Recipe
from dqbart.teacher import load_student, load_teacher


def saved(kind: str, cls: str, folder: Path, **config: Any) -> Path:
    """A tiny model of any class, with the tokenizer of its family."""
    model = getattr(transformers, cls)(tiny(kind).config)
    model.config.update(config)
    model.save_pretrained(folder)
    (word_tokenizer() if kind in ("bart", "mbart") else bert_tokenizer()).save_pretrained(folder)
    return folder


def edit(folder: Path, file: str, **changes: Any) -> Path:
    """Values of a JSON file changed, or taken out if None."""
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    "kind, cls, task, becomes",
    [
        ("bart", "BartModel", "seq2seq", "BartForConditionalGeneration"),  # facebook/bart-base is one
        ("bert", "BertModel", "text", "BertModel"),
        ("bert", "BertForPreTraining", "text", "BertForMaskedLM"),
        ("xlm-roberta", "XLMRobertaForMaskedLM", "text", "XLMRobertaForMaskedLM"),
        ("albert", "AlbertForQuestionAnswering", "questions", "AlbertForQuestionAnswering"),
        ("distilbert", "DistilBertForSequenceClassification", "classification", "DistilBertForSequenceClassification"),
    ],
)
def test_a_class_says_what_it_is_for(kind: str, cls: str, task: str, becomes: str, tmp_path: Path) -> None:
    model, _, found = load_teacher(saved(kind, cls, tmp_path), None, "cpu")
    assert (found, type(model).__name__) == (task, becomes)


@pytest.mark.parametrize("task", [None, "seq2seq", "classification"])
@pytest.mark.parametrize(
    "kind, cls",
    [
        ("bart", "BartForSequenceClassification"), ("mbart", "MBartForQuestionAnswering"), ("bart", "BartForCausalLM"),
    ],
)  # fmt: skip
def test_an_encoder_decoder_that_writes_nothing_is_refused(kind: str, cls: str, task: Any, tmp_path: Path) -> None:
    folder = saved(kind, cls, tmp_path)
    with pytest.raises(ValueError, match=f"head of {cls} would be lost; expected one of .*ForConditionalGeneration, "):
        load_teacher(folder, None, "cpu", task)
    with pytest.raises(ValueError, match=f"student .*head of {cls} would be lost"):
        load_student(folder, tiny_seq2seq(), Recipe(), "seq2seq")


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMultipleChoice", "ForNextSentencePrediction"])
def test_a_head_of_no_task_is_lost_only_if_asked(head: str, tmp_path: Path) -> None:
    folder = saved("bert", f"Bert{head}", tmp_path)
    with pytest.raises(ValueError, match=f"head of Bert{head} would be lost; .*BertForMaskedLM.*--task text goes on"):
        load_teacher(folder, None, "cpu")
    for task, becomes in (("text", "BertModel"), ("sentences", "BertModel"), ("questions", "BertForQuestionAnswering")):
        assert type(load_teacher(folder, None, "cpu", task)[0]).__name__ == becomes


def test_a_language_model_of_one_direction_is_no_masked_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head of BertLMHeadModel would be lost"):
        load_teacher(saved("bert", "BertLMHeadModel", tmp_path), None, "cpu")


@pytest.mark.parametrize(
    "kind, head, key",
    [
        ("bert", "BertForSequenceClassification", "classifier.bias"),
        ("roberta", "RobertaForQuestionAnswering", "qa_outputs.bias"),
        ("bart", "BartForSequenceClassification", "classification_head.dense.bias"),
    ],
)
def test_without_a_class_the_file_is_asked(kind: str, head: str, key: str, tmp_path: Path) -> None:
    folder = edit(saved(kind, head, tmp_path / "head"), "config.json", architectures=None)
    with pytest.raises(
        ValueError, match=f'no place for {key} and others in its file; name the class .*"architectures"'
    ):
        load_teacher(folder, None, "cpu")
    plain = edit(saved(kind, type(tiny(kind)).__name__, tmp_path / "plain"), "config.json", architectures=None)
    assert load_teacher(plain, None, "cpu")[2] == ("seq2seq" if kind == "bart" else "text")
    if kind == "bert":
        assert type(load_teacher(folder, None, "cpu", "classification")[0]).__name__ == head


def test_half_an_encoder_decoder_is_not_made_up(tmp_path: Path) -> None:
    folder = saved("bart", "BartForCausalLM", tmp_path)
    edit(folder, "config.json", architectures=["BartModel"], is_encoder_decoder=True, is_decoder=False)
    with pytest.raises(ValueError, match=r"has no model\.encoder\..*; expected all of a BartForConditionalGeneration"):
        load_teacher(folder, None, "cpu")


def test_a_writer_asked_for_classes_is_told_what_it_is_for(tmp_path: Path) -> None:
    folder = saved("bart", "BartForConditionalGeneration", tmp_path / "bart")
    with pytest.raises(ValueError, match="task 'classification': a bart model is an encoder-decoder; expected one of"):
        dqbart.compress(folder, recipe=Recipe(task="classification", epochs=0), output=tmp_path / "out")


@pytest.mark.parametrize(
    "kind, cls, task, words",
    [
        ("bart", "BartForSequenceClassification", None, "head of BartForSequenceClassification would be lost"),
        ("bart", "BartModel", None, "expected a BartForConditionalGeneration, as transformers.AutoModelForSeq2SeqLM"),
        ("bart", "BartForQuestionAnswering", "seq2seq", "expected a BartForConditionalGeneration"),
        ("bert", "BertForTokenClassification", None, "--task text goes on with its encoder alone"),
        ("bert", "BertForMaskedLM", "classification", "of a BertForMaskedLM object; expected a BertForSequenceClassif"),
        ("roberta", "RobertaForMaskedLM", "sentences", "expected a RobertaModel, as transformers.AutoModel gives"),
    ],
)
def test_an_object_has_to_be_of_the_tasks_class(kind: str, cls: str, task: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_teacher(getattr(transformers, cls)(tiny(kind).config), bert_tokenizer(), "cpu", task)


def test_objects_that_fit() -> None:
    for cls, task in (("BertModel", "text"), ("BertForTokenClassification", "text"), ("BertModel", "sentences")):
        model = getattr(transformers, cls)(tiny_encoder("bert").config)
        found = load_teacher(model, bert_tokenizer(), "cpu", task)
        assert type(found[0]).__name__ == cls and found[2] == task


class OfMine(transformers.BertForMaskedLM):
    pass


def test_a_class_that_no_folder_could_name_is_refused() -> None:
    for task in (None, "text"):
        with pytest.raises(ValueError, match="OfMine"):
            load_teacher(OfMine(tiny_encoder("bert").config), bert_tokenizer(), "cpu", task)


@pytest.mark.parametrize("kind", ["bart", "bert"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, type(tiny(kind)).__name__, tmp_path)
    tokenizer = word_tokenizer() if kind == "bart" else bert_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(120 - len(tokenizer))])
    assert load_teacher(folder, tokenizer, "cpu")  # 120 of 120
    tokenizer.add_tokens(["zz1", "zz2"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"token 'zz1' has id 120, but the model has 120 tokens; call .*ings\(122\)"):
        load_teacher(folder, None, "cpu")
    with pytest.raises(ValueError, match="token 'zz1' has id 120"):
        load_teacher(tiny(kind), tokenizer, "cpu")


@pytest.mark.parametrize("kind", ["bart", "bert"])
def test_a_writers_mask_may_have_no_row(kind: str) -> None:
    """facebook/bart-large-cnn has 50264 rows, and 50264 is its tokenizer's <mask>."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(120 - len(tokenizer))])
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert tokenizer.mask_token_id == 120
    if kind == "bart":
        assert load_teacher(tiny(kind), tokenizer, "cpu")
    else:
        with pytest.raises(ValueError, match="token '<mask>' has id 120"):
            load_teacher(tiny(kind), tokenizer, "cpu")
