"""The packed folder: what comes back is what was saved, and a save is all or nothing."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_packed_modules import logits, student
from tiny_models import tiny_seq2seq, token_batch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
)

from dqbart.packed import checkpoint, hook, shards
from dqbart.packed.checkpoint import load_packed, save_packed, size_table
from dqbart.packed.verify import verify
from dqbart.quant.layers import prepare

hook.install()
REPO = Path(__file__).parent.parent
BEAM = dict(num_beams=4, max_new_tokens=12, no_repeat_ngram_size=2, forced_bos_token_id=5)


def auto(folder: Path, **options: Any) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, **options)


# --- what comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bart", "mbart", "bert"])
@pytest.mark.parametrize("bits", ["2-2-8", "8-8-8", "1-3-8"])
def test_reloaded_logits_are_equal(kind: str, bits: str, tmp_path: Path) -> None:
    model = student(kind, bits)
    save_packed(model, tmp_path / "small")
    cls = AutoModelForMaskedLM if kind == "bert" else AutoModelForSeq2SeqLM
    for loaded in (load_packed(tmp_path / "small"), cls.from_pretrained(tmp_path / "small")):
        assert type(loaded) is type(model) and not loaded.training and loaded.dtype == torch.float32
        assert torch.equal(logits(loaded), logits(model))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_reloaded_model_generates_the_same(kind: str, tmp_path: Path) -> None:
    model = student(kind, "2-2-8")
    loaded = load_packed(save_packed(model, tmp_path / "small"))
    batch = token_batch([9, 3, 6])
    for options in (BEAM, dict(num_beams=1, max_new_tokens=12)):
        assert torch.equal(loaded.generate(**batch, **options), model.generate(**batch, **options))


def test_nothing_is_reported_at_load(bart: tuple[Any, Path], capfd: pytest.CaptureFixture[str]) -> None:
    _, info = auto(bart[1], output_loading_info=True)
    assert not any(info.values()), info
    output = capfd.readouterr()
    assert "MISSING" not in output.err + output.out and "UNEXPECTED" not in output.err + output.out


def test_trits_give_the_same_model_in_fewer_bytes(tmp_path: Path) -> None:
    model = student("bart", "2-2-8")
    planar = save_packed(model, tmp_path / "planar")
    trits = save_packed(model, tmp_path / "trits", storage="trits")
    assert (trits / shards.SINGLE).stat().st_size < (planar / shards.SINGLE).stat().st_size
    one, two = load_packed(planar), load_packed(trits)
    assert torch.equal(logits(one), logits(two))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    verify(trits)
    assert (save_packed(two, tmp_path / "again") / shards.SINGLE).read_bytes() == (trits / shards.SINGLE).read_bytes()
    save_packed(two, tmp_path / "back", storage="planar32")
    assert (tmp_path / "back" / shards.SINGLE).read_bytes() == (planar / shards.SINGLE).read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_second_save_gives_the_same_bytes(bart: tuple[Any, Path], tmp_path: Path, sharded: bool) -> None:
    size: Any = "10KB" if sharded else "5GB"
    first = save_packed(bart[0], tmp_path / "one", max_shard_size=size)
    second = save_packed(load_packed(first), tmp_path / "two", max_shard_size=size)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert (len(list(first.glob("*.safetensors"))) > 3) == sharded
    verify(second)


@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_transformers_own_save_gives_the_same_model(bart: tuple[Any, Path], tmp_path: Path, size: str) -> None:
    auto(bart[1]).save_pretrained(tmp_path / "again", max_shard_size=size)
    assert torch.equal(logits(auto(tmp_path / "again")), logits(bart[0]))
    verify(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (bart[1] / "config.json").read_bytes()


def test_bfloat16_and_device_maps(bart: tuple[Any, Path]) -> None:
    low = auto(bart[1], dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.model.shared.weight_scale.dtype == torch.float32
    assert torch.allclose(logits(low).float(), logits(bart[0]), atol=0.5)
    assert torch.equal(logits(low), logits(load_packed(bart[1]).to(torch.bfloat16)))
    for placement in ("cpu", "auto"):
        assert torch.equal(logits(auto(bart[1], device_map=placement)), logits(bart[0]))


def test_deepcopy_and_pickle(bart: tuple[Any, Path]) -> None:
    loaded = load_packed(bart[1])
    expected = logits(loaded)
    twin = copy.deepcopy(loaded)
    loaded.model.shared.weight.zero_()
    assert torch.equal(logits(twin), expected)


def test_body_of_a_saved_model_loads_alone(bart: tuple[Any, Path], tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(bart[1])
    batch = token_batch([5, 3])
    with torch.no_grad():
        expected = bart[0].model(**batch).last_hidden_state
        assert torch.equal(body(**batch).last_hidden_state, expected)
        body.save_pretrained(tmp_path / "body")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "body")(**batch).last_hidden_state, expected)


def test_dequantized_model_is_an_ordinary_one(bart: tuple[Any, Path], tmp_path: Path) -> None:
    dense = load_packed(bart[1]).dequantize()
    codes, scale = bart[0].model.shared.codes()
    assert torch.equal(dense.lm_head.weight, codes * scale)
    dense.save_pretrained(tmp_path / "dense")
    again = auto(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert again.lm_head.weight is again.model.shared.weight and again.config._attn_implementation != "dqbart"
    assert torch.equal(logits(again), logits(dense))
    again.resize_token_embeddings(130)


def test_float_head_is_stored_beside_a_packed_embedding(tmp_path: Path) -> None:
    model = student("bart", "2-2-8", numerics="paper", probability_bits=8)
    loaded = load_packed(save_packed(model, tmp_path / "small"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    verify(tmp_path / "small")
    assert loaded.dequantize().config.tie_word_embeddings is False


def test_float_storage(tmp_path: Path) -> None:
    model = student("bart", "32-2-8")
    half = save_packed(model, tmp_path / "half", matrix_dtype=torch.float16)
    full = save_packed(model, tmp_path / "full", float_dtype=torch.float32)
    with safe_open(half / shards.SINGLE, "pt") as file:
        assert file.get_tensor("model.encoder.layers.0.fc1.weight").dtype == torch.float16
    with safe_open(full / shards.SINGLE, "pt") as file:
        assert file.get_tensor("model.encoder.layers.0.fc1.bias").dtype == torch.float32
    assert torch.equal(logits(load_packed(full)), logits(model))
    assert load_packed(half).model.encoder.layers[0].fc1.weight.dtype == torch.float32


def test_what_is_written(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    generation = GenerationConfig(num_beams=3, decoder_start_token_id=2)
    folder = save_packed(
        student("mbart", "2-2-8"), tmp_path / "a" / "b", recipe="bits: 2-2-8\n", tokenizer=Tokenizer(),
        generation_config=generation,
    )  # fmt: skip
    names = {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"}
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["normalize_before"] is True and config["architectures"] == ["MBartForConditionalGeneration"]
    assert config["quantization_config"]["modules"]["lm_head"]["tied_to"] == "model.shared"
    assert load_packed(folder).generation_config.num_beams == 3
    assert os.stat(folder).st_mode & 0o777 == os.stat(tmp_path / "a").st_mode & 0o777


def test_sizes_add_up_to_the_file(bart: tuple[Any, Path], tmp_path: Path) -> None:
    sharded = save_packed(bart[0], tmp_path / "small", max_shard_size="10KB")
    for folder in (bart[1], sharded):
        table = dict(size_table(folder))
        assert sum(table.values()) == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert table["embedding codes"] == 120 * 32 and table["position"] == 2 * 66 * 32 * 2  # 32 codes pad to 64
        assert set(table) == {"linear codes", "embedding codes", "scales", "bias", "norm", "position", "header"}


# --- other processes ---------------------------------------------------------------------------------------------


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    paths = [str(REPO), str(REPO / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


LOAD = "AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]); print('loaded')"


def test_without_dqbart_transformers_refuses_the_folder(bart: tuple[Any, Path], tmp_path: Path) -> None:
    eight = save_packed(student("bart", "8-8-8"), tmp_path / "eight")
    code = (
        "import sys\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        AutoModelForSeq2SeqLM.from_pretrained(folder)\n"
        "    except RuntimeError as error:\n"
        "        print('refused', 'mismatch' in str(error))\n"
    )
    result = run(code, bart[1], eight)
    assert result.returncode == 0 and result.stdout == "refused True\nrefused True\n", result.stderr
    assert "Unknown quantization type, got dqbart" in result.stderr


@pytest.mark.parametrize("first", ["dqbart", "transformers"])
def test_either_may_be_imported_first(bart: tuple[Any, Path], first: str) -> None:
    ours = (
        "from dqbart.packed import hook; hook.install(); hook.install()\n"
        "assert 'transformers.quantizers.auto' in sys.modules or not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    theirs = "from transformers import AutoModelForSeq2SeqLM\n"
    code = ours + theirs if first == "dqbart" else theirs + "import transformers.modeling_utils\n" + ours
    check = "assert not any('dqbart' in type(f).__module__ for f in sys.meta_path)"
    result = run(f"import sys\n{code}{LOAD}\n{check}", bart[1])
    assert result.returncode == 0 and "loaded" in result.stdout, result.stderr


# --- a save that fails -------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(bart: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_packed(bart[0], bart[1])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="is no packed model, so it is not overwritten"):
        save_packed(bart[0], tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        save_packed(bart[0], tmp_path / "file", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years" and (tmp_path / "file").read_text() == "x"


def test_overwriting_replaces_the_folder(folder: Path) -> None:
    (folder / "report.json").write_text("of the old model")
    model = student("bart", "8-8-8")
    save_packed(model, folder, overwrite=True)
    assert torch.equal(logits(load_packed(folder)), logits(model)) and not (folder / "report.json").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["small"]


def test_a_link_is_written_where_it_points(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link, empty = tmp_path / "links" / "link", tmp_path / "links" / "to nothing"
    link.symlink_to(folder)
    empty.symlink_to(tmp_path / "new")
    model = student("bart", "8-8-8")
    assert save_packed(model, link, overwrite=True) == folder and save_packed(model, empty) == tmp_path / "new"
    assert link.is_symlink() and torch.equal(logits(load_packed(folder)), logits(load_packed(empty)))
    assert len(list(link.parent.iterdir())) == 2 and len(list(tmp_path.iterdir())) == 3


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("place", ["os.fsync", "os.replace", "tokenizer"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, exists: bool
) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{")
            if place == "tokenizer":
                raise Exception("No space left on device (os error 28)")

    if not exists:
        shutil.rmtree(folder)
    before = {p.name: p.read_bytes() for p in folder.glob("*")}
    if place == "os.replace":
        replace = os.replace

        def failing(source: Any, target: Any) -> None:
            no_space() if str(source).endswith(".partial") else replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
    elif place == "os.fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"small: could not be written \(.*No space left on device") as caught:
        save_packed(student("bart", "2-2-8"), folder, tokenizer=Tokenizer(), overwrite=True)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    assert [p.name for p in folder.parent.iterdir()] == (["small"] if exists else [])


@pytest.mark.parametrize("before", [True, False], ids=["before the new one", "after it"])
def test_ctrl_c_between_the_renames_leaves_one_whole_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    replace, old = os.replace, {p.name: p.read_bytes() for p in folder.iterdir()}

    def stopped(source: Any, target: Any) -> None:
        if not (before and str(source).endswith(".partial")):
            replace(source, target)
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_packed(student("bart", "8-8-8"), folder, overwrite=True)
    assert [p.name for p in folder.parent.iterdir()] == ["small"]
    assert ({p.name: p.read_bytes() for p in folder.iterdir()} == old) is before
    verify(folder)


def test_a_real_write_error_is_reported(tmp_path: Path) -> None:
    """The operating system's own refusal: files may have 20 kB at most."""
    resource = pytest.importorskip("resource")
    model = student("bart", "2-2-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"small: could not be written \(File too large\)"):
            save_packed(model, tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_header_is_read_by_the_safetensors_library(bart: tuple[Any, Path]) -> None:
    shard = shards.read_shard(bart[1] / shards.SINGLE)
    with safe_open(bart[1] / shards.SINGLE, "pt") as file:
        assert set(file.keys()) == set(shard.tensors) and file.metadata() == shard.metadata
        for name, info in shard.tensors.items():
            assert torch.equal(file.get_tensor(name), shards.read_tensor(info))
            assert info.begin % info.dtype.itemsize == 0


def test_a_prepared_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = student("bart", "2-2-8")
    before, config = logits(model), model.config.to_dict()
    save_packed(model, tmp_path / "small", storage="trits")
    assert torch.equal(logits(model), before) and model.config.to_dict() == config


def test_an_unprepared_model_is_stored_as_float(tmp_path: Path) -> None:
    model = tiny_seq2seq()
    prepare(model, "32-32-32")
    checkpoint.round_floats_(model, torch.float16)
    assert torch.equal(logits(load_packed(save_packed(model, tmp_path / "small"))), logits(model))
