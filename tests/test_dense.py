"""Packed folders as ordinary checkpoints: the same values, the same files beside them, and what can't be one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sentence import TEXTS
from test_sentence import packed as packed_sentence
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

import dqbart
from dqbart.cli import main
from dqbart.engines.sentence import SentenceEncoder
from dqbart.packed.plain import save_plain
from dqbart.packed.sentence import Pooling


@pytest.fixture(scope="module")
def packed(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "small"
    return dqbart.compress(teacher_folder, recipe=dqbart.Recipe(bits="2-4-8", epochs=0), output=folder).folder


def test_a_translation_model(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command line, and read back by transformers alone."""
    assert main(["export", str(packed), "--out", str(tmp_path / "dense")]) == 0
    said = capsys.readouterr().out.splitlines()
    answer = json.loads(said[-1])
    assert answer["file_bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size > 0
    assert "dqbart eval" in said[-2]
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    batch = tokenizer("the cat sees a dog", text_target="a dog", return_tensors="pt")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(packed).get_vocab()
    with torch.no_grad():
        expected = dqbart.load(packed, engine="torch").dequantize()(**batch).logits
        assert torch.equal(dense(**batch).logits, expected)
    ours, theirs = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (packed, tmp_path / "dense"))
    assert ours == theirs
    names = {file.name for file in (tmp_path / "dense").iterdir()}
    assert names == {file.name for file in packed.iterdir()} - {"recipe.yaml", "report.json", "README.md"}
    assert not list(tmp_path.glob(".*"))
    assert len({(tmp_path / "dense" / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1


def test_half_precision(packed: Path, tmp_path: Path) -> None:
    dense = AutoModelForSeq2SeqLM.from_pretrained(dqbart.export(packed, output=tmp_path / "dense", dtype="float16"))
    assert {p.dtype for p in dense.parameters()} == {torch.float16}
    whole = dqbart.load(packed, engine="torch").dequantize()
    for name, tensor in whole.named_parameters():
        assert torch.equal(dense.get_parameter(name), tensor.half()), name


def test_sentence_embeddings_stay_such(tmp_path: Path) -> None:
    folder = packed_sentence(tmp_path / "small", pooling=Pooling(mode="max", normalize=True, max_seq_length=5))
    dense = SentenceEncoder.open(dqbart.export(folder, output=tmp_path / "dense"))
    assert dense.pooling == dqbart.load(folder).pooling
    whole = AutoModel.from_pretrained(folder).dequantize()
    expected = SentenceEncoder(whole, dense.tokenizer, dense.pooling).encode(TEXTS)
    np.testing.assert_array_equal(dense.encode(TEXTS), expected)


def test_what_is_refused(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    with pytest.raises(ValueError, match=r"dtype 'int8': expected one of float32, float16, bfloat16"):
        dqbart.export(packed, output=out, dtype="int8")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        dqbart.export(tmp_path / "nowhere", output=out)
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another --out"):
        dqbart.export(packed, output=packed)
    plain = save_plain(dqbart.load(packed, engine="torch").dequantize(), tmp_path / "plain", recipe="bits: 32-32-32")
    with pytest.raises(ValueError, match=r"is a float checkpoint \(bits 32-32-32\); use it as it is"):
        dqbart.export(plain, output=out)
    assert not out.exists()
