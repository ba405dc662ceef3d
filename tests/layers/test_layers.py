"""Layers against transformers and against their own shards."""

import pytest
import torch

from octavo.config import AttentionConfig, Rope, RopeScaling
from octavo.errors import ConfigError
from octavo.layers import Attention, Build, Linear, QKNorm, Rotary, finish_layers
from octavo.layers.rotary import rotary_frequencies
from octavo.parallel import ParallelGroup


def filled(linear, tensors):
    slots = linear.slots({part: part for part in ("q", "k") if f"{part}.weight" in tensors})
    for name, tensor in tensors.items():
        assert slots[name].shape == tuple(tensor.shape)
        slots[name].load(tensor)
    finish_layers(linear)
    return linear


@pytest.mark.parametrize("split", ["rows", "columns"])
def test_the_shards_of_a_linear_layer_make_the_whole(split):
    parts = {"q": 12, "k": 6} if split == "rows" else {"q": 12}
    tensors = {}
    for part, rows in parts.items():
        tensors[f"{part}.weight"] = torch.randn(rows, 8)
        tensors[f"{part}.bias"] = torch.randn(rows)
    x = torch.randn(5, 8)
    whole = filled(Linear(parts, 8, Build("cpu", torch.float32), bias=True, split=split), tensors)

    class SilentGroup(ParallelGroup):
        def all_reduce(self, partial):  # the test adds the ranks' parts up itself
            return partial

    shards = [
        filled(
            Linear(
                parts,
                8,
                Build("cpu", torch.float32, group=SilentGroup(rank, 2)),
                bias=True,
                split=split,
            ),
            tensors,
        )
        for rank in range(2)
    ]
    if split == "rows":
        outputs = [shard(x) for shard in shards]
        together = torch.cat([o[:, :6] for o in outputs] + [o[:, 6:] for o in outputs], dim=1)
    else:
        together = shards[0](x[:, :4]) + shards[1](x[:, 4:])
    torch.testing.assert_close(together, whole(x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_tensor_may_hold_all_parts_whole_or_in_turns(groups, transposed):
    """Of each group two rows of q and one of k; every rank takes its share of each part."""
    parts = {"q": 12, "k": 6}
    tensors = {f"{part}.weight": torch.randn(rows, 8) for part, rows in parts.items()}
    tensors |= {f"{part}.bias": torch.randn(rows) for part, rows in parts.items()}

    def fused(kind):
        pieces = [tensors[f"{part}.{kind}"].chunk(groups) for part in parts]
        return torch.cat([piece for group in zip(*pieces, strict=True) for piece in group])

    for rank in range(2):
        build = Build("cpu", torch.float32, group=ParallelGroup(rank, 2))
        apart = filled(Linear(parts, 8, build, bias=True, split="rows"), tensors)
        together = Linear(parts, 8, build, bias=True, split="rows")
        slots = together.fused_slots("qk", groups=groups, transposed=transposed)
        weight = fused("weight")
        weight = weight.t().contiguous() if transposed else weight
        assert {name: slot.shape for name, slot in slots.items()} == {
            "qk.weight": tuple(weight.shape),
            "qk.bias": (18,),
        }
        slots["qk.weight"].load(weight)
        slots["qk.bias"].load(fused("bias"))
        finish_layers(together)
        x = torch.randn(5, 8)
        assert torch.equal(together(x), apart(x))


def test_a_size_that_cannot_be_shared_is_refused_with_the_remedy():
    build = Build("cpu", torch.float32, group=ParallelGroup(0, 4))
    with pytest.raises(ConfigError, match=r"9 rows of q.*tensor parallel size"):
        Linear({"q": 9}, 8, build, split="rows")


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, {"rope_type": "default"}),
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_rotary_frequencies_are_those_of_transformers(scaling, parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **parameters},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(
        rotary_frequencies(Rope(500000.0, 128, scaling), 131072), expected, rtol=1e-6, atol=0
    )


def test_attention_takes_the_op_that_does_all_of_its_write():
    build = Build("cpu", torch.float32)
    shape = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=None)
    rotary, norm = Rotary(Rope(1e4, 16), 8, build), QKNorm(16, 1e-6, build)
    for options, op in (
        ({}, "kv_write"),
        ({"rotary": rotary}, "rotary_kv_write"),
        ({"rotary": rotary, "qk_norm": norm}, "qk_norm_rotary_kv_write"),
    ):
        choices = Attention(shape, 0, build, **options).finish()
        assert [choice.op for choice in choices] == [op, "paged_attention"]
    with pytest.raises(ValueError, match="without a rotation"):
        Attention(shape, 0, build, qk_norm=norm)
