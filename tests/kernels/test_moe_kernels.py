"""Routers and experts: compiled versions against references, references against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import MOE_EXPERTS, MOE_ROUTE, Case, Routing, native
from octavo.kernels.moe_experts import NativeMoEExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no bf16 dot
REFERENCE = MOE_EXPERTS.reference

ROUTINGS = {
    "one expert": (5, Routing(1)),
    "normed": (8, Routing(2, norm_topk_prob=True)),
    "all experts": (3, Routing(3)),
    "scaled": (128, Routing(8, scaling_factor=16.0)),
    "groups": (24, Routing(3, num_groups=4, num_groups_per_token=2)),
    "one group of many": (160, Routing(6, num_groups=8, num_groups_per_token=1)),
}


def routed(num_tokens: int, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    return MOE_ROUTE.reference(logits, Routing(num_ranks, norm_topk_prob=True))


class Experts:
    """Random weights of experts, of inputs' size that keeps sums near 1."""

    def __init__(self, num_experts: int, width: int, size: int, dtype: torch.dtype):
        gate_up = torch.randn(num_experts, 2 * size, width) * width**-0.5
        down = torch.randn(num_experts, width, size) * size**-0.5
        self.gate_up, self.down = gate_up.to(DEVICE, dtype), down.to(DEVICE, dtype)

    def expected(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """In fp32, whatever the dtype."""
        plain = REFERENCE.prepare(self.gate_up.float(), self.down.float())
        return REFERENCE.apply(x.float(), plain, weights, experts)


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[ours.dtype]
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V2"])
@torch.inference_mode()
def test_the_references_are_blocks_of_transformers(name):
    from transformers import DeepseekV2Config, MixtralConfig, Qwen3MoeConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shared = {"hidden_size": 24, "hidden_act": "silu", "num_attention_heads": 2}
    shared |= {"num_experts_per_tok": 3, "num_key_value_heads": 2}
    if name == "Mixtral":
        block = MixtralSparseMoeBlock(
            MixtralConfig(num_local_experts=8, intermediate_size=20, **shared)
        )
        routing = Routing(3, norm_topk_prob=True)
    elif name == "Qwen3-MoE":
        block = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(num_experts=8, moe_intermediate_size=20, **shared)
        )
        routing = Routing(3)
    else:
        groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        config = DeepseekV2Config(
            n_routed_experts=8, moe_intermediate_size=20, routed_scaling_factor=2.5,
            n_shared_experts=1, **groups, **shared,
        )  # fmt: skip
        block = DeepseekV2Moe(config)
        routing = Routing(3, scaling_factor=2.5, num_groups=4, num_groups_per_token=2)
    for weight in block.parameters():
        weight.normal_(std=0.4)
    if name == "DeepSeek-V2":  # what its shared experts add is not these ops'
        for weight in block.shared_experts.parameters():
            weight.zero_()
    x = torch.randn(1, 17, 24)
    weights, experts = MOE_ROUTE.reference(x[0] @ block.gate.weight.T, routing)
    plain = REFERENCE.prepare(block.experts.gate_up_proj, block.experts.down_proj)
    torch.testing.assert_close(REFERENCE.apply(x[0], plain, weights, experts), block(x)[0])


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
@pytest.mark.skipif(DEVICE == "cuda", reason="of CPUs: the run without a GPU has it")
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("sizes", [(5, 40, 24, 2), (3, 33, 17, 3), (40, 16, 8, 1)])
def test_native_experts(poisoned, isa, dtype, tokens, sizes):
    num_experts, width, size, num_ranks = sizes
    given = Experts(num_experts, width, size, dtype)
    ours = NativeMoEExperts()
    prepared = ours.prepare(given.gate_up, given.down)
    x = torch.randn(tokens, width + 3).to(dtype)[:, 1:-2]
    weights, experts = routed(tokens, num_experts, num_ranks)
    made = ours.apply(x, prepared, weights, experts)
    close(made, given.expected(x, weights, experts))
    for row in range(min(tokens, 5)):
        one = slice(row, row + 1)
        alone = ours.apply(x[one], prepared, weights[one], experts[one])
        assert torch.equal(alone, made[one]), "a row's bits depend on the batch"


def test_experts_refuse_what_they_would_misread():
    given = Experts(4, 8, 6, torch.float32)
    ours = NativeMoEExperts()
    with pytest.raises(ValueError, match="2I"):
        ours.prepare(given.gate_up, given.down[:3])
    if native.unavailable() is not None or DEVICE == "cuda":
        return
    prepared = ours.prepare(given.gate_up, given.down)
    x, (weights, experts) = torch.randn(3, 8), routed(3, 4, 2)
    for wrong in (
        (x[:, :7], weights, experts),
        (x.bfloat16(), weights, experts),
        (x, weights.double(), experts),
        (x, weights, experts.long()),
        (x, weights[:2], experts[:2]),
    ):
        with pytest.raises(ValueError, match="moe_experts"):
            ours.apply(wrong[0], prepared, *wrong[1:])


def test_the_choice_says_why():
    sizes = {"num_experts": 8}
    choice = MOE_ROUTE.select(Case("cpu", torch.float32, sizes))
    assert str(choice) == "moe_route: reference (not triton: made for cuda, not cpu)"


class TestTriton:
    """In its interpreter, or on a GPU."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        pytest.importorskip("triton")

    @pytest.mark.parametrize("name", ROUTINGS)
    def test_route(self, poisoned, dtype, name):
        from octavo.kernels.triton_moe_route import triton_moe_route

        num_experts, routing = ROUTINGS[name]
        logits = (2 * torch.randn(9, num_experts + 1)).to(DEVICE, dtype)[:, :num_experts]
        if dtype is torch.bfloat16:
            # Rounded, some are alike, and either may be chosen: make them different again.
            steps = torch.rand(9, num_experts).argsort(1).to(DEVICE)
            logits = (steps / 16 if num_experts <= 128 else steps).to(dtype)
        weights, experts = triton_moe_route(logits, routing)
        expected_weights, expected_experts = MOE_ROUTE.reference(logits, routing)
        assert torch.equal(experts, expected_experts)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)

    def test_of_equals_the_first_are_chosen_and_no_expert_twice(self, poisoned):
        from octavo.kernels.triton_moe_route import triton_moe_route

        logits = torch.zeros(2, 7, device=DEVICE)
        logits[1, 5] = 1.0
        weights, experts = triton_moe_route(logits, Routing(3, norm_topk_prob=True))
        assert experts.tolist() == [[0, 1, 2], [5, 0, 1]]
        torch.testing.assert_close(weights.sum(1), torch.ones(2, device=DEVICE))

    @pytest.mark.parametrize("tile", [16, 64])
    @pytest.mark.parametrize(
        ("tokens", "num_experts", "ranks"), [(1, 8, 2), (33, 5, 3), (90, 200, 8)]
    )
    def test_sorting(self, poisoned, tokens, num_experts, ranks, tile):
        from octavo.kernels.triton_moe_experts import sort_by_expert

        _, experts = routed(tokens, num_experts, ranks)
        experts[:, 0] = experts[0, 0]  # may occur twice in a row: sorting does not mind
        order, table = sort_by_expert(experts, num_experts, tile)
        assert torch.equal(order.long(), torch.argsort(experts.flatten(), stable=True))
        tiles = [tuple(column) for column in table.T.tolist() if column[1] < column[2]]
        covered = [place for _, first, last in tiles for place in range(first, last)]
        assert covered == list(range(tokens * ranks))
        assert all(last - first <= tile for _, first, last in tiles)
        sorted_experts = experts.flatten()[order.long()].tolist()
        for expert, first, last in tiles:
            assert set(sorted_experts[first:last]) == {expert}

    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize("tokens", [0, 1, 37])
    @pytest.mark.parametrize("sizes", [(4, 64, 128, 2), (9, 40, 24, 3)])
    def test_experts(self, poisoned, half, tokens, sizes):
        from octavo.kernels.triton_moe_experts import EXPERTS

        num_experts, width, size, num_ranks = sizes
        dtype = HALF if half else torch.float32
        given = Experts(num_experts, width, size, dtype)
        prepared = EXPERTS.prepare(given.gate_up, given.down)
        x = torch.randn(tokens, width + 8).to(DEVICE, dtype)[:, :width]
        weights, experts = routed(tokens, num_experts, num_ranks)
        made = EXPERTS.apply(x, prepared, weights, experts)
        close(made, given.expected(x, weights, experts))
        if tokens:
            alone = EXPERTS.apply(x[:1], prepared, weights[:1], experts[:1])
            close(alone, made[:1].float())
