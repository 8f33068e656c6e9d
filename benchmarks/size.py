"""How large is the file? bart-base with random weights, packed, measured with `stat`.

    python benchmarks/size.py [--out results/size.json]

Random weights, because size does not depend on training. Positions, norms and biases are stored in fp16, scales in
fp32. Each row has the limit that was promised for it; the exit code is 1 if one is broken. Last line: JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration

from dqbart.packed.checkpoint import save_packed, size_table
from dqbart.quant.layers import prepare
from dqbart.recipe import Layers
from dqbart.student.depth import make_student

MIB = 2**20
BART_BASE: dict[str, Any] = dict(
    d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
    encoder_ffn_dim=3072, decoder_ffn_dim=3072,
)  # fmt: skip
# bits, layers, storage -> MiB promised
CASES = [
    ("8-8-8", "6-6", "planar32", 136.0),
    ("2-2-8", "6-6", "planar32", 37.5),
    ("2-2-8", "6-6", "trits", 31.0),
    ("2-2-8", "6-3", "planar32", 30.5),
    ("2-2-8", "6-3", "trits", 25.3),
    ("2-2-8", "3-1", "planar32", 20.7),
    ("2-2-8", "3-1", "trits", 17.4),
    ("1-1-8", "6-6", "planar32", 21.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = BartForConditionalGeneration(BartConfig(**BART_BASE))
    teacher_bytes = 4 * (sum(p.numel() for p in teacher.parameters()) + teacher.final_logits_bias.numel())
    print(f"bart-base, fp32: {teacher_bytes / MIB:.2f} MiB\n")
    print("| bits | layers | storage | file, MiB | promised | teacher fp32 / file |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for bits, layers, storage, limit in CASES:
        student = prepare(make_student(teacher, Layers(layers)), bits)
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_packed(student, Path(scratch) / "packed", storage=storage)
            size = (folder / "model.safetensors").stat().st_size
            groups = dict(size_table(folder))
        rows.append(dict(bits=bits, layers=layers, storage=storage, bytes=size, limit_mib=limit, groups=groups))
        cells = [bits, layers, storage, f"{size / MIB:.2f}", limit, f"{teacher_bytes / size:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    broken = [row for row in rows if row["bytes"] > row["limit_mib"] * MIB]
    if args.out:
        args.out.write_text(json.dumps({"teacher_bytes": teacher_bytes, "rows": rows}, indent=1) + "\n")
    print(json.dumps({"cases": len(rows), "over_the_limit": len(broken)}))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
