"""What the Triton kernels accept, said once: for `Op.register` and for the launchers.

Knows devices and dtypes. Does not import triton, so that a machine without it can ask.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from octavo.kernels.dispatch import Case
from octavo.kernels.native.support import refuse

__all__ = ["needs_hopper", "refuse", "unsupported"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # the first with bf16 products
HOPPER = (9, 0)


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        wanted, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"made for compute capability {wanted} and above, this GPU has {found}"
    return None


def needs_hopper(case: Case) -> str | None:
    """Why a kernel of Hopper's own instructions (wgmma) cannot run the case, or None."""
    if case.device != "cuda":
        return f"made for cuda, not {case.device}"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:  # those after it have others in their place
        wanted, found = (".".join(map(str, pair)) for pair in (HOPPER, capability))
        return f"made for compute capability {wanted}, this GPU has {found}"
    return None


def unsupported(case: Case) -> str | None:
    """Why no Triton kernel can run the case, or None."""
    if case.device != "cuda":
        return f"made for cuda, not {case.device}"
    if case.dtype not in DTYPES:
        name = str(case.dtype).removeprefix("torch.")
        return f"made for bfloat16, float16 and float32, not {name}"
    return _missing()
