"""Teachers given as objects: what they are counts, not the checkpoint that they began as."""

from pathlib import Path

import pytest
import torch
from conftest import bert_tokenizer
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import dqbart


@pytest.mark.parametrize("method", ["finetune", "dq"])
def test_a_head_trained_elsewhere_is_kept(method: str, bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    assert model.config.architectures == ["BertForMaskedLM"]  # from_pretrained leaves it
    recipe = dqbart.Recipe(bits="32-32-32", method=method, epochs=0)  # type: ignore[arg-type]
    result = dqbart.compress(model, tokenizer=bert_tokenizer(), recipe=recipe, output=tmp_path / "out")
    assert torch.equal(result.load().classifier.weight, model.classifier.weight)
    assert model.config.architectures == ["BertForMaskedLM"]  # the user's own stays as it is


def test_a_head_for_questions(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(bert)
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0)  # type: ignore[arg-type]
    result = dqbart.compress(model, tokenizer=bert_tokenizer(), recipe=recipe, output=tmp_path / "out")
    assert result.report["recipe"]["task"] == "questions"
