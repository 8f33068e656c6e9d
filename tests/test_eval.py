"""`dqbart eval` of checkpoints that are not ours: scored where they can do the task, refused where they can't."""

from pathlib import Path
from typing import Any

import pytest
from conftest import bert_tokenizer, sentences, write
from tiny_models import tiny_encoder

import dqbart
from dqbart.packed.sentence import Pooling, write_pooling
from dqbart.tasks.run import evaluate


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A BERT without any head."""
    tiny_encoder("bert").bert.save_pretrained(tmp_path / "body")
    bert_tokenizer().save_pretrained(tmp_path / "body")
    return tmp_path / "body"


def test_a_sentence_transformers_folder_is_scored(body: Path, tmp_path: Path) -> None:
    write_pooling(body, Pooling())
    pairs = zip(sentences(20, seed=1), sentences(20, seed=2), strict=True)
    rows = [{"sentence1": a, "sentence2": b, "score": i % 5 + 0.5} for i, (a, b) in enumerate(pairs)]
    for task in (None, "sentences"):
        assert "spearman" in evaluate(str(body), write(tmp_path / "sts.jsonl", rows), task=task)[0].values


def test_masked_words_need_their_head(body: Path, bert: Path, tmp_path: Path, capsys: Any) -> None:
    texts = write(tmp_path / "t.jsonl", [{"text": text} for text in sentences(60, seed=3)])
    assert evaluate(str(bert), texts)[0].metric == "accuracy"
    with pytest.raises(ValueError, match="the checkpoint has no masked-language-model head, so there are no words to"):
        evaluate(str(body), texts)
    recipe = dqbart.Recipe(bits="8-8-8", epochs=0)  # type: ignore[arg-type]
    assert "scores" not in dqbart.compress(body, texts, recipe=recipe, output=tmp_path / "out").report


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classification", "BertForMaskedLM: has no head for classification; train one first"),
        ("regression", "BertForMaskedLM: has no head for regression; train one first"),
        ("questions", "BertForMaskedLM: has no head for questions; train one first"),
        ("s2s", "bert0': nothing says that it can write; fine-tune it first"),
    ],
)
def test_a_head_made_at_random_is_not_scored(task: str, words: str, bert: Path, tmp_path: Path) -> None:
    row = {"text": "the cat", "label": 1, "target": "cat", "question": "the", "context": "the cat", "answers": []}
    with pytest.raises(ValueError, match=words):
        evaluate(str(bert), [row, row | {"label": 0}], task=task)
