"""How large is the file? Models at the bits of DQ-BART's and TBT's tables, and ours: packed, measured with `stat`.

    python benchmarks/size.py [--quick] [--models bart-base ...] [--ct2-python PATH] [--ort-python PATH]

Problem: papers give sizes by formula, users find files of the old size. Method: pack a model of that shape and look at
its files. Size doesn't depend on values, so every matrix repeats one random row, and takes no memory. Beside it stand

    A        QuantBART's and TBT's formula: matrices and vocabulary at their bits, all else fp32, no scales
    B        DQ-BART's: biases of linear layers at the matrices' bits too, final_logits_bias dropped
    float    what `save_pretrained` writes in fp32 and fp16: computed, header included, exact (a test compares)
    peers    CTranslate2 int8 and onnxruntime int8: their weight files, made here where their Python is given

Neither formula counts lm_head, which both papers' code leaves in fp32; ours is in the file, as codes. Activation bits
change no size, so TBT's 2-2-2 and 1-1-1 are the rows of 2-2-8 and 1-1-8. Encoders are the bare model with its pooler
(left in fp32). Rejected: adding up measured layers, which saves a minute and is no measurement.

Exit code 1 if a row is over the limit promised for it. --quick measures those rows only. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger import RESULTS, Ledger, markdown, resumable

MIB = 2**20
KEYS = ("model", "layers", "bits", "format")


@dataclass(frozen=True)
class Shape:
    """A class of transformers, what its config changes of the defaults, and the depths to measure (full first)."""

    architecture: str
    config: dict[str, Any]
    depths: tuple[str, ...]


BASE_DEPTHS = ("6-6", "6-3", "6-1", "3-3", "3-1", "1-1")
LARGE_DEPTHS = ("12-12", "12-6", "12-3", "6-6", "6-3", "3-1")
MODELS = {
    "bart-base": Shape(
        "BartForConditionalGeneration",
        dict(d_model=768, encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072,
             decoder_ffn_dim=3072), BASE_DEPTHS),
    "MiniLM-L12-H384": Shape("BertModel", dict(hidden_size=384, intermediate_size=1536), ("12", "6", "3")),
    "MiniLM-L6-H384": Shape("BertModel", dict(hidden_size=384, intermediate_size=1536), ("6",)),
    "TinyBERT-4": Shape("BertModel", dict(hidden_size=312, intermediate_size=1200), ("4",)),
    "TinyBERT-6": Shape("BertModel", {}, ("6",)),
    "distilbert-base": Shape("DistilBertModel", {}, ("6",)),
    "albert-base": Shape(
        "AlbertModel", dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072), ("12",)),
    "bert-base": Shape("BertModel", {}, ("12", "6", "3")),
    "xlm-roberta-base": Shape(
        "XLMRobertaModel", dict(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1), ("12", "6", "3")),
    "bart-large": Shape("BartForConditionalGeneration", {}, LARGE_DEPTHS),
    "mbart-large-cc25": Shape("MBartForConditionalGeneration", dict(vocab_size=250_027), LARGE_DEPTHS),
}  # fmt: skip
FORMATS = [
    ("8-8-8", "planar32"), ("4-4-8", "planar32"), ("2-4-8", "planar32"), ("2-4-8", "trits"), ("2-2-8", "planar32"),
    ("2-2-8", "trits"), ("1-1-8", "planar32"),
]  # fmt: skip
PROMISED = {  # MiB, of bart-base
    ("6-6", "8-8-8", "planar32"): 136.0,
    ("6-6", "2-2-8", "planar32"): 37.5,
    ("6-6", "2-2-8", "trits"): 31.0,
    ("6-3", "2-2-8", "planar32"): 30.5,
    ("6-3", "2-2-8", "trits"): 25.3,
    ("3-1", "2-2-8", "planar32"): 20.7,
    ("3-1", "2-2-8", "trits"): 17.4,
    ("6-6", "1-1-8", "planar32"): 21.0,
}
GROUPS = ("linear codes", "embedding codes", "scales", "position", "bias", "norm", "other floats", "header")
CT2, ORT = "ctranslate2 int8", "onnxruntime int8"
UNREADABLE = {("albert-base", CT2): "CTranslate2 has no ALBERT"}
FLOATS = {"transformers fp32": ("32-32-32", "F32"), "transformers fp16": ("16-16-32", "F16")}


def build(name: str, layers: str, *, real: bool = False) -> Any:
    """The model `name` with `layers`, on the meta device, or with its usual random values where `real`."""
    import torch
    import transformers

    shape = MODELS[name]
    cls = getattr(transformers, shape.architecture)
    counts = [int(count) for count in layers.split("-")]
    fields = ("encoder_layers", "decoder_layers") if len(counts) == 2 else ("num_hidden_layers",)
    config = cls.config_class(**shape.config, **dict(zip(fields, counts, strict=True)))
    with torch.device("cpu" if real else "meta"):
        model = cls(config)
    model.tie_weights()
    return model


def fill(model: Any) -> Any:
    """Give a model on the meta device values that take no memory: one random row, repeated."""
    import torch

    torch.manual_seed(0)
    state = {name: torch.randn(t.shape[-1]).expand(t.shape) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def formulas(model: Any, bits: str) -> tuple[int, int]:
    """Bytes by conventions A and B."""
    from torch import nn

    from dqbart.notation import Bits

    wanted, vocabulary = Bits(bits), model.get_input_embeddings().weight
    a = b = 0
    seen: set[int] = set()
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            here = there = 32
            if parameter is vocabulary:
                here = there = wanted.embeddings
            elif isinstance(module, nn.Linear):
                here, there = (wanted.weights if leaf == "weight" else 32), wanted.weights
            a += parameter.numel() * here
            b += parameter.numel() * there
    logits_bias = getattr(model, "final_logits_bias", None)
    return (a + (32 * logits_bias.numel() if logits_bias is not None else 0)) // 8, b // 8


def transformers_bytes(model: Any, dtype: str) -> int:
    """Size of the one safetensors file that `save_pretrained` writes with all floats in `dtype` (F32 or F16)."""
    width, position = {"F32": 4, "F16": 2}[dtype], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in sorted(model.state_dict().items()):
        if name not in model.all_tied_weights_keys:
            end = position + width * tensor.numel()
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
            position = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + position


def measure(name: str, layers: str, bits: str, format: str, prepared: Any) -> dict[str, Any]:
    """Pack a prepared model and weigh its files. One row."""
    from dqbart.packed.checkpoint import save_packed, size_table

    with tempfile.TemporaryDirectory() as scratch:
        folder = save_packed(prepared, Path(scratch) / "packed", storage=format)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        groups = dict(size_table(folder))
    a, b = formulas(build(name, layers), bits)
    promised = PROMISED.get((layers, bits, format)) if name == "bart-base" else None
    row = dict(model=name, layers=layers, bits=bits, format=format, how="measured", bytes=size, promised_mib=promised)
    return row | {"formula_a": a, "formula_b": b} | {group: groups.get(group, 0) for group in GROUPS}


def measure_depth(name: str, layers: str, formats: Iterable[tuple[str, str]]) -> Iterable[dict[str, Any]]:
    """Rows of one model and depth; the model is quantized once per bits."""
    from dqbart.quant.layers import prepare

    prepared: tuple[str, Any] = ("", None)
    for bits, format in formats:
        if prepared[0] != bits:
            prepared = bits, None  # the old one goes before the new one comes
            prepared = bits, prepare(fill(build(name, layers)), bits)
        yield measure(name, layers, bits, format, prepared[1])


def float_rows(name: str, layers: str) -> Iterable[dict[str, Any]]:
    model = build(name, layers)
    for format, (bits, dtype) in FLOATS.items():
        size = transformers_bytes(model, dtype)
        parameters = sum(p.numel() for p in model.parameters())
        row = dict(model=name, layers=layers, bits=bits, format=format, how="computed", bytes=size)
        yield row | {"parameters": parameters}


def save_dense(name: str, folder: Path) -> None:
    """The full-depth model as transformers saves it, with a tokenizer of as many words as it has rows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = build(name, MODELS[name].depths[0], real=True)
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(model.config.vocab_size - 4))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    file = folder / "config.json"
    dropped = {"normalize_before": model.config.model_type == "mbart", "position_embedding_type": "absolute"}
    file.write_text(json.dumps(json.loads(file.read_text()) | dropped))  # by transformers 5, CTranslate2 asks for them


def run(*command: str | Path) -> str:
    """What a converter prints. Raises `ValueError` if it isn't there, or with its last line if it fails."""
    if not Path(command[0]).is_file():
        raise ValueError(f"{command[0]}: no such file; expected the Python of an environment with the converter in it")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{' '.join(map(str, command[:2]))}: ended with {done.returncode}: {last}")
    return done.stdout


def ct2_bytes(python: Path, dense: Path, scratch: Path) -> int:
    """CTranslate2's model.bin."""
    run(python.parent / "ct2-transformers-converter", "--model", dense, "--output_dir", scratch / "ct2",
        "--quantization", "int8", "--force")  # fmt: skip
    return (scratch / "ct2" / "model.bin").stat().st_size


def ort_bytes(python: Path, dense: Path, scratch: Path) -> int:
    """The graphs that optimum runs after export and dynamic quantization, with the weights they hold."""
    seq2seq = (dense / "generation_config.json").exists()
    task = "text2text-generation-with-past" if seq2seq else "feature-extraction"
    optimum, onnx, int8 = python.parent / "optimum-cli", scratch / "onnx", scratch / "int8"
    run(optimum, "export", "onnx", "--model", dense, "--task", task, "--no-post-process", onnx)
    run(optimum, "onnxruntime", "quantize", "--onnx_model", onnx, "--avx512_vnni", "--per_channel", "-o", int8)
    return sum(file.stat().st_size for file in int8.glob("*.onnx*"))


PEERS: dict[str, tuple[Callable[[Path, Path, Path], int], tuple[str, ...]]] = {
    CT2: (ct2_bytes, ("ctranslate2", "transformers")),
    ORT: (ort_bytes, ("onnxruntime", "optimum-onnx", "transformers")),
}


def peer_row(name: str, format: str, python: Path) -> dict[str, Any]:
    """One row: what a peer makes of the full-depth model, with the versions that it took."""
    weigh, packages = PEERS[format]
    ask = f"from importlib.metadata import version; print(*(f'{{p}} {{version(p)}}' for p in {packages}), sep=', ')"
    versions = run(python, "-c", ask).strip()
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        save_dense(name, dense)
        size = weigh(python, dense, Path(scratch))
    row = dict(model=name, layers=MODELS[name].depths[0], bits="8-8-8", format=format, how="measured", bytes=size)
    return row | {"versions": versions}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: peers, then all files of each model, then what is in them."""
    found = {tuple(row[key] for key in KEYS): row for row in rows}
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    parts = ["Full depth, MiB. The float files are computed to the byte, all others measured.\n", _peers(found, names)]
    for name in names:
        fp32 = found[name, MODELS[name].depths[0], "32-32-32", "transformers fp32"]
        title = f"{name}: {fp32['parameters']:,} parameters, {_mib(fp32)} MiB in fp32"
        parts += [f"\n<details><summary>{title}</summary>\n", _files(found, name, fp32["bytes"]), "\n</details>"]
    parts += ["\nBytes by group, full depth, planar32:\n", _groups(found, names)]
    return "\n".join(parts)


def _mib(row: dict[str, Any] | None, full: int | None = None) -> str | None:
    if row is None:
        return None
    return f"{row['bytes'] / MIB:.1f}" + (f" ({full / row['bytes']:.1f} x)" if full else "")


def _peers(found: dict[tuple[Any, ...], dict[str, Any]], names: list[str]) -> str:
    lines = []
    for name in names:
        depth = MODELS[name].depths[0]
        floats = [found.get((name, depth, bits, kind)) for kind, (bits, _) in FLOATS.items()]
        line = [name, depth, floats[0] and f"{floats[0]['parameters'] / 1e6:.1f} M", *map(_mib, floats)]
        for kind, option in ((CT2, "--ct2-python PATH"), (ORT, "--ort-python PATH")):
            missing = UNREADABLE.get((name, kind)) or f"not measured: `size.py --models {name} {option}`"
            line.append(_mib(found.get((name, depth, "8-8-8", kind))) or missing)
        for bits, format in (("8-8-8", "planar32"), ("2-2-8", "planar32"), ("2-2-8", "trits")):
            line.append(_mib(found.get((name, depth, bits, format))))
        lines.append(line)
    header = ["model", "layers", "parameters", *FLOATS, CT2, ORT, "dqbart 8-8-8", "2-2-8", "2-2-8 trits"]
    return markdown(header, lines)


def _files(found: dict[tuple[Any, ...], dict[str, Any]], name: str, full: int) -> str:
    lines = []
    for layers in MODELS[name].depths:
        for bits in dict.fromkeys(bits for bits, _ in FORMATS):
            pair = [found.get((name, layers, bits, format)) for format in ("planar32", "trits")]
            if pair[0] is None:
                continue
            limits = [f"{row['promised_mib']:g}" for row in pair if row and row["promised_mib"]]
            a, b = (f"{pair[0][key] / MIB:.2f}" for key in ("formula_a", "formula_b"))
            lines.append([layers, bits, a, b, *(_mib(row, full) for row in pair), " / ".join(limits)])
    return markdown(["layers", "bits", "formula A", "formula B", "file", "file, trits", "promised"], lines)


def _groups(found: dict[tuple[Any, ...], dict[str, Any]], names: list[str]) -> str:
    lines = []
    for name in names:
        for bits in dict.fromkeys(bits for bits, _ in FORMATS):
            row = found.get((name, MODELS[name].depths[0], bits, "planar32"))
            if row:
                lines.append([name, bits, *(f"{row[group]:,}" for group in GROUPS), f"{row['bytes']:,}"])
    return markdown(["model", "bits", *GROUPS, "file"], lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="only the rows with a promise, and no file unless --out")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file, too")
    parser.add_argument("--out", type=Path, help="ledger to fill, default results/size.json")
    parser.add_argument("--ct2-python", type=Path, metavar="PATH", help="Python that has ctranslate2 and transformers")
    parser.add_argument("--ort-python", type=Path, metavar="PATH", help="Python that has optimum-onnx")
    return parser.parse_args()


def fill_ledger(ledger: Ledger, args: argparse.Namespace) -> None:
    """Measure what is missing, small models first."""
    start = time.monotonic()

    def add(row: dict[str, Any]) -> None:
        ledger.add(row)
        words = [row[key] for key in KEYS]
        print(f"{time.monotonic() - start:6.0f} s  {' '.join(words)}: {_mib(row)} MiB", file=sys.stderr)

    def missing(*key: str) -> bool:
        return args.again or ledger.find(**dict(zip(KEYS, key, strict=True))) is None

    names = ["bart-base"] if args.quick else [name for name in MODELS if name in args.models]
    for name in names:
        for layers in MODELS[name].depths:
            wanted = [
                (bits, format) for bits, format in FORMATS
                if missing(name, layers, bits, format) and (not args.quick or (layers, bits, format) in PROMISED)
            ]  # fmt: skip
            for row in float_rows(name, layers):
                if missing(*(row[key] for key in KEYS)):
                    add(row)
            for row in measure_depth(name, layers, wanted):
                add(row)
        for format, python in ((CT2, args.ct2_python), (ORT, args.ort_python)):
            if python and (name, format) not in UNREADABLE and missing(name, MODELS[name].depths[0], "8-8-8", format):
                add(peer_row(name, format, python))


@resumable
def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "size.json", KEYS)
        fill_ledger(ledger, args)
    print(table(ledger.rows))
    broken = [row for row in ledger.rows if row.get("promised_mib") and row["bytes"] > row["promised_mib"] * MIB]
    for row in broken:
        words = " ".join(row[key] for key in KEYS)
        print(f"{words}: {row['bytes'] / MIB:.2f} MiB, promised {row['promised_mib']}", file=sys.stderr)
    print(json.dumps({"rows": len(ledger.rows), "over_the_limit": len(broken)}))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
