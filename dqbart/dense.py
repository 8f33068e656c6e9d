"""The way out: an ordinary transformers checkpoint of a packed folder, for whatever reads such and not dqbart.

Matrices become codes times scales, so a file of full size again; everything else stays as it was stored. Activations
and attention are quantized by our engines, not by the file, so what others compute from it is close and not the same.
CTranslate2 and onnxruntime are one step further, by their own converters. Rejected: their formats written from here.
Each wants versions that exclude the other's, and would make its own int8 of the float values in any case.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dqbart.pipeline import ELASTIC

DTYPES = ("float32", "float16", "bfloat16")
# What speaks of the packed model, and DynaBERT's float network. The rest is copied: tokenizer, generation, pooling.
_LEFT = (".*", "*.safetensors", "*.safetensors.index.json", "recipe.yaml", "report.json", "README.md", ELASTIC)


def export(folder: str | Path, *, output: str | Path, dtype: str = "float32") -> Path:
    """Write what a packed folder holds as a float checkpoint, its tokenizer and settings beside it; returns `output`.

    `dtype`: of all its tensors, one of `DTYPES`; fp32 holds codes times scales exactly. A folder of sentence embeddings
    stays one that sentence-transformers reads. Raises `FileNotFoundError`, `FileExistsError` or `ValueError`, one line,
    for whatever doesn't fit.
    """
    import torch

    from dqbart.engines import load_model
    from dqbart.packed.plain import is_plain, write_float
    from dqbart.quant.narrow import FIELD

    folder, output = Path(folder), Path(os.path.abspath(output))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: exists and is not empty; choose another --out")
    if folder.is_dir() and is_plain(folder):
        raise ValueError(f"{folder}: is a float checkpoint (bits 32-32-32); use it as it is")
    model: Any = load_model(folder, engine="torch")
    if (kept := getattr(model.config, FIELD, None)) is not None:
        raise ValueError(
            f"{folder}: {kept} of {model.config.num_attention_heads} heads a layer, which transformers' own "
            "classes have no setting for; only dqbart.load reads such a sub-network"
        )
    dense = model.dequantize(dtype=getattr(torch, dtype))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        staged = Path(scratch) / output.name
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(*_LEFT))
        write_float(dense, staged)
        if output.exists():
            output.rmdir()
        os.replace(staged, output)
    return output
