"""What stands between the two products of a plain MLP: gelu, exact or approximated, and relu.

Owns the ops. Torch has all but CLIP's as one kernel on every device, so there is nothing faster
beside them. Does not know the projections on either side.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as functional
from torch import Tensor

from octavo.kernels.dispatch import Op


class Activation(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, I], each number for itself, in x's dtype, rounded once."""
        ...


def reference_gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's share below x (arXiv 1606.08415, section 2)."""
    return functional.gelu(x)


def reference_gelu_tanh(x: Tensor) -> Tensor:
    """The same by tanh(sqrt(2 / pi) * (x + 0.044715 x^3)): GPT-2's."""
    return functional.gelu(x, approximate="tanh")


def reference_quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the paper's cheaper approximation of gelu: CLIP's."""
    wide = x.float()
    return (wide * functional.sigmoid(1.702 * wide)).to(x.dtype)


def reference_relu(x: Tensor) -> Tensor:
    """The larger of x and 0."""
    return functional.relu(x)


# By the name that `octavo.config.MLPConfig.activation` has for it.
ACTIVATIONS: dict[str, Op[Activation]] = {
    "gelu": Op("gelu", reference_gelu),
    "gelu_tanh": Op("gelu_tanh", reference_gelu_tanh),
    "quick_gelu": Op("quick_gelu", reference_quick_gelu),
    "relu": Op("relu", reference_relu),
}
