"""The models that latency.py measures: real shapes, random weights, each system's form of them, made once.

Problem: trained weights are a download, and speed doesn't depend on them. Method: weights from a seed, in the shapes of
the real configs, with position embeddings ten times as heavy as words: otherwise a random model repeats its last word
whatever it reads, and equal ids of two systems prove nothing. transformers saves one fp32 folder; students of fewer
layers, packed models and the peers' own files are made from it, in a folder that is renamed when complete. Rejected:
making them anew in every run, which takes longer than measuring.
"""

import hashlib
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import ENVIRONMENTS, RUNNER, System, python_of, run

SEED, POSITION_WEIGHT = 0, 10.0


@dataclass(frozen=True)
class Shape:
    """A class of transformers, what its config changes of the defaults, and the axes' defaults (full depth first)."""

    architecture: str
    config: dict[str, Any]
    layers: tuple[str, ...]
    positions: int = 1024
    sources: tuple[int, ...] = (128, 512, 1024)
    batches: tuple[int, ...] = (1, 8, 32)

    @property
    def seq2seq(self) -> bool:
        return "-" in self.layers[0]


def _bart(width: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    stacks = {f"{stack}_{name}": value for stack in ("encoder", "decoder")
              for name, value in (("attention_heads", heads), ("ffn_dim", inner))}  # fmt: skip
    return dict(d_model=width, decoder_start_token_id=2, forced_eos_token_id=None) | stacks | more


BART, MBART = "BartForConditionalGeneration", "MBartForConditionalGeneration"
ENCODER = (512, (128,), (1, 32))  # positions, sources, batches
SHAPES = {
    "tiny": Shape(BART, _bart(64, 4, 128, vocab_size=512), ("2-2", "2-1"), sources=(16,), batches=(1, 2)),
    "tiny-mbart": Shape(MBART, _bart(64, 4, 128, vocab_size=512, scale_embedding=True), ("2-2",), 1024, (16,), (1, 2)),
    "tiny-bert": Shape(
        "BertModel", dict(hidden_size=48, intermediate_size=96, vocab_size=512), ("2",), 512, (16,), (1, 2)),
    "tiny-albert": Shape(
        "AlbertModel", dict(embedding_size=16, hidden_size=48, intermediate_size=96, num_attention_heads=4,
                            vocab_size=512), ("3",), 512, (16,), (1, 2)),
    "bart-base": Shape(BART, _bart(768, 12, 3072), ("6-6", "6-3", "3-1")),
    "bart-large": Shape(BART, _bart(1024, 16, 4096), ("12-12", "12-6", "12-3")),
    "mbart-large": Shape(
        MBART, _bart(1024, 16, 4096, vocab_size=250_027, scale_embedding=True), ("12-12", "12-6", "12-3")),
    "MiniLM-L12-H384": Shape("BertModel", dict(hidden_size=384, intermediate_size=1536), ("12",), *ENCODER),
    "MiniLM-L6-H384": Shape("BertModel", dict(hidden_size=384, intermediate_size=1536), ("6",), *ENCODER),
    "TinyBERT-4": Shape("BertModel", dict(hidden_size=312, intermediate_size=1200), ("4",), *ENCODER),
    "TinyBERT-6": Shape("BertModel", {}, ("6",), *ENCODER),
    "distilbert-base": Shape("DistilBertModel", {}, ("6",), *ENCODER),
    "albert-base": Shape(
        "AlbertModel", dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=30_000),
        ("12",), *ENCODER),
    "bert-base": Shape("BertModel", {}, ("12",), *ENCODER),
}  # fmt: skip


@dataclass
class Models:
    """Model folders under `root`, each made once, aside, and renamed when complete."""

    root: Path
    envs: Path

    def float(self, name: str, layers: str) -> Path:
        """The fp32 model as transformers saves it; raises `ValueError` for layers that don't fit."""
        shape = SHAPES[name]
        full = shape.layers[0]
        digest = _digest([shape.architecture, shape.config, full, SEED, POSITION_WEIGHT])
        folder = self.root / f"{name}-{digest}" / layers / "float"
        teacher = None if layers == full else self.float(name, full)
        return self._make(folder, lambda new: save_float(name, layers, teacher, new))

    def of(self, system: System, name: str, layers: str) -> Path:
        """The model in the form that `system` reads."""
        dense = self.float(name, layers)
        if system.conversion is None:
            return dense
        if system.environment is None:
            import dqbart
            from dqbart.packed.spec import FORMAT_VERSION

            digest = f"{dqbart.__version__}-format{FORMAT_VERSION}"
        else:
            digest = _digest(ENVIRONMENTS[system.environment].pins())
        command = [str(python_of(system.environment, self.envs)), str(RUNNER), system.library, system.conversion,
                   "--convert", str(dense), "--model"]  # fmt: skip
        folder = dense.with_name(f"{system.library}-{system.conversion}-{digest}")
        return self._make(folder, lambda new: run([*command, str(new)], HF_HUB_OFFLINE="1"))

    def _make(self, folder: Path, make: Callable[[Path], None]) -> Path:
        if folder.exists():
            return folder
        print(f"         making {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as aside:
            make(Path(aside) / "model")
            os.replace(Path(aside) / "model", folder)
        return folder


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def save_float(name: str, layers: str, teacher: Path | None, folder: Path) -> None:
    """Save the model with random weights, or the student of `teacher` with fewer layers, and a tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from dqbart.notation import Layers
    from dqbart.student.depth import make_student

    shape = SHAPES[name]
    cls = getattr(transformers, shape.architecture)
    if teacher:
        model = make_student(cls.from_pretrained(teacher), Layers(layers))
    else:
        torch.manual_seed(SEED)
        fields = ("encoder_layers", "decoder_layers") if shape.seq2seq else ("num_hidden_layers",)
        counts = dict(zip(fields, map(int, layers.split("-")), strict=True))
        model = cls(cls.config_class(**shape.config, **counts))
        weight = POSITION_WEIGHT * (
            math.sqrt(model.config.d_model) if getattr(model.config, "scale_embedding", 0) else 1
        )
        for module in model.modules():
            if "PositionalEmbedding" in type(module).__name__:
                module.weight.data *= weight
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(model.config.vocab_size - 4))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    dropped = dict(normalize_before="MBart" in shape.architecture, position_embedding_type="absolute")
    file = folder / "config.json"  # CTranslate2 asks for fields that transformers 5 dropped
    file.write_text(json.dumps(json.loads(file.read_text()) | dropped))


def inputs(name: str, source: int, batch: int) -> list[list[int]]:
    """Random ids in <s> ... </s>, the same on every machine: `batch` rows of `source`."""
    vocabulary = SHAPES[name].config.get("vocab_size", 30_522 if not SHAPES[name].seq2seq else 50_265)
    rng = random.Random(f"{SEED} {source} {batch}")
    return [[0, *(4 + int(rng.random() * (vocabulary - 4)) for _ in range(source - 2)), 2]
            for _ in range(batch)]  # fmt: skip
