"""Triton kernels for packed models. Each has a torch reference of the same name with `_reference` after it.

This module imports without Triton and says whether the others would run: `reason`.
"""

import functools
import importlib.util
import os

import torch

CAPABILITY = (8, 0)  # the first with the int8 matrix instruction that the kernels need


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def reason(device: torch.device) -> str | None:
    """Why the engine can't run on a device, in a line; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type != "cuda":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"device '{device}': it runs on NVIDIA and AMD GPUs, device 'cuda'"
    if not torch.cuda.is_available():
        return "torch sees no GPU (torch.cuda.is_available() is False)"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"device '{device}': there are {torch.cuda.device_count()} GPUs, from cuda:0 on"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY:
        need = ".".join(map(str, CAPABILITY))
        return f"{name_of(device)} has compute capability {found[0]}.{found[1]}: it needs {need} (Ampere) or later"
    return _failure(device)


@functools.cache
def _failure(device: torch.device) -> str | None:
    """Why a first small kernel fails on the device, as it does without a C compiler for Triton's launchers."""
    from dqbart_kernels.gpu.rows import norm_and_quantize, norm_and_quantize_reference

    rows = torch.arange(-96.0, 96.0, device=device).view(2, 96)
    try:
        with torch.cuda.device(device):
            same = torch.equal(norm_and_quantize(rows)[0], norm_and_quantize_reference(rows)[0])
    except Exception as error:  # whatever a compiler, a driver or a launcher may say
        return f"a first kernel fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if same else "a first kernel computes something else than torch"
