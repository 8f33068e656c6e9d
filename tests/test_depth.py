"""Layer maps against the published tables, and students that are copied, whole and independent."""

from typing import Any

import pytest
import torch
from tiny_models import SEQ2SEQ, tiny_encoder, tiny_seq2seq, token_batch
from transformers import T5Config

from dqbart.notation import Layers
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import FakeQuantLinear, prepare
from dqbart.student.depth import make_student, stack_maps
from dqbart.student.maps import kept_layers, layer_map, mapped_layers

DQ = {1: [5], 2: [0, 5], 3: [0, 2, 5], 4: [0, 2, 3, 5], 5: [0, 1, 3, 4, 5], 6: [0, 1, 2, 3, 4, 5]}
SHLEIFER_RUSH = {
    1: [11], 2: [0, 6], 3: [0, 6, 11], 4: [0, 4, 8, 11], 6: [0, 2, 4, 7, 9, 11], 9: [0, 1, 2, 4, 5, 7, 9, 10, 11],
    12: list(range(12)),
}  # fmt: skip


@pytest.mark.parametrize(("teacher", "table"), [(6, DQ), (12, SHLEIFER_RUSH)])
def test_published_tables(teacher: int, table: dict[int, list[int]]) -> None:
    assert {k: layer_map(teacher, k) for k in table} == table
    layer_map(teacher, 3).append(99)  # a copy
    assert layer_map(teacher, 3) == table[3]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (12, 5, [0, 3, 6, 8, 11]), (12, 11, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]), (4, 2, [0, 3]), (4, 3, [0, 2, 3]),
        (24, 1, [23]), (24, 2, [0, 23]), (3, 1, [2]), (1, 1, [0]), (8, 4, [0, 2, 5, 7]),
    ],
)  # fmt: skip
def test_other_depths_are_evenly_spaced(teacher: int, student: int, expected: list[int]) -> None:
    assert layer_map(teacher, student) == expected


def test_any_map_climbs_and_ends_at_the_top() -> None:
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            found = layer_map(teacher, student)
            assert found == sorted(set(found)) and len(found) == student
            assert 0 <= found[0] and (found[-1] == teacher - 1 or (teacher, student) == (12, 2))


@pytest.mark.parametrize("count", [0, -1, 7])
def test_layers_the_teacher_does_not_have(count: int) -> None:
    with pytest.raises(ValueError, match=rf"layers {count}: the teacher's stack has 6; expected 1 to 6"):
        layer_map(6, count)


def test_what_does_not_fit() -> None:
    config = tiny_seq2seq(encoder=3, decoder=2).config
    assert stack_maps(config, Layers("2-1")) == {"encoder_layers": [0, 2], "decoder_layers": [1]}
    for layers, words in [
        ("4-1", "encoder layers 4: the teacher's stack has 3; expected 1 to 3"),
        ("3-3", "decoder layers 3: the teacher's stack has 2; expected 1 to 2"),
        ("3", "layers '3': a bart model has 2 stacks; expected E-D, such as 6-3"),
    ]:
        with pytest.raises(ValueError, match=words):
            stack_maps(config, Layers(layers))
    with pytest.raises(ValueError, match="architecture 't5' is not supported here: expected one of bart, mbart"):
        stack_maps(T5Config(), Layers("2"))
    with pytest.raises(ValueError, match=r"layer map \[0\]: an encoder-decoder has two stacks; expected one of spread"):
        stack_maps(config, Layers("1-1"), [0])
    with pytest.raises(ValueError, match="layers '2-2': a bert model has 1 stacks; expected one number"):
        make_student(tiny_encoder("bert"), Layers("2-2"))


def test_maps_of_encoder_methods() -> None:
    assert mapped_layers("uniform", 12, 4) == [2, 5, 8, 11] and mapped_layers("uniform", 6, 6) == list(range(6))
    assert mapped_layers("top", 12, 4) == [8, 9, 10, 11] and mapped_layers("bottom", 12, 4) == [0, 1, 2, 3]
    assert mapped_layers("spread", 12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert mapped_layers((3, 3, 0), 4, 3) == [3, 3, 0]
    assert kept_layers(12, 0.75) == [0, 1, 2, 4, 5, 6, 8, 9, 10] and kept_layers(12, 0.5) == [0, 2, 4, 6, 8, 10]
    assert kept_layers(12, 1.0) == list(range(12)) and kept_layers(3, 1 / 3) == [0]
    refused: list[tuple[Any, str]] = [
        (("uniform", 12, 5), r"5 student layers don't divide the teacher's 12; expected one of \[1, 2, 3, 4, 6, 12\]"),
        (("middle", 12, 4), "layer map 'middle': expected one of spread, uniform, top, bottom, or a list"),
        (([0, 12], 12, 2), r"layer map \[0, 12\]: expected 2 teacher layers, each from 0 to 11"),
        (([0], 12, 2), r"layer map \[0\]: expected 2 teacher layers"),
        (("top", 4, 5), "layers 5: the teacher's stack has 4"),
    ]
    for arguments, words in refused:
        with pytest.raises(ValueError, match=words):
            mapped_layers(*arguments)
    for depth in (0, 1.5, 0.1):
        with pytest.raises(ValueError, match=rf"depth {depth} of 3 layers: expected above 0 to 1"):
            kept_layers(3, depth)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_shallow_encoders(kind: str) -> None:
    """Layers from the right place, everything else whole; a student as deep as its teacher says the same."""
    teacher = tiny_encoder(kind)
    source = teacher.state_dict()
    student = make_student(teacher, Layers("2")).eval()
    layers = "transformer.layer" if kind == "distilbert" else "encoder.layer"
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 3
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, source[name.replace(f"{layers}.1.", f"{layers}.2.")]), name
    batch = token_batch([7, 3])
    with torch.no_grad():
        twin = make_student(teacher, Layers("3")).eval()
        teacher.set_attn_implementation("eager")
        assert torch.equal(twin(**batch).logits, teacher(**batch).logits)
        assert student(**batch).logits.shape == teacher(**batch).logits.shape
    assert prepare(student, "2-2-8")(**batch).logits.isfinite().all()


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_layers_come_from_the_right_place(kind: str) -> None:
    teacher = tiny_seq2seq(kind, 6, 6)
    source = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = make_student(teacher, Layers("4-3"))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 3)
    assert type(student) is type(teacher) and not hasattr(student.model.encoder.layers, "4")
    places = {"encoder": [0, 2, 3, 5], "decoder": [0, 2, 5]}
    seen = 0
    for name, tensor in student.state_dict().items():
        origin = name
        for stack, mapping in places.items():
            for i, j in reversed(list(enumerate(mapping))):
                if name.startswith(f"model.{stack}.layers.{i}."):
                    origin = name.replace(f"{stack}.layers.{i}.", f"{stack}.layers.{j}.")
                    seen += 1
        assert torch.equal(tensor, source[origin]), (name, origin)
    assert seen == 4 * 16 + 3 * 26
    assert student.lm_head.weight is student.model.shared.weight is student.model.encoder.embed_tokens.weight


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_nothing_is_shared_with_the_teacher(kind: str) -> None:
    teacher = tiny_seq2seq(kind, 2, 2)
    use_attention(teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = make_student(teacher, Layers("2-2"))
    addresses = {t.data_ptr() for t in teacher.state_dict().values()}
    assert not addresses & {t.data_ptr() for t in student.state_dict().values()}
    assert student.config is not teacher.config and student.generation_config is not teacher.generation_config
    prepare(student, "2-2-8")
    student.generation_config.max_length = 77
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.generation_config.max_length != 77
    assert not any(isinstance(m, FakeQuantLinear) or hasattr(m, "attention_numerics") for m in teacher.modules())


def test_a_whole_student_says_what_its_teacher_says() -> None:
    teacher = tiny_seq2seq("bart", 3, 2)
    batch = token_batch([6, 9])
    with torch.no_grad():
        twin = make_student(teacher, Layers("3-2")).eval()
        teacher.set_attn_implementation("eager")
        assert torch.equal(
            twin(**batch, decoder_input_ids=batch["input_ids"]).logits,
            teacher(**batch, decoder_input_ids=batch["input_ids"]).logits,
        )


def test_settings_travel() -> None:
    teacher: Any = tiny_seq2seq("mbart", 2, 2, encoder_layerdrop=0.5, decoder_layerdrop=0.5).to(torch.bfloat16)
    teacher.generation_config.update(num_beams=3, forced_bos_token_id=7)
    teacher.final_logits_bias.fill_(0.5)
    student = make_student(teacher, Layers("1-1"))
    assert student.dtype == torch.bfloat16 and student.final_logits_bias.unique().tolist() == [0.5]
    assert (student.generation_config.num_beams, student.generation_config.forced_bos_token_id) == (3, 7)
    # A layer dropped at random would shift the alignment of student and teacher.
    assert student.config.encoder_layerdrop == student.config.decoder_layerdrop == 0
    assert teacher.config.encoder_layerdrop == 0.5
    output = student.train()(**token_batch([4]), decoder_input_ids=torch.tensor([[2, 5]]), output_hidden_states=True)
    assert len(output.encoder_hidden_states) == 2


@pytest.mark.parametrize("layers", ["3-1", "1-3", "2-2"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_shallow_students_generate(kind: str, layers: str) -> None:
    """Layers cut without renumbering would index past the end of the cache."""
    student = make_student(tiny_seq2seq(kind, 4, 4), Layers(layers)).eval()
    decoder = student.model.decoder.layers
    assert [layer.self_attn.layer_idx for layer in decoder] == list(range(len(decoder)))
    batch = token_batch([7, 3])
    for model in (student, prepare(student, "2-2-8")):
        for beams in (1, 3):
            ids = model.generate(**batch, num_beams=beams, max_new_tokens=8, min_new_tokens=8, decoder_start_token_id=2)
            assert ids.shape == (2, 9)
