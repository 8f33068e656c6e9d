"""What is installed, which engine would run, and why another one can't."""

import importlib.util
from typing import Any

EXTRAS = {
    "datasets": "pip install 'dqbart[hub]'",
    "pyarrow": "pip install 'dqbart[parquet]'",
    "matplotlib": "pip install 'dqbart[report]'",
}


def examine() -> dict[str, Any]:
    """Findings as JSON values, and under `lines` the same for a person."""
    import torch
    from dqbart_kernels.integer_matmul import best_path

    from dqbart.engines import cpu, triton
    from dqbart.evaluation.environment import environment

    found = environment()
    path = best_path(torch.device("cpu"))
    missing = {name: command for name, command in EXTRAS.items() if importlib.util.find_spec(name) is None}
    lines = [
        f"python {found['python']} on {found['system']}, {found['processor']}, {found['cores']} cores, "
        f"{found['instructions']}",
        "  ".join(f"{name} {number}" for name, number in found["packages"].items()),
        f"engine cpu: {cpu.describe()}",
        f"engine triton: {triton.describe()}",
        f"engine torch: integer products on this CPU run through {path}, checked bit by bit just now",
        f"GPU: {found['gpu'] or 'none that torch can use'}",
        *(f"not installed: {name} (optional): {command}" for name, command in missing.items()),
    ]
    runners = (cpu.CpuRunner(), triton.GpuRunner())
    engines = [runner.name for runner in runners if runner.reason() is None] + ["torch"]
    return found | {"engines": engines, "cpu_product": path, "missing": missing, "lines": lines}
