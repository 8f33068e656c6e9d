"""The packed folder: what comes back is what was saved, and whatever is wrong with it is refused by name."""

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_packed_modules import logits, student
from tiny_models import tiny_seq2seq, token_batch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    GenerationConfig,
)

from dqbart.packed import checkpoint, hook, shards
from dqbart.packed.checkpoint import load_packed, save_packed, size_table
from dqbart.packed.layout import as_words, pack
from dqbart.packed.verify import verify
from dqbart.quant.layers import prepare

hook.install()
REPO = Path(__file__).parent.parent
BEAM = dict(num_beams=4, max_new_tokens=12, no_repeat_ngram_size=2, forced_bos_token_id=5)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = student("bart", "2-4-8")
    return model, save_packed(model, tmp_path_factory.mktemp("bart") / "small")


@pytest.fixture
def folder(bart: tuple[Any, Path], tmp_path: Path) -> Path:
    """A fresh copy of the packed BART, to be damaged."""
    return Path(shutil.copytree(bart[1], tmp_path / "small"))


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


# --- what is refused ---------------------------------------------------------------------------------------------


def refuses(folder: Path, words: str, error: type[Exception] = ValueError, via_transformers: bool = True) -> None:
    loaders: list[Callable[[Path], Any]] = [verify, load_packed] + ([auto] if via_transformers else [])
    for load in loaders:
        with pytest.raises(error, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value), caught.value


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], metadata: Any = None) -> None:
    """Change tensors and write them back with digests that fit: a file that lies consistently."""
    shard = shards.read_shard(folder / shards.SINGLE)
    tensors = {name: shards.read_tensor(info) for name, info in shard.tensors.items()}
    change(tensors)
    shards.write_shard(folder / shards.SINGLE, tensors, metadata or shards.metadata(tensors, 1))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_refuses_other_weight_formats(folder: Path) -> None:
    shutil.move(folder / shards.SINGLE, folder / "pytorch_model.bin")
    refuses(folder, "no model.safetensors and no model.safetensors.index.json", FileNotFoundError, False)
    with pytest.raises(ValueError, match="pytorch_model.bin: expected a .safetensors file"):
        auto(folder)


def test_refuses_folders_of_others(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_packed(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no config.json in it"):
        verify(tmp_path)
    tiny_seq2seq().save_pretrained(tmp_path / "float")
    for load in (verify, load_packed, size_table):
        with pytest.raises(ValueError, match="quant_method None: expected 'dqbart'"):
            load(tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_packed(tmp_path / "float")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", 2, "format_version 2: expected 1"),
        ("format_version", True, "format_version True: expected 1"),
        ("numerics", "exact", "numerics 'exact': expected 'integer' or 'paper'"),
        ("activation_bits", 4, "activation_bits 4: expected 8 or 32"),
        ("probability_bits", "8", "probability_bits '8': expected 8 or 32"),
        ("float_dtype", "float8", "float_dtype 'float8': expected 'float16' or"),
        ("modules", [], r"modules \[\]: expected an object"),
        ("sparsity", 0.5, "unknown field 'sparsity'"),
    ],
)
def test_refuses_unknown_settings(folder: Path, field: str, value: Any, words: str) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update({field: value}))
    refuses(folder, f"config.json: quantization_config: {words}")


@pytest.mark.parametrize(
    ("module", "field", "value", "words"),
    [
        ("model.shared", "bits", 5, "bits 5: expected 8 or 4 or 3 or 2 or 1"),
        ("model.shared", "scheme", "float4", "scheme 'float4': expected 'symmetric'"),
        ("model.shared", "layout", "rows", "layout 'rows': expected 'planar32' or 'trits'"),
        ("model.shared", "layout", "trits", "layout 'trits' with bits 4"),
        ("model.shared", "granularity", "tensor", "granularity 'tensor': expected 'row'"),
        ("model.shared", "kind", "linear", "kind 'linear', but the model has BartScaledWordEmbedding"),
        ("model.shared", "shape", [120], r"shape \[120\]: expected two integers"),
        ("model.shared", "shape", [120, -32], r"shape \[120, -32\]: expected two integers"),
        ("model.shared", "shape", [120, 10**12], "expected two integers from 1 to"),
        ("model.shared", "zero_point", 3, "unknown field 'zero_point'"),
        ("lm_head", "tied_to", "model.elsewhere", "tied_to 'model.elsewhere', which stores no matrix like it"),
        ("lm_head", "tied_to", "lm_head", "tied_to 'lm_head', which stores no matrix like it"),
        ("lm_head", "bits", 8, "tied_to 'model.shared', which stores no matrix like it"),
        ("lm_head", "tied_to", 7, "tied_to 7: expected a module name"),
        ("model.encoder.layers.0.fc1", "shape", [48, 64], r"shape \[48, 64\], but the rest of config.json makes it"),
    ],
)
def test_refuses_unknown_module_settings(folder: Path, module: str, field: str, value: Any, words: str) -> None:
    edit_config(folder, lambda config: config["quantization_config"]["modules"][module].update({field: value}))
    refuses(folder, f"config.json: .*modules.{module}: .*{words}")


def test_refuses_modules_that_the_model_lacks(folder: Path) -> None:
    entry = {"kind": "linear", "bits": 2, "scheme": "ternary", "shape": [32, 32]}
    edit_config(folder, lambda c: c["quantization_config"]["modules"].update({"model.encoder.layers.9.fc1": entry}))
    refuses(folder, "modules.model.encoder.layers.9.fc1: BartForConditionalGeneration has no such module")


def test_refuses_another_vocabulary(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(vocab_size=121))
    refuses(
        folder, r"model.(shared|encoder.embed_tokens): shape \[120, 32\], but the rest of config.json makes it \[121"
    )


@pytest.mark.parametrize("change", [{"encoder_attention_heads": 0}, {"activation_function": "tanhh"}, {"d_model": "x"}])
def test_verify_refuses_a_config_that_builds_no_model(folder: Path, change: dict[str, Any]) -> None:
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match="config.json: ") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, [], ["pipeline"], ["os"], [3], "BartForConditionalGeneration"])
def test_refuses_unknown_architectures(folder: Path, names: Any) -> None:
    edit_config(folder, lambda config: config.update(architectures=names))
    refuses(folder, "architectures .*: expected one model class of transformers", via_transformers=False)


def test_refuses_a_config_without_digests_or_version(folder: Path) -> None:
    rewrite(folder, lambda tensors: None, {"format": "pt", "dqbart_format": "1"})
    refuses(folder, "no sha256 for each tensor")
    rewrite(folder, lambda tensors: None, {"format": "pt", "dqbart_format": "2"})
    refuses(folder, "dqbart_format '2': expected '1'")


FC1 = "model.encoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{FC1}.weight"), rf"tensor {FC1}.weight: missing, expected torch.int32 \[48, 8\]"),
        (lambda t: t.pop("final_logits_bias"), "tensor final_logits_bias: missing"),
        (lambda t: t.update(extra=torch.zeros(3)), "model.safetensors: tensor extra: the model has no such tensor"),
        (
            lambda t: t.update({f"{FC1}.weight": t[f"{FC1}.weight"][:-1].clone()}),
            rf"tensor {FC1}.weight: found torch.int32 \[47, 8\], expected torch.int32 \[48, 8\]",
        ),
        (
            lambda t: t.update({f"{FC1}.weight_scale": t[f"{FC1}.weight_scale"].half()}),
            rf"tensor {FC1}.weight_scale: found torch.float16 \[48, 1\], expected torch.float32",
        ),
        (
            lambda t: t.update({f"{FC1}.bias": t[f"{FC1}.bias"].float()}),
            rf"tensor {FC1}.bias: found torch.float32 \[48\], expected torch.float16",
        ),
        (lambda t: t[f"{FC1}.weight_scale"].fill_(float("nan")), rf"tensor {FC1}.weight_scale: scales that are"),
        (lambda t: t[f"{FC1}.weight_scale"][3].fill_(float("inf")), "scales that are negative, infinite or NaN"),
        (lambda t: t[f"{FC1}.weight_scale"][3].neg_(), "scales that are negative, infinite or NaN"),
        (lambda t: t[f"{FC1}.weight"][5, 0].fill_(-1), rf"tensor {FC1}.weight: row 5 holds non-zero padding bits"),
    ],
)
def test_refuses_files_that_do_not_fit(folder: Path, change: Any, words: str) -> None:
    rewrite(folder, change)
    refuses(folder, words)


def test_refuses_lookups_that_are_stored_twice(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.shared.weight"]}))
    refuses(folder, "tensor lm_head.weight: the model has no such tensor")


def test_verify_reads_every_code_and_float(folder: Path) -> None:
    bad = pack(torch.zeros(120, 32, dtype=torch.int8), 4)
    bad[7, 3] = 0x08  # -8
    rewrite(folder, lambda t: t.update({"model.shared.weight": as_words(bad)}))
    with pytest.raises(ValueError, match="tensor model.shared.weight: row 7 holds a code outside -7..7"):
        verify(folder)
    rewrite(folder, lambda t: t.update({"model.shared.weight": as_words(bad.zero_())}))
    rewrite(folder, lambda t: t[f"{FC1}.bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"tensor {FC1}.bias: infinite or NaN values"):
        verify(folder)


def sharded(bart: tuple[Any, Path], folder: Path) -> Path:
    return save_packed(bart[0], folder, max_shard_size="10KB")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, "x.bin"])
def test_refuses_shard_names_that_lead_elsewhere(bart: tuple[Any, Path], tmp_path: Path, name: Any) -> None:
    folder = sharded(bart, tmp_path / "small")
    index = json.loads((folder / shards.INDEX).read_text())
    index["weight_map"]["final_logits_bias"] = name
    (folder / shards.INDEX).write_text(json.dumps(index))
    refuses(folder, "shard name .*: expected the plain name of a .safetensors file", via_transformers=False)


def test_refuses_shards_of_two_folders(bart: tuple[Any, Path], tmp_path: Path) -> None:
    folder = sharded(bart, tmp_path / "small")
    index = json.loads((folder / shards.INDEX).read_text())
    name = index["weight_map"]["final_logits_bias"]
    shutil.move(folder / name, tmp_path / name)
    mapping = {k: f"../{v}" if v == name else v for k, v in index["weight_map"].items()}
    (folder / shards.INDEX).write_text(json.dumps(index | {"weight_map": mapping}))
    with pytest.raises(ValueError, match="outside the folder of the other shards"):
        auto(folder)


def test_refuses_duplicates_missing_shards_and_damaged_indexes(bart: tuple[Any, Path], tmp_path: Path) -> None:
    folder = sharded(bart, tmp_path / "small")
    files = shards.shard_files(folder)
    one, two = (shards.read_shard(file) for file in files[:2])
    name = next(iter(one.tensors))
    tensors = {n: shards.read_tensor(info) for n, info in two.tensors.items()}
    tensors[name] = shards.read_tensor(one.tensors[name])
    shards.write_shard(files[1], tensors, two.metadata)
    refuses(folder, f"tensor {name}: duplicate, it is in {files[0].name} too")
    files[1].unlink()
    refuses(folder, f"{files[1].name}: missing, though", FileNotFoundError, False)
    (folder / shards.INDEX).write_text("[]")
    refuses(folder, "index.json: damaged: expected a JSON object with 'weight_map'", via_transformers=False)


def test_refuses_a_truncated_file(folder: Path) -> None:
    file = folder / shards.SINGLE
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (0, 5, 8, header - 1, header, header + 1, len(content) - 1):
        file.write_bytes(content[:size])
        refuses(folder, "model.safetensors: truncated or damaged: ", via_transformers=size > header)
    file.write_bytes(content + b"\0")
    refuses(folder, f"truncated or damaged: {len(content) + 1} bytes, expected {len(content)}")


def test_refuses_any_flipped_bit(folder: Path) -> None:
    file = folder / shards.SINGLE
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [torch.randint(0, header, (25,), generator=generator), torch.arange(8)]
    places.append(torch.randint(header, len(content), (15,), generator=generator))
    for place in torch.cat(places).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors|tensor .*: missing"):
            verify(folder)
    damaged = bytearray(content)
    damaged[-1] ^= 4
    file.write_bytes(damaged)
    refuses(folder, r"tensor .*: sha256 [0-9a-f]{16}\.\.\., expected [0-9a-f]{16}\.\.\.; the file is damaged")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "expected an object, found list"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "'a' stands there twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "tensor a: damaged header entry"),
        (b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', "tensor a: damaged header entry"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "tensor a: damaged header entry"),
        (b'{"a":{"dtype":"F32","shape":[1099511627775,9999999],"data_offsets":[0,4]}}', "damaged header entry"),
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "tensor a: damaged header entry"),
        (b'{"a":3}', "tensor a: damaged header entry 3"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "tensor a: starts at byte"),
        (b'{"__metadata__":{"format":1}}', "__metadata__ is not text"),
        (b"\xff\xfe", "damaged header"),
        (b"{" * 5000, "damaged header"),
    ],
)
def test_refuses_crafted_headers(folder: Path, header: bytes, words: str) -> None:
    (folder / shards.SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refuses(folder, words, via_transformers=False)


def test_refuses_a_state_dict_and_quantizing_at_load(bart: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state_dict given at load"):
        BartForConditionalGeneration.from_pretrained(
            None, config=AutoConfig.from_pretrained(bart[1]), state_dict=bart[0].state_dict()
        )
    tiny_seq2seq().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'dqbart' given at load: make a packed folder with dqbart compress"):
        auto(tmp_path, quantization_config=load_packed(bart[1]).config.quantization_config)


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
