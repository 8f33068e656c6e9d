"""ALBERT's sharing: the published counts, and students that start where their teacher stands."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertModel,
    BertConfig,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from dqbart.fitting import resolve
from dqbart.quant.attention import use_attention
from dqbart.quant.sharing import share_again
from dqbart.recipe import Recipe
from dqbart.student.sharing import albert_config, albert_student, shared_model
from dqbart.student.start import new_student

SHARINGS = ("all", "attention", "ffn", "none")
BATCH = token_batch([9, 5])


def made(sharing: str, teacher: Any = None, **sizes: Any) -> Any:
    """A student in eval mode whose layers differ wherever they can."""
    student = albert_student(teacher or tiny_encoder("bert"), sharing=sharing, **({"embedding_size": 16} | sizes))
    return student.eval()


@torch.no_grad()
def said(model: Any) -> Tensor:
    return model(**BATCH)[0]  # type: ignore[no-any-return]


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def layers_of(model: Any) -> list[Any]:
    return [group.albert_layers[0] for group in model.base_model.encoder.albert_layer_groups]


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "parameters"),
    [("all", 11_683_584), ("attention", 63_647_232), ("ffn", 37_686_528), ("none", 89_650_176)],
)
def test_published_counts(sharing: str, parameters: int) -> None:
    """They also say which LayerNorm is whose: the attention's behind its output, the other one the feed-forward's."""
    config = albert_config(BertConfig(vocab_size=30000), sharing=sharing)
    with torch.device("meta"):
        model = shared_model(AlbertModel, config)
        assert count(model) == parameters and config.dqbart_sharing == sharing
        if sharing == "all":
            six = shared_model(AlbertModel, albert_config(BertConfig(vocab_size=30000), layers=6))
            assert count(six) == parameters and six.config.num_hidden_layers == 6


@pytest.mark.parametrize("sharing", SHARINGS)
def test_which_modules_are_one(sharing: str) -> None:
    first, *others = layers_of(made(sharing))
    for layer in others:
        assert (layer.attention is first.attention) == (sharing == "attention")
        for part in ("ffn", "ffn_output", "full_layer_layer_norm"):
            assert (getattr(layer, part) is getattr(first, part)) == (sharing == "ffn")
    assert len(others) == (0 if sharing == "all" else 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(sharing="embedding"), "sharing 'embedding': expected 'all' or 'attention' or 'ffn' or 'none'"),
        (dict(sharing=None), "sharing None: expected 'all'"),
        (dict(layers=[0, 1, 2, 2]), "layers 4: the teacher's stack has 3; expected 1 to 3"),
        (dict(layers=[]), "layers 0: expected a whole number from 1"),
        (dict(embedding_size=33), "embedding_size 33: expected 1 to 32, the teacher's width"),
        (dict(embedding_size=0), "embedding_size 0: expected a whole number from 1"),
        (dict(heads=5), "heads 5: don't divide the width 32"),
        (dict(hidden_size=30), "heads 4: don't divide the width 30"),
        (dict(intermediate_size="48"), "intermediate_size '48': expected a whole number"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        albert_student(tiny_encoder("bert"), **changes)
    assert "\n" not in str(caught.value)


def test_teachers_that_do_not_fit() -> None:
    for teacher in (tiny_seq2seq(), tiny_encoder("distilbert")):
        with pytest.raises(ValueError, match="expected a teacher of one of bert, roberta, xlm-roberta, albert"):
            albert_student(teacher)
    with pytest.raises(ValueError, match="there is no Albert class for its task"):
        albert_student(BertForNextSentencePrediction(tiny_encoder("bert").config))
    with pytest.raises(ValueError, match="embedding_size 8: the ALBERT teacher's is 16; expected the same"):
        albert_student(tiny_encoder("albert"), embedding_size=8)
    inner = AlbertConfig(**tiny_encoder("albert").config.to_dict() | {"inner_group_num": 2})
    with pytest.raises(ValueError, match="inner_group_num 2 of the teacher: expected 1"):
        albert_student(AlbertForMaskedLM(inner))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dqbart_sharing="ffn"), "'ffn' with num_hidden_groups 1, inner_group_num 1: expected 3 and 1"),
        (dict(dqbart_sharing="all", num_hidden_groups=3), "dqbart_sharing 'all' with num_hidden_groups 3"),
        (dict(dqbart_sharing="attention", num_hidden_groups=3, inner_group_num=2), "group_num 2: expected 3 and 1"),
        (dict(dqbart_sharing=["ffn"]), r"dqbart_sharing \['ffn'\] in a albert config: expected 'all' or 'attention'"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself(changes: dict[str, Any], words: str) -> None:
    config = tiny_encoder("albert").config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=words):
        shared_model(AlbertForMaskedLM, config)
    bert = tiny_encoder("bert")
    bert.config.dqbart_sharing = "ffn"
    with pytest.raises(ValueError, match="dqbart_sharing 'ffn' in a bert config: expected .* in an albert one"):
        share_again(bert)


# --- where a student starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_student_that_loses_nothing_says_what_its_teacher_says(kind: str) -> None:
    """The embedding as wide as the teacher's, no layer shared: another basis, the same function."""
    teacher = tiny_encoder(kind).base_model
    embeddings = teacher.embeddings
    with torch.no_grad():
        for parameter in (embeddings.LayerNorm.weight, embeddings.LayerNorm.bias):
            parameter.add_(torch.randn(32) * 0.3)
        embeddings.word_embeddings.weight[5] += 3  # a mean, which the norm takes away
    student = albert_student(teacher, embedding_size=32, sharing="none").eval()
    assert type(student) is AlbertModel
    teacher.set_attn_implementation("eager")
    real = BATCH["attention_mask"].bool()  # a RoBERTa's padding has a position of its own
    torch.testing.assert_close(said(student)[real], said(teacher)[real], rtol=1e-4, atol=1e-5)


def test_the_embedding_is_the_best_one_of_its_width() -> None:
    """Ever closer with E, and no further from the teacher's words than the best approximation of rank E may be."""
    teacher = tiny_encoder("bert")
    words = teacher.bert.embeddings.word_embeddings.weight.detach()
    words = words - words.mean(1, keepdim=True)
    values = torch.linalg.svdvals(words.double())
    before = float("inf")
    for size in (4, 16, 24, 31):
        student = made("all", teacher, embedding_size=size)
        table = student.albert.embeddings.word_embeddings.weight.detach()
        scaled = student.albert.encoder.embedding_hidden_mapping_in.weight.detach() * (size / 32) ** 0.5
        error = float((table @ scaled.T - words).double().norm())
        best = float(values[size:].norm())
        assert error == pytest.approx(best, rel=1e-3, abs=1e-4) and error < before
        before = error


def test_one_dimension_is_an_embedding_too() -> None:
    assert said(made("all", embedding_size=1)).isfinite().all()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_layers_come_from_the_teacher(sharing: str) -> None:
    teacher = tiny_encoder("bert")
    source = teacher.state_dict()
    student = made(sharing, teacher, layers=[0, 2])
    for i, layer in enumerate(layers_of(student)):
        for part, theirs, ours in [
            ("attention", "attention.self.value.weight", layer.attention.value.weight),
            ("attention", "attention.output.LayerNorm.bias", layer.attention.LayerNorm.bias),
            ("ffn", "intermediate.dense.bias", layer.ffn.bias),
            ("ffn", "output.dense.weight", layer.ffn_output.weight),
            ("ffn", "output.LayerNorm.weight", layer.full_layer_layer_norm.weight),
        ]:
            one, other = (source[f"bert.encoder.layer.{layer}.{theirs}"] for layer in (0, 2))
            expected = (one + other) / 2 if sharing in ("all", part) else (one, other)[i]
            assert torch.equal(ours, expected), (i, theirs)


def test_other_widths_start_at_random_where_they_must() -> None:
    teacher = tiny_encoder("bert")
    whole, wide = layers_of(made("none", teacher))[1], layers_of(made("none", teacher, intermediate_size=40))[1]
    assert torch.equal(wide.attention.query.weight, whole.attention.query.weight) and wide.ffn.out_features == 40
    heads = layers_of(made("none", teacher, heads=2))[1]
    assert torch.equal(heads.ffn.weight, whole.ffn.weight)
    assert not torch.equal(heads.attention.query.weight, whole.attention.query.weight)  # other heads: another meaning
    narrow = made("ffn", teacher, hidden_size=24, heads=3)
    assert narrow.config.intermediate_size == 36 and narrow.config.embedding_size == 16
    assert said(narrow).isfinite().all()
    same = made("all", teacher, hidden_size=32)
    words = narrow.albert.embeddings.word_embeddings.weight
    assert torch.equal(words, same.albert.embeddings.word_embeddings.weight)
    torch.manual_seed(3)
    one = made("attention", teacher, hidden_size=24, heads=3)
    torch.manual_seed(3)
    assert torch.equal(said(one), said(made("attention", teacher, hidden_size=24, heads=3)))


def test_heads_come_along() -> None:
    config = tiny_encoder("bert").config
    config.num_labels = 5
    for teacher, cls, names in [
        (
            BertForSequenceClassification(config),
            AlbertForSequenceClassification,
            ["classifier.weight", "classifier.bias"],
        ),
        (BertForQuestionAnswering(config), AlbertForQuestionAnswering, ["qa_outputs.weight"]),
    ]:
        student = albert_student(teacher, embedding_size=16)
        assert type(student) is cls and student.config.num_labels == 5
        for name in names:
            assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])
            assert student.state_dict()[name].data_ptr() != teacher.state_dict()[name].data_ptr()
    teacher = BertModel(config)
    assert torch.equal(albert_student(teacher).pooler.weight, teacher.pooler.dense.weight)
    assert type(albert_student(BertForPreTraining(config))) is AlbertForPreTraining
    masked = tiny_encoder("roberta")
    torch.nn.init.normal_(masked.lm_head.bias)
    student = albert_student(masked, embedding_size=16)
    assert torch.equal(student.predictions.bias, masked.lm_head.bias)
    assert student.predictions.decoder.weight is student.albert.embeddings.word_embeddings.weight
    assert student.config.max_position_embeddings == masked.config.max_position_embeddings - 2


def test_an_albert_teacher() -> None:
    """Shares more or less than its student; where nothing changes, the student says the same."""
    teacher = tiny_encoder("albert")
    use_attention(teacher)
    for sharing in SHARINGS:
        student = albert_student(teacher, sharing=sharing).eval()
        assert student.config._attn_implementation == "eager" and student.config.embedding_size == 16
        torch.testing.assert_close(said(student), said(teacher), rtol=1e-5, atol=1e-5)
    apart = made("ffn")
    apart.set_attn_implementation("eager")
    again = albert_student(apart, sharing="attention", layers=[0, 2])
    first, second = layers_of(again)
    old = [layer.attention.key.weight for layer in layers_of(apart)]
    assert torch.equal(first.attention.key.weight, (old[0] + old[2]) / 2)
    assert torch.equal(second.ffn.weight, layers_of(apart)[0].ffn.weight)


def test_layers_begin_as_the_recipe_maps_them() -> None:
    teacher = tiny_encoder("bert")  # of three layers
    recipe = Recipe(method="tinybert", family="albert", sharing="none", layers="2", layer_map=[1, 2], embedding_size=16)
    student = new_student(teacher, resolve(recipe, teacher.config, "text"))
    for own, theirs in enumerate((1, 2)):
        weight = student.base_model.encoder.albert_layer_groups[own].albert_layers[0].attention.query.weight
        assert torch.equal(weight, teacher.base_model.encoder.layer[theirs].attention.self.query.weight)
