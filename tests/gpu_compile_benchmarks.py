"""Compiles for sm_90 what only benchmarks launch: gate.py's kernels, and cuts that tune.py tries; prints a line of JSON
each. In a process of its own, as gpu_compile.py.
"""

import json
from collections.abc import Iterator
from typing import Any

import gate
import tune
from dqbart_kernels.gpu import products
from gpu_compile import TARGETS, build, facts

SEEN = ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global.gpu.acquire", "atom.global.gpu.acquire",
        "red.global.gpu.release", "atom.global.gpu.release")  # fmt: skip


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    numbers = {"from": "i32", "to": "i32", "numbers": "i32", "arrived": "i32"}
    for reload in (False, True):
        more = gate.sizes(132) | {"RELOAD": reload}
        options: dict[str, Any] = dict(num_warps=4)
        barriers = more | dict(PHASES=40, PROGRAMS=132)
        yield f"barriers {reload}", gate._barriers, numbers, barriers, options | dict(launch_cooperative_grid=True)
        for pdl in (False, True):
            launch = options | (dict(launch_pdl=True) if pdl else {})
            yield f"node {reload} pdl {pdl}", gate._node, numbers, more | dict(PDL=pdl), launch
    for m in (4, 1024):
        case = tune.Case(768, 768, 2, m)
        cuts = sorted(tune.candidates(case, 132)[1:], key=lambda t: t.stages * (t.bn * t.bw + 4 * t.bm * t.bw))
        for tiles in cuts[:: len(cuts) - 1]:  # the smallest, and what takes most shared memory
            pointers = dict(a="i8", a_scale="fp32", w="u8", w_scale="fp32", y="fp32", sums="i32", arrived="i32")
            constants = dict(
                BITS=2, FIELD=6, BM=tiles.bm, BN=tiles.bn, BW=tiles.bw, SPLITS=tiles.splits, SWAP=tiles.swap,
                ACTIVATION=0, INTEGERS=False,
            )  # fmt: skip
            options = dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False)
            yield f"tune m {m}", products._int8_matmul, pointers, constants, options


if __name__ == "__main__":
    for name, kernel, pointers, constants, options in kernels():
        made = build(kernel, pointers, constants, TARGETS["sm_90"], options)
        found = facts(made, TARGETS["sm_90"]) | {"seen": [word for word in SEEN if word in made.asm["ptx"]]}
        print(json.dumps({"kernel": name, "shared": made.metadata.shared, **found}), flush=True)
