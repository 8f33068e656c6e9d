"""Shapes of other widths against the published parameter counts, and DistilBERT made of a BERT."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from transformers import (
    AlbertConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertModel,
)

from dqbart.student.shape import convert_bert_to_distilbert, distilbert_config_of, distilbert_student, student_config


def count(cls: Any, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in cls(config).parameters())


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        (dict(layers=12), 109_482_240),  # BERT-base itself
        (dict(layers=4, hidden_size=312, intermediate_size=1200), 14_350_248),  # TinyBERT
        (dict(layers=6), 66_955_008),
        (dict(layers=12, hidden_size=384), 33_360_000),  # MiniLM: its inner width follows
        (dict(layers=6, hidden_size=384), 22_713_216),
        (dict(layers=6, hidden_size=384, heads=6), 22_713_216),  # heads have no parameters of their own
    ],
)
def test_published_shapes_of_bert(sizes: dict[str, int], parameters: int) -> None:
    teacher = BertConfig()
    config = student_config(teacher, **sizes)  # type: ignore[arg-type]
    assert count(BertModel, config) == parameters
    assert config is not teacher and teacher.to_dict() == BertConfig().to_dict()
    assert config.num_attention_heads == sizes.get("heads", 12) and config._attn_implementation == "eager"


def test_published_shape_of_distilbert() -> None:
    assert count(DistilBertModel, distilbert_config_of(BertConfig(), 6)) == 66_362_880


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "distilbert", "albert"])
def test_every_family_by_its_own_names(kind: str) -> None:
    teacher = tiny_encoder(kind)
    config = student_config(teacher.config, layers=2, hidden_size=24, heads=3, intermediate_size=40)
    student = type(teacher)(config).eval()
    state = student.base_model.state_dict()
    inner = next(
        t for name, t in state.items() if name.endswith(("intermediate.dense.weight", "lin1.weight", "ffn.weight"))
    )
    assert inner.shape == (40, 24)
    with torch.no_grad():
        output = student(**token_batch([5, 3]), output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[-1].shape == (2, 5, 24)
    assert (teacher.config.num_hidden_layers, teacher.config.hidden_size) == (3, 32)


def test_albert_keeps_its_embedding_and_its_groups() -> None:
    def shaped(layers: int, **settings: int) -> Any:
        return student_config(AlbertConfig(num_hidden_layers=12, **settings), layers=layers, hidden_size=64, heads=2)

    assert (shaped(6).num_hidden_groups, shaped(6).embedding_size) == (1, 128)
    assert shaped(6, num_hidden_groups=12).num_hidden_groups == 6
    assert (
        shaped(6, num_hidden_groups=3).num_hidden_groups == 3 and shaped(2, num_hidden_groups=3).num_hidden_groups == 2
    )
    assert student_config(AlbertConfig(), layers=3, embedding_size=32).embedding_size == 32


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(layers=4), "layers 4: the teacher's stack has 3; expected 1 to 3"),
        (dict(layers=0), "layers 0: expected a whole number from 1"),
        (dict(layers="2"), "layers '2': expected a whole number from 1"),
        (dict(layers=True), "layers True: expected a whole number"),
        (dict(layers=2, hidden_size=30), r"heads 4: don't divide the width 30; expected one of \[1, 2, 3, 5, 6, 10, "),
        (dict(layers=2, heads=5), r"heads 5: don't divide the width 32; expected one of \[1, 2, 4, 8, 16, 32\]"),
        (dict(layers=2, heads=0), "heads 0: expected a whole number"),
        (dict(layers=2, hidden_size=-4), "hidden_size -4: expected a whole number"),
        (dict(layers=2, intermediate_size=1.5), "intermediate_size 1.5: expected a whole number"),
        (dict(layers=2, embedding_size=8), "embedding_size 8: the embedding of a bert is as wide as its layers"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        student_config(tiny_encoder("bert").config, **sizes)
    assert "\n" not in str(caught.value)


def test_families_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="architecture 'bart': expected an encoder, one of bert, roberta"):
        student_config(tiny_seq2seq().config, layers=1)
    with pytest.raises(ValueError, match="architecture 'roberta': a DistilBERT is made of a bert"):
        distilbert_config_of(tiny_encoder("roberta").config, 2)
    with pytest.raises(ValueError, match="layers 9: the teacher's stack has 3"):
        distilbert_config_of(tiny_encoder("bert").config, 9)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_a_distilbert_of_all_layers_says_what_its_bert_says(cls: Any) -> None:
    """Token type 0 included, which DistilBERT has no place for but the positions."""
    torch.manual_seed(0)
    teacher = cls(tiny_encoder("bert").config).eval()
    student = distilbert_student(teacher, [0, 1, 2]).eval()
    assert type(student) is {BertModel: DistilBertModel, BertForMaskedLM: DistilBertForMaskedLM}[cls]
    batch = token_batch([9, 5])
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(student(**batch)[0], teacher(**batch)[0], rtol=1e-4, atol=1e-5)
        teacher.base_model.embeddings.token_type_embeddings.weight[0] *= -2
        assert not torch.allclose(student(**batch)[0], teacher(**batch)[0], atol=1e-2)  # nothing is shared


def test_distilbert_takes_the_layers_it_is_told() -> None:
    teacher = tiny_encoder("bert")
    source, student = teacher.state_dict(), distilbert_student(teacher, [2, 0, 2])
    for i, layer in enumerate([2, 0, 2]):
        for ours, theirs in [
            ("attention.k_lin.weight", "attention.self.key.weight"),
            ("ffn.lin2.bias", "output.dense.bias"),
        ]:
            found = student.state_dict()[f"distilbert.transformer.layer.{i}.{ours}"]
            assert torch.equal(found, source[f"bert.encoder.layer.{layer}.{theirs}"])
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight
    found = convert_bert_to_distilbert(source, [1])
    assert set(found) == set(distilbert_student(teacher, [1]).state_dict())


def test_heads_of_other_tasks() -> None:
    config = tiny_encoder("bert").config
    asks = distilbert_student(BertForQuestionAnswering(config), [0])
    assert isinstance(asks, DistilBertForQuestionAnswering)
    config.num_labels, config.id2label = 5, {i: f"label {i}" for i in range(5)}
    config.problem_type = "single_label_classification"
    teacher = BertForSequenceClassification(config)
    student = distilbert_student(teacher, [0])
    assert isinstance(student, DistilBertForSequenceClassification) and student.classifier.out_features == 5
    assert student.config.id2label[3] == "label 3" and student.config.problem_type == config.problem_type
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)  # it looks at something else
    assert isinstance(distilbert_student(BertForPreTraining(config), [0]), DistilBertForMaskedLM)


def test_tensors_that_are_no_berts() -> None:
    state = tiny_encoder("bert").state_dict()
    with pytest.raises(ValueError, match=r"layers \[0, 3\]: the tensors given have no layer 3; they count from 0"):
        convert_bert_to_distilbert(state, [0, 3])
    others: list[dict[str, torch.Tensor]] = [{}, tiny_encoder("distilbert").state_dict()]
    for other in others:
        with pytest.raises(ValueError, match="no tensor embeddings.token_type_embeddings.weight: expected a BERT's"):
            convert_bert_to_distilbert(other, [0])
    with pytest.raises(ValueError, match="there is no DistilBert class for its task"):
        from transformers import BertForNextSentencePrediction

        distilbert_student(BertForNextSentencePrediction(tiny_encoder("bert").config), [0])
