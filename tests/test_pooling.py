"""Sentence-transformers folders in both directions, and pooling to the letter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder

from dqbart.packed.sentence import Pooling, pool, read_pooling, write_pooling

KINDS = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
NORMALIZE = "sentence_transformers.models.Normalize"


def steps(*types: str, root: str = "") -> list[dict[str, Any]]:
    paths = [root, "1_Pooling", "2_Normalize", "3_More"]
    return [{"idx": i, "name": str(i), "path": paths[i], "type": kind} for i, kind in enumerate(types)]


def write_files(folder: Path, **files: Any) -> Path:
    """The files of all-MiniLM-L6-v2 as version 2.0 of sentence-transformers wrote them, some of them replaced."""
    contents = {
        "modules.json": steps(*KINDS, NORMALIZE),
        "1_Pooling/config.json": {
            "word_embedding_dimension": 384, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
    }  # fmt: skip
    names = {"modules": "modules.json", "pooling": "1_Pooling/config.json", "limits": "sentence_bert_config.json",
             "settings": "config_sentence_transformers.json"}  # fmt: skip
    (folder / "1_Pooling").mkdir(parents=True)
    for name, content in (contents | {names[key]: value for key, value in files.items()}).items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_the_oldest_spelling(tmp_path: Path) -> None:
    assert read_pooling(write_files(tmp_path / "m")) == Pooling(mode="mean", normalize=True, max_seq_length=256)
    assert read_pooling(tmp_path) is None and read_pooling(tmp_path / "nowhere") is None


def test_the_newest_spelling(tmp_path: Path) -> None:
    """As version 6.2 writes it: the length limit is the tokenizer's own."""
    inner = "sentence_transformers.base.modules"
    kinds = [f"{inner}.transformer.Transformer", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"]
    text = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    folder = write_files(
        tmp_path / "m", modules=steps(*kinds),
        pooling={"embedding_dimension": 384, "pooling_mode": "cls", "include_prompt": True},
        limits={"transformer_task": "feature-extraction", "modality_config": text},
        settings={"model_type": "SentenceTransformer", "prompts": {"query": "Q: ", "document": ""},
                  "default_prompt_name": "query", "similarity_fn_name": "dot"},
    )  # fmt: skip
    prompts = {"query": "Q: ", "document": ""}
    want = Pooling(mode="cls", prompts=prompts, default_prompt_name="query", similarity="dot")
    assert read_pooling(folder) == want


@pytest.mark.parametrize("absent", ["limits", "settings"])
def test_two_files_may_be_absent(absent: str, tmp_path: Path) -> None:
    found = read_pooling(write_files(tmp_path / "m", **{absent: None}))
    assert found is not None and found.max_seq_length == (None if absent == "limits" else 256)


@pytest.mark.parametrize(
    "pooling",
    [
        Pooling(),
        Pooling(mode="cls", normalize=True, max_seq_length=7, similarity="euclidean"),
        Pooling(mode="max", lowercase=True, prompts={"frage": "Übersetze — 東京: "}, default_prompt_name="frage"),
    ],
)
def test_what_is_written_is_read(pooling: Pooling, tmp_path: Path) -> None:
    tiny_encoder("distilbert").save_pretrained(tmp_path)  # its config calls the width `dim`
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for first in (Pooling(mode="max", normalize=True), pooling):  # the second replaces the first
        write_pooling(tmp_path, first)
    assert read_pooling(tmp_path) == pooling
    assert {file: file.read_bytes() for file in before} == before
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 32


def test_written_as_the_oldest_version_did(tmp_path: Path) -> None:
    """Other people's programs read these files, so their form is part of the promise."""
    golden, ours = write_files(tmp_path / "golden"), tmp_path / "ours"
    tiny_encoder("bert").save_pretrained(ours)
    pooling = read_pooling(golden)
    assert pooling is not None
    write_pooling(ours, pooling)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        want, found = (json.loads((folder / name).read_text()) for folder in (golden, ours))
        if isinstance(want, dict) and "word_embedding_dimension" in want:
            want["word_embedding_dimension"] = 32
        assert found == want


def test_writing_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it; save the encoder there first"):
        write_pooling(tmp_path, Pooling())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules": steps(*KINDS, "sentence_transformers.models.Dense", NORMALIZE)},
         r"modules\.json: modules Transformer, Pooling, Dense, Normalize: expected Transformer, Pooling and"),
        ({"modules": steps(*KINDS, KINDS[1])}, "modules Transformer, Pooling, Pooling: expected"),
        ({"modules": steps(KINDS[0], "sentence_transformers.models.WeightedLayerPooling", KINDS[1])},
         "modules Transformer, WeightedLayerPooling, Pooling: expected"),
        ({"modules": steps(KINDS[0])}, "modules Transformer: expected"),
        ({"modules": steps(NORMALIZE, *KINDS)}, "modules Normalize, Transformer, Pooling: expected"),
        ({"modules": steps("custom_st.Transformer", KINDS[1])}, "modules custom_st.Transformer, Pooling: expected"),
        ({"modules": []}, "modules none: expected"),
        ({"modules": {}}, "expected a JSON list, found dict"),
        ({"modules": ["Transformer"]}, "expected a list of modules, each with a type and a path"),
        ({"modules": "[{"}, r"modules\.json: not valid JSON"),
        ({"modules": steps(*KINDS, root="0_Transformer")}, "the encoder is in '0_Transformer': expected it in the fol"),
        *(({"modules": [*steps(KINDS[0]), {"type": KINDS[1], "path": path}]}, f"pooling in {path!r}: expected a folder")
          for path in ("", ".", "..", "/", "../m/1_Pooling", "1_Pooling/")),
        ({"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
         "pooling mean and cls: expected one of mean, cls, max"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, "pooling mean and max: expected"),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "pooling lasttoken: expected"),
        ({"pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, "pooling pooling_mode_mean_sqrt_len_tokens: exp"),
        ({"pooling": {"pooling_mode": [{}]}}, r"pooling {}: expected"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt false: expected true"),
        ({"pooling": None}, r"config\.json: no such file, but modules\.json asks for it"),
        ({"limits": {"transformer_task": "fill-mask"}}, "transformer_task 'fill-mask': expected 'feature-extraction'"),
        ({"limits": {"processing_kwargs": {"text": {"max_length": 8}}}}, "processing_kwargs .*: expected {}"),
        ({"limits": {"max_seq_length": "256"}}, "max_seq_length '256': expected a whole number of at least 1"),
        ({"limits": {"max_seq_length": True}}, "max_seq_length True"),
        ({"limits": {"do_lower_case": 1}}, "do_lower_case 1: expected true or false"),
        ({"settings": {"model_type": "SparseEncoder"}}, "model_type 'SparseEncoder': expected 'SentenceTransf"),
        ({"settings": {"prompts": ["query"]}}, r"prompts \['query'\]: expected texts by name"),
        ({"settings": {"prompts": {"query": None}}}, "prompts .*: expected texts by name"),
        ({"settings": {"default_prompt_name": "q"}}, r"default_prompt_name 'q': expected one of the prompts \(none\)"),
        ({"settings": {"default_prompt_name": {}}}, "default_prompt_name {}: expected one of the prompts"),
        ({"settings": {"similarity_fn_name": "maxsim"}}, "similarity_fn_name 'maxsim': expected one of cosine, dot,"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m", **files)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_pooling(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_pooling_is_a_value() -> None:
    assert hash(Pooling(prompts={"a": "b"})) == hash(Pooling(prompts={"a": "b"}))
    with pytest.raises(ValueError, match="pooling mode 'last': expected one of mean, cls, max"):
        Pooling(mode="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize None: expected true or false"):
        Pooling(normalize=None)  # type: ignore[arg-type]


# pool

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]], [[-3.0, 4.0], [7.0, 7.0], [8.0, 8.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    "mode, want", [("mean", [[2, -3], [-3, 4]]), ("cls", [[1, -4], [-3, 4]]), ("max", [[3, -2], [-3, 4]])]
)
def test_pool_by_hand(mode: Any, want: list[list[float]]) -> None:
    assert pool(HIDDEN, MASK, Pooling(mode=mode)).tolist() == want
    unit = pool(HIDDEN, MASK, Pooling(mode=mode, normalize=True))
    assert unit[1].tolist() == pytest.approx([-0.6, 0.8])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_padding_has_no_effect(mode: Any, normalize: bool) -> None:
    """On either side, in its middle, and not even where it holds NaN; in the gradient neither."""
    pooling = Pooling(mode=mode, normalize=normalize)
    real = torch.randn(2, 3, 5, generator=torch.manual_seed(0))
    want = pool(real, torch.ones(2, 3), pooling)
    for places in ([0, 1, 2], [3, 4, 5], [1, 3, 4]):
        padded = torch.full((2, 6, 5), torch.nan)
        padded[0, 5] = torch.inf
        padded[:, places] = real
        mask = torch.zeros(2, 6, dtype=torch.long)
        mask[:, places] = 1
        padded.requires_grad_()
        for kind in (mask, mask.bool(), mask.float()):
            torch.testing.assert_close(pool(padded, kind, pooling), want, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(pool(padded, mask, pooling).square().sum() + padded[:, places].sum(), padded)
        assert grad.isfinite().all() and not grad[mask == 0].any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_rows_without_tokens_give_zeros(mode: Any, normalize: bool) -> None:
    pooling = Pooling(mode=mode, normalize=normalize)
    hidden = HIDDEN.clone().requires_grad_()
    found = pool(hidden, torch.tensor([[0, 0, 0], [0, 1, 0]]), pooling)
    found.sum().backward()
    assert found[0].tolist() == [0, 0] and found[1].any()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and not hidden.grad[0].any()
    assert pool(torch.zeros(2, 0, 4), torch.zeros(2, 0), pooling).tolist() == [[0] * 4] * 2
    assert pool(torch.zeros(0, 3, 4), torch.zeros(0, 3), pooling).shape == (0, 4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_gradients(mode: Any, normalize: bool) -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(1), requires_grad=True)
    pooling = Pooling(mode=mode, normalize=normalize)
    assert torch.autograd.gradcheck(lambda h: pool(h, MASK, pooling), hidden)


def test_pool_adds_in_fp32() -> None:
    """4097 ones: in bfloat16 their number is 4096."""
    hidden = torch.ones(1, 4097, 1, dtype=torch.bfloat16)
    found = pool(hidden, torch.ones(1, 4097), Pooling())
    assert found.dtype == torch.float32 and found.item() == 1


@pytest.mark.parametrize("shape, mask", [((2, 3), (2, 3)), ((2, 3, 4), (2, 4)), ((2, 3, 4), (1, 3)), ((2, 3, 4), (3,))])
def test_pool_refuses_shapes_that_would_broadcast(shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden states .*: expected \[batch, length, width\] and \[batch, length\]"):
        pool(torch.zeros(shape), torch.ones(mask), Pooling())
