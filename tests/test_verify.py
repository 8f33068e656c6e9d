"""Whatever is wrong with a packed folder is refused: the file, the tensor, what was found, what was expected."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_seq2seq
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BartForConditionalGeneration

from dqbart.packed import hook, shards
from dqbart.packed.checkpoint import load_packed, save_packed, size_table
from dqbart.packed.layout import as_words, pack
from dqbart.packed.verify import verify

hook.install()


def auto(folder: Path, **options: Any) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, **options)


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
        ("probability_bits", "8", "probability_bits '8': expected 8 or 16"),
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
    rewrite(folder, lambda tensors: None, {"format": "np", "dqbart_format": "1"})
    refuses(folder, "format 'np': expected 'pt'")


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


def test_a_late_duplicate_costs_no_more_than_the_header(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [*range(20_000), 19_999]
    text = ("{" + ",".join(f'"t{i}":{entry}' for i in names) + "}").encode()
    (tmp_path / shards.SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.process_time()
    json.loads(text)
    parsed = time.process_time()
    with pytest.raises(ValueError, match="'t19999' stands there twice"):
        shards.read_shard(tmp_path / shards.SINGLE)
    assert time.process_time() - parsed < 20 * (parsed - start)  # it was quadratic: hundreds of times


def test_refuses_a_state_dict_and_quantizing_at_load(bart: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state_dict given at load"):
        BartForConditionalGeneration.from_pretrained(
            None, config=AutoConfig.from_pretrained(bart[1]), state_dict=bart[0].state_dict()
        )
    tiny_seq2seq().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'dqbart' given at load: make a packed folder with dqbart compress"):
        auto(tmp_path, quantization_config=load_packed(bart[1]).config.quantization_config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("encoder_layers", 10**9, "encoder_layers 1000000000: expected a whole number from 0 to 1024"),
        ("decoder_layers", [], r"decoder_layers \[\]: expected a whole number"),
        ("decoder_attention_heads", -1, "decoder_attention_heads -1: expected a whole number from 1 to 1024"),
        ("is_encoder_decoder", False, "is_encoder_decoder False: not what BartForConditionalGeneration is"),
        ("model_type", "bert", "model_type 'bert': BartForConditionalGeneration expects 'bart'"),
        ("d_model", 2**40, "config.json: "),
        ("decoder_ffn_dim", -3, "config.json: "),
        ("d_model", 33, "config.json: embed_dim must be divisible by num_heads"),
        ("vocab_size", None, "config.json: "),
    ],
)
def test_refuses_configs_that_build_something_else(folder: Path, field: str, value: Any, words: str) -> None:
    edit_config(folder, lambda config: config.update({field: value}))
    refuses(folder, words, via_transformers=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "generation_config.json: not valid JSON"),
        ("[" * 100_000, "generation_config.json: JSON is nested too deeply"),
        ("[]", "generation_config.json: expected a JSON dict, found list"),
        ('{"decoder_start_token_id": 2147483648}', "decoder_start_token_id 2147483648: not a value that generate"),
        ('{"bad_words_ids": [[3], [-1]]}', "bad_words_ids"),
        ('{"num_beams": "4"}', "num_beams '4'"),
        ('{"num_beams": 0}', "num_beams 0: not a value that generate takes"),
        ('{"length_penalty": {}}', "length_penalty {}"),
        ('{"early_stopping": "soon"}', "early_stopping 'soon'"),
    ],
)
def test_refuses_a_damaged_generation_config(folder: Path, text: str, words: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_packed(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", "flash_attention_2", "sdpa", {"": "somebody/kernel"}, 7], ids=str)
def test_config_has_no_say_in_the_attention(folder: Path, key: str, value: Any) -> None:
    """It could name code on the hub, which transformers would load."""
    edit_config(folder, lambda config: config.update({key: value}))
    verify(folder)
    assert load_packed(folder).config._attn_implementation == "dqbart"
