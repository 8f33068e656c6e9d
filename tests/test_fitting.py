"""A recipe and the model it is for: what is filled in, what is refused."""

from typing import Any

import pytest
from tiny_models import tiny_encoder, tiny_seq2seq
from transformers import BartConfig

from dqbart.fitting import resolve
from dqbart.methods import METHODS
from dqbart.notation import Layers
from dqbart.recipe import Recipe


def test_resolve_reads_the_teachers_config() -> None:
    base = BartConfig(d_model=768, encoder_layers=6, decoder_layers=5)
    recipe = resolve(Recipe(), base)
    assert (recipe.layers, recipe.learning_rate, recipe.task) == (Layers("6-5"), 3e-4, "seq2seq")
    assert resolve(recipe, base) == recipe  # nothing is left to fill in
    given = dict(layers="3-1", learning_rate=1e-3, task="seq2seq", metric="bleu")
    assert resolve(Recipe(**given), base) == Recipe(**given)
    narrow = tiny_seq2seq("mbart", 3, 2).config  # width 32: sqrt(24) times as much
    assert resolve(Recipe(bits="8-8-8"), narrow).learning_rate == 2.4e-4
    assert resolve(Recipe(bits="8-1-8"), base).learning_rate == 2.5e-4  # the lowest bits decide
    assert resolve(Recipe(bits="32-32-32"), narrow).layers == Layers("3-2")
    for kind in ("bert", "distilbert", "albert"):
        assert resolve(Recipe(), tiny_encoder(kind).config).layers == Layers("3")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_methods_know_their_models() -> None:
    encoder, decoder = tiny_encoder("bert").config, tiny_seq2seq().config
    with pytest.raises(ValueError, match="method 'minilm' is for encoders, and a bart model has a decoder; expected"):
        resolve(Recipe(method="minilm"), decoder)
    with pytest.raises(ValueError, match=r"losses.decoder_hidden: a bert model has task, logits, embedding, hidden"):
        resolve(Recipe(losses={"decoder_hidden": 1}), encoder)
    with pytest.raises(ValueError, match=r"losses.scores: a bart model has task, logits, encoder_attention"):
        resolve(Recipe(losses={"scores": 1}), decoder)
    with pytest.raises(ValueError, match=r"task 'seq2seq': a bert model is an encoder; expected one of classification"):
        resolve(Recipe(task="seq2seq"), encoder)
    with pytest.raises(ValueError, match=r"task 'questions': a bart model is an encoder-decoder; expected one of seq2"):
        resolve(Recipe(task="questions"), decoder)
    with pytest.raises(ValueError, match="hidden_size 16: only encoders' students have a shape of their own"):
        resolve(Recipe(hidden_size=16), decoder)
    found = resolve(Recipe(method="minilm", bits="32-32-32"), encoder, "text")
    assert (found.task, found.metric, found.layers, found.learning_rate) == ("text", "accuracy", Layers("3"), 2.4e-3)
    roberta = tiny_encoder("roberta").config  # positions begin after the padding token's
    assert resolve(Recipe(), roberta).max_source_length == 62


@pytest.mark.parametrize(
    "changes, task, words",
    [
        ({"teacher_layer": 99}, None, "teacher_layer 99: only the losses attention_kl, queries, keys and values"),
        ({"relation_heads": 4, "method": "tinybert"}, None, "relation_heads 4: only the losses"),
        ({"sharing": "ffn"}, None, "sharing 'ffn': only family 'albert' of another teacher would read it"),
        ({"masking": "word"}, "classification", "masking 'word': only task 'text' would read it; leave it out"),
        ({"masking": "word", "method": "distilbert"}, "classification", "masking 'word': only task 'text'"),
        ({"segments": 2}, "classification", "segments 2: only task 'text'"),
        ({"document_column": "doc"}, "regression", "document_column 'doc': only task 'text'"),
        ({"source_prefix": "query: "}, "text", "source_prefix 'query: ': only tasks with one source text"),
        ({"label_smoothing": 0.1}, "regression", "label_smoothing 0.1: only tasks with classes or words"),
        ({"target_column": "answer"}, "questions", "target_column 'answer': only tasks other than questions"),
        ({"skip": "*.fc1", "bits": "32-32-32"}, None, r"skip \('\*.fc1',\): only bits other than 32-32-32"),
        ({"generation": {"num_beams": 4}}, None, "generation {'num_beams': 4}: only tasks that write or answer would"),
        ({"label_epochs": 1}, None, "label_epochs 1: only method 'dynabert'"),
        (
            {"prediction_epochs": 1},
            None,
            "prediction_epochs 1: only a method with a second part, on a task",
        ),
        ({"prediction_epochs": 0, "method": "tinybert"}, "text", "prediction_epochs 0: only a method with a second"),
        (
            {"temperature": 2, "method": "minilm"},
            None,
            "temperature 2: only logits_loss 'kl' of classes or words",
        ),
        ({"temperature": 2, "logits_loss": "mse"}, None, "temperature 2: only logits_loss 'kl'"),
        ({"temperature": 2, "method": "tinybert"}, "text", "temperature 2: only logits_loss 'kl'"),
        ({"temperature": 2}, "regression", "temperature 2: only logits_loss 'kl'"),
    ],
)
def test_keys_that_nothing_would_read(changes: dict[str, Any], task: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(Recipe(**changes), tiny_encoder("bert").config, task or "classification")


@pytest.mark.parametrize("method", list(METHODS))
def test_what_a_method_sets_is_not_refused(method: str) -> None:
    for task in ("classification", "text"):
        found = resolve(Recipe(method=method), tiny_encoder("bert").config, task)
        assert resolve(found, tiny_encoder("bert").config, task) == found
