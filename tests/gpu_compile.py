"""Compiles every GPU kernel for the processors we name, without any of them, and prints what came out, a line of JSON
each. A script of its own: in a process where Triton interprets, nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from dqbart_kernels.gpu import (
    attention,
    attention_mse,
    head,
    history,
    one_shot,
    products,
    quantize,
    rows,
    rules,
    search,
    vocabulary,
    weight_only,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
FLOATS = dict.fromkeys(
    ("eps", "embed_scale", "scaling", "clip"), "fp32"
)  # arguments; the others are pointers and sizes
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, kernel, types of its pointers, constants, options of the launch."""
    for m in (4, 64, 1024):
        for bits in (8, 4, 2, 1) if m == 4 else (8, 2):
            tiles = products.choose_tiles(m, 3072, 768 * bits // 8, bits, 132)
            if m == 4 and bits == 2:
                tiles = products.Tiles(**vars(tiles) | {"splits": 3})
            pointers = dict(a="i8", a_scale="fp32", w="u8", w_scale="fp32", bias="fp32", residual="fp32", y="fp32")
            pointers |= dict(sums="i32", arrived="i32") if tiles.splits > 1 else {}
            constants = dict(
                BITS=bits, FIELD=products.FIELD[bits], BM=tiles.bm, BN=tiles.bn, BW=tiles.bw, SPLITS=tiles.splits,
                SWAP=tiles.swap, ACTIVATION=1 if m == 64 else 0, INTEGERS=False,
            )  # fmt: skip
            options = dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False)
            yield f"int8_matmul m {m} bits {bits}", products._int8_matmul, pointers, constants, options
    pointers = dict(x="fp32", weight="fp32", bias="fp32", h="fp32", codes="i8", scale="fp32")
    options = dict(num_warps=4, enable_fp_fusion=False)
    pointers_of_attention = dict(q="fp32", k="i8", k_scale="fp32", v="i8", v_scale="fp32", length="i32", out="fp32")
    for br, keys, warps in ((8, 1024, 8), (16, 512, 8), (8, 256, 8), (16, 256, 8), (64, 64, 4)):
        constants = dict(ONCE=br * keys == attention.AT_ONCE, BR=br, BS=keys, BD=64)
        some = dict(num_warps=warps, enable_fp_fusion=False)
        yield f"attend {br} {keys}", attention._attend, pointers_of_attention, constants, some
    pointers_of_history = dict(
        qkv="fp32", k="i8", v="i8", k_scale="fp32", v_scale="fp32", history="i32", step="i32", out="fp32"
    )
    for once in (True, False):
        constants = dict(ONCE=once, BT=128, BD=64)
        yield f"history {once}", history._attend_history, pointers_of_history, constants, options
    yield (
        "quantize_heads",
        attention._quantize_heads,
        dict(x="fp32", codes="i8", scale="fp32"),
        dict(TRANSPOSED=True, BS=32, BD=64),
        options,
    )
    yield (
        "tile_stats",
        head._tile_stats,
        dict(scores="fp32", peak="fp32", sum="fp32"),
        dict(TILE=512),
        dict(num_warps=4),
    )
    for k in (8, 16):
        constants = dict(NORMALIZE=True, TILES=k, BT=128, TILE=512)
        types = dict(scores="fp32", peak="fp32", sum="fp32", value="fp32", token="i32")
        yield f"top_tokens {k}", head._top_tokens, types, constants, dict(num_warps=8)
    types = dict(a="i8", a_scale="fp32", w="u8", w_scale="fp32", bias="fp32", peak="fp32", sum="fp32", logits="fp32")
    types |= dict(tile="i32", value="fp32", token="i32")
    for bm in (16, 64):
        constants = dict(BITS=2, FIELD=6, BM=bm, BN=128, BW=64, SWAP=bm > 16)
        some = dict(num_warps=4, num_stages=3, enable_fp_fusion=False)
        types |= dict(best="fp32", numbers="i32", step="i32", **{"class": "u8"}) if bm == 64 else {}
        yield f"vocabulary stats {bm}", vocabulary._vocabulary_stats, types, constants, some
    constants = dict(BITS=2, FIELD=6, BN=128, BW=64, BT=512)
    yield "vocabulary best_tiles", vocabulary._best_tiles, types, constants, some
    constants = dict(NORMALIZE=True, TILES=8, BT=512, BN=128)
    yield "vocabulary pick", vocabulary._pick, types, constants, dict(num_warps=8)
    ints = dict.fromkeys(("numbers", "step", "tokens", "history", "parents", "candidate", "done", "running"), "i32")
    types = dict(scores="fp32", peak="fp32", sum="fp32", value="fp32", penalty="fp32", **{"class": "u8"}, words="i32")
    constants = dict(NORMALIZE=True, BT=128, TILE=512)
    yield "rules apply_classes", rules._apply_classes, ints | types, constants, dict(num_warps=4)
    yield "rules look_back", rules._look_back, ints | types, dict(BT=256, BW=4), dict(num_warps=4)
    types |= dict(score="fp32", divisor="fp32", ended_score="fp32")
    ints |= dict.fromkeys(("ended", "improvable", "arrived", "strange"), "i32")
    constants = dict(BC=64, BN=4, BK=8, BT=64)
    yield "search advance_beams", search._advance_beams, ints | types, constants, dict(num_warps=4)
    yield "search advance_rows", search._advance_rows, ints | types, dict(BR=64), dict(num_warps=4)
    table = dict(id="i32", type="i32", step="i32", packed="u8", token_scale="fp32", types="fp32", positions="fp32")
    for bits in (8, 2):
        yield f"embed bits {bits}", rows._embed, table | pointers, dict(BITS=bits, BD=1024), options
    for bits, k, normed, bm, bn in (
        (8, 1024, True, 8, 8), (2, 768, True, 8, 8), (2, 4096, False, 8, 8), (1, 4096, False, 8, 8),
        (8, 1024, True, 4, 16), (2, 4096, False, 4, 16),
    ):  # fmt: skip
        constants = dict(
            BITS=bits, FIELD=products.FIELD[bits], BM=bm, BN=bn, BW=triton.next_power_of_2(k * bits // 8), ACTIVATION=0
        )
        types = dict(x="fp32", w="u8", w_scale="fp32", w_bias="fp32", residual="fp32", y="fp32")
        types |= dict(weight="fp32", bias="fp32", h="fp32") if normed else {}
        some = dict(num_warps=8, enable_fp_fusion=False)
        yield f"one_shot_matmul bits {bits} k {k} tile {bm} x {bn}", one_shot._one_shot_matmul, types, constants, some
    for bm, bn, warps in ((16, 16, 2), (128, 128, 8)):
        constants = dict(BITS=4, FIELD=4, BM=bm, BN=bn, BW=64, SWAP=bm > 16, ACTIVATION=0, KIND=1)
        types = dict(a="bf16", w="u8", w_scale="fp32", bias="fp32", residual="bf16", y="bf16")
        some = dict(num_warps=warps, num_stages=3)
        yield f"weight_only_matmul {bm}", weight_only._weight_only_matmul, types, constants, some
    yield "norm_and_quantize", rows._norm_and_quantize, pointers, dict(BD=1024), options
    for bits in (8, 4, 2, 1):
        for width, kind, clip in ((64, "fp32", {}), (1024, "bf16", {}), (8192, "fp32", {"clip": None})):
            name, result = ("fake", {"values": kind}) if width == 64 else ("codes", {"codes": "i8"})
            constants = dict(BITS=bits, QMAX=float(quantize.QMAX[bits]), BM=max(1, 2048 // width), BK=width, **clip)
            options = dict(num_warps=min(16, max(4, width // 512)), enable_fp_fusion=False)
            types = dict(x=kind, scale="fp32", **result)
            yield f"training {name} bits {bits} width {width}", quantize._quantize, types, constants, options
    for kind, causal in (("fp32", False), ("bf16", False), ("bf16", True)):
        types = dict.fromkeys(("q", "k", "teacher_q", "teacher_k", "gradient"), kind)
        types |= dict.fromkeys(("sum", "teacher_sum", "error", "delta", "factor"), "fp32")
        types |= dict(query_mask="u8", key_mask="u8")
        options = attention_mse.launch_options(torch.float32 if kind == "fp32" else torch.bfloat16, 64, hip=False)
        constants = dict(CAUSAL=causal, TILE=options.pop("TILE"), PRECISION=options.pop("PRECISION"), BD=64, BE=64)
        for kernel in (attention_mse._forward, attention_mse._backward_queries, attention_mse._backward_keys):
            name = f"maps{kernel.__name__} {kind}{' causal' * causal}"
            yield name, kernel, types, constants, options
    types = dict(grad="fp32", x="bf16", out="fp32")
    yield "training straight_through", quantize._straight_through, types, dict(BLOCK=1024), dict(num_warps=4)


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget, options: Any) -> Any:
    """Pointers and row lengths are multiples of 16, as they are in models; a pointer without a type is None."""
    names = kernel.arg_names
    types = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items() if f"{name}_ptr" in names}
    constants = constants | {name: None for name in names if name.endswith("_ptr") and name not in types}
    if "ASM" in names:
        constants = constants | {"ASM": target.backend == "cuda"}
    if "PRECISION" in constants and target.backend == "hip":
        constants = constants | {"PRECISION": "ieee"}
    signature = {name: "constexpr" if name in constants else types.get(name, FLOATS.get(name, "i32")) for name in names}
    whole = [["tt.divisibility", 16]]
    attributes = {(i,): whole for i, name in enumerate(names) if name not in constants and name not in ("M", *FLOATS)}
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values, attributes), target=target, options=options)


def facts(made: Any, target: GPUTarget) -> dict[str, Any]:
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"[sv]gpr_spill_count:\s*(\d+)", text)))
        return {"matrix": sorted(set(re.findall(r"v_mfma_\w+", text))), "spills": spills}
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    ptx = made.asm["ptx"]
    return {
        "matrix": sorted(set(re.findall(r"wgmma.mma_async|mma.sync", ptx))),
        "spills": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        "copies": ptx.count("cp.async.c"),  # global to shared memory, 16 bytes each, without waiting
        "fused": len(re.findall(r"\bFFMA\b", code)),
    }


if __name__ == "__main__":
    for target in sys.argv[1:] or TARGETS:
        for name, kernel, pointers, constants, options in kernels():
            made = build(kernel, pointers, constants, TARGETS[target], options)
            print(json.dumps({"kernel": name, "target": target, **facts(made, TARGETS[target])}), flush=True)
