"""What the compiled kernels accept, said once: for `Op.register` and for the launchers.

Knows devices and dtypes. Each op adds its own sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels import native
from octavo.kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    """Why no compiled kernel can run the case, or None."""
    if case.device != "cpu":
        return f"made for cpu, not {case.device}"
    if case.dtype not in (torch.bfloat16, torch.float32):
        return f"made for bfloat16 and float32, not {str(case.dtype).removeprefix('torch.')}"
    return native.unavailable()


def refuse(op: str, rule: str, **tensors: Tensor | None) -> ValueError:
    """The error for inputs that break a rule of an op, with what was given."""
    given = ", ".join(
        f"{name} {tuple(t.shape)} strides {t.stride()} {t.dtype}"
        for name, t in tensors.items()
        if t is not None
    )
    return ValueError(f"{op}: {rule}; given {given}")
