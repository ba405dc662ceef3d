"""The first half of a gated MLP: f(x Wgᵀ) * (x Wuᵀ), where both weights stand in one.

Owns the op. What multiplies, and in which format the weight is kept, is the caller's: most of the
time the two steps are two kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from octavo.kernels.dispatch import Case, Op
from octavo.kernels.triton_support import needs_hopper
from octavo.kernels.triton_support import unsupported as unsupported_by_triton

# With no more rows, or fewer results, than these a product and its activation are as fast apart:
# cuBLAS then has better tiles. `octavo.config.planned_steps` has the same numbers.
MOST_ROWS_APART = 1024
LEAST_RESULTS = 1 << 22
TMA_STEP = 8  # 16-bit numbers in 16 bytes: TMA wants rows of whole ones


class GatedLinear(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        multiply: Callable[[Tensor], Tensor],
        activate: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """x [T, K] -> f(gate) * up, [T, I], where x's product with the weight is [gate, up].

        weight [2I, K] is None where it is not kept as plain numbers. `multiply` makes the product
        and `activate` the rest, for implementations and numbers of rows that do not do it at once.
        f is silu, unless the case's sizes name another (`gelu_tanh`).
        """
        ...


def reference_gated_linear(
    x: Tensor,
    weight: Tensor | None,
    multiply: Callable[[Tensor], Tensor],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    return activate(multiply(x))


def is_worth_one_kernel(num_rows: int, num_outputs: int) -> bool:
    """Whether so many rows of so many outputs are faster made by one kernel than by two."""
    return num_rows > MOST_ROWS_APART and num_rows * num_outputs >= LEAST_RESULTS


def _unsupported_by_hopper(case: Case) -> str | None:
    sizes = case.sizes
    if sizes.get("batch_invariant"):
        return "its bits depend on the batch"
    if case.dtype.itemsize != 2 or sizes.get("bias") or sizes.get("gelu_tanh"):
        return "made for 16-bit values and silu, without a bias"
    if sizes.get("size", 0) % TMA_STEP or sizes.get("in_features", 0) % TMA_STEP:
        return f"made for sizes that {TMA_STEP} divides"
    return needs_hopper(case) or unsupported_by_triton(case)


GATED_LINEAR: Op[GatedLinear] = Op("gated_linear", reference_gated_linear)
GATED_LINEAR.register_module(
    "hopper", "octavo.kernels.hopper_gated_linear:hopper_gated_linear", _unsupported_by_hopper
)
