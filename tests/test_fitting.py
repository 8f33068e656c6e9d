"""A recipe and the model it is for: what is filled in, what is refused."""

from typing import Any

import pytest
import yaml
from tiny_models import tiny_encoder, tiny_seq2seq
from transformers import BartConfig

from dqbart.fitting import resolve
from dqbart.methods import METHODS
from dqbart.notation import Layers
from dqbart.recipe import METRICS, PRESETS, Recipe


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
    for bits in ("8-8-8", "1-1-8", "32-32-32"):  # layers that are left out take as large a step as two bits
        assert resolve(Recipe(bits=bits, layers="6-3"), base).learning_rate == 3e-4
        assert resolve(Recipe(bits=bits, layers="6-5"), base).learning_rate < 3e-4
        assert resolve(Recipe(bits=bits), base, student=BartConfig(encoder_layers=3)).learning_rate < 3e-4
    bert = tiny_encoder("bert").config
    assert resolve(Recipe(bits="8-8-8", layers="2"), bert).learning_rate == 1.5e-3
    assert resolve(Recipe(bits="8-8-8"), bert).learning_rate == 2.4e-4
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
    for bits in ("8-8-8", "2-2-8"):  # a student that is made takes more than one that is rounded
        assert resolve(Recipe(method="minilm", bits=bits), encoder, "text").learning_rate == 2.4e-3
    given = resolve(Recipe(method="minilm", bits="8-8-8"), encoder, "text", student=encoder)
    assert given.learning_rate == 2.4e-4
    roberta = tiny_encoder("roberta").config  # positions begin after the padding token's
    assert resolve(Recipe(), roberta).max_source_length == 62


@pytest.mark.parametrize(
    "changes, task, words",
    [
        ({"teacher_layer": 99}, None, "teacher_layer 99: only the losses attention_kl, queries, keys and values"),
        ({"relation_heads": 4, "method": "tinybert"}, None, "relation_heads 4: only the losses"),
        ({"sharing": "ffn"}, None, "sharing 'ffn': only family 'albert' of another teacher would read it"),
        ({"masking": "word"}, "classification", "masking 'word': only task 'text' with losses.task or losses.logits"),
        ({"masking": "word", "method": "distilbert"}, "classification", "masking 'word': only task 'text'"),
        ({"segments": 2}, "classification", "segments 2: only task 'text'"),
        ({"document_column": "doc"}, "regression", "document_column 'doc': only task 'text'"),
        ({"source_prefix": "query: "}, "text", "source_prefix 'query: ': only tasks with one source text"),
        ({"label_smoothing": 0.1}, "regression", "label_smoothing 0.1: only losses.task of classes or words"),
        ({"label_smoothing": 0.1, "method": "prediction"}, None, "label_smoothing 0.1: only losses.task of classes"),
        ({"label_smoothing": 0.1, "method": "tinybert"}, "text", "label_smoothing 0.1: only losses.task of classes"),
        ({"mask_rate": 0.3}, "s2s", "mask_rate 0.3: only task 'text' with losses.task or losses.logits would read it"),
        ({"mask_rate": 0.3, "method": "minilm"}, "text", "mask_rate 0.3: only task 'text' with losses.task or"),
        ({"mask_rate": 0, "method": "tinybert"}, "text", "mask_rate 0: only task 'text' with losses.task or"),
        ({"masking": "ngram", "method": "minilm2"}, "text", "masking 'ngram': only task 'text' with losses.task or"),
        ({"source_column": "question"}, "questions", "source_column 'question': only tasks other than questions"),
        ({"target_column": "answer"}, "questions", "target_column 'answer': only tasks with a column of outputs or"),
        ({"target_column": "label"}, "text", "target_column 'label': only tasks with a column of outputs or labels"),
        ({"pair_column": "other"}, "text", "pair_column 'other': only tasks on pairs of texts would read it"),
        ({"pair_column": "other"}, "s2s", "pair_column 'other': only tasks on pairs"),
        ({"pair_column": "other"}, "seq2seq", "pair_column 'other': only tasks on pairs"),
        ({"source_lang": "en_XX"}, "questions", "source_lang 'en_XX': only tasks that write would read it"),
        ({"target_lang": "en_XX"}, None, "target_lang 'en_XX': only tasks that write or answer would read it"),
        ({"max_target_length": 20}, "questions", "max_target_length 20: only tasks that write would read it"),
        ({"quantize_heads": True}, "seq2seq", "quantize_heads True: only encoders with bits other than 32-32-32"),
        ({"quantize_heads": True, "bits": "32-32-32"}, None, "quantize_heads True: only encoders with bits other"),
        ({"float_dtype": "float32", "bits": "32-32-32"}, None, "float_dtype 'float32': only bits other than 32-32-32"),
        (
            {"logits_loss": "mse", "method": "finetune"},
            "seq2seq",
            "logits_loss 'mse': only losses.logits would read it",
        ),
        ({"logits_loss": "mse", "method": "minilm"}, None, "logits_loss 'mse': only losses.logits would read it"),
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
    config = (tiny_seq2seq() if task == "seq2seq" else tiny_encoder("bert")).config
    with pytest.raises(ValueError, match=words):
        resolve(Recipe(**changes), config, task or "classification")


@pytest.mark.parametrize(
    "changes, task",
    [
        ({"mask_rate": 0.3, "masking": "word", "method": "ternarybert"}, "text"),
        ({"mask_rate": 0.3, "masking": "word", "method": "dynabert", "losses": {"logits": 0.0}}, "text"),
        ({"label_smoothing": 0.1, "logits_loss": "mse"}, "classification"),
        ({"logits_loss": "mse", "method": "tinybert"}, "classification"),  # of its second part
        ({"pair_column": "other", "target_column": "score"}, "sentences"),
        ({"source_lang": "en_XX", "target_lang": "de_DE", "max_target_length": 20}, "s2s"),
        ({"target_lang": "de_DE"}, "questions"),  # what answers are scored in
        ({"language": "de"}, "classification"),  # stands on the card
        ({"preset": "paper-2-2-8", "losses": {"logits": 0}}, "seq2seq"),  # whose numerics insist on logits_loss 'mse'
    ],
)
def test_keys_that_are_read(changes: dict[str, Any], task: str) -> None:
    config = (tiny_seq2seq() if task == "seq2seq" else tiny_encoder("bert")).config
    if "sentences" in task:
        changes = changes | {"method": "sentence"}
    found = resolve(Recipe.from_dict(changes), config, task)
    assert resolve(found, config, task) == found


def recipe_of(name: str) -> Recipe:
    return Recipe(method=name) if name in METHODS else Recipe.preset(name)


def is_for(name: str, task: str) -> bool:
    recipe, family = recipe_of(name), "encoder-decoder" if task == "seq2seq" else "encoder"
    silent = task == "sentences" and (recipe.elastic or {"task", "logits"} & recipe.terms.keys())
    fits = family in METHODS[recipe.method].families and not (recipe.elastic and task == "s2s")
    return fits and not silent and not (name.startswith("paper") and family == "encoder")


@pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in (*METHODS, *PRESETS) for task in METRICS if is_for(name, task)]
)
def test_a_recipe_of_a_finished_run_is_taken_again(name: str, task: str) -> None:
    config = (tiny_seq2seq() if task == "seq2seq" else tiny_encoder("bert")).config
    recipe = recipe_of(name)
    found = resolve(recipe, config, task)
    assert (found.max_source_length, found.max_target_length) == (64, 63)  # cut to the model's
    again = Recipe.from_dict(yaml.safe_load(found.to_yaml()))
    assert resolve(again, config) == found
