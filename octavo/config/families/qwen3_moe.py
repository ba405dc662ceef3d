"""Qwen3's mixtures of experts (arXiv 2505.09388)."""

from dataclasses import replace

from octavo.config.families.experts import mixture
from octavo.config.families.llama import num_layers
from octavo.config.families.qwen3 import read_qwen3
from octavo.config.model import ModelConfig
from octavo.config.reading import MAX_LAYERS, Reader


def read_qwen3_moe(read: Reader) -> ModelConfig:
    """`Qwen3MoeForCausalLM`: Qwen3's attention, and experts in all layers or in some of them."""
    # transformers 5 writes the general name in the place of the family's.
    count = "num_local_experts" if read.has("num_local_experts") else "num_experts"
    experts = mixture(
        read,
        count=count,
        size="moe_intermediate_size",
        norm_topk_prob=read.boolean("norm_topk_prob", False),
    )
    step = read.integer("decoder_sparse_step", 1, MAX_LAYERS, default=1)
    dense = _dense_layers(read)
    model = read_qwen3(read)
    layers = tuple(
        layer if index in dense or (index + 1) % step else replace(layer, mlp=experts)
        for index, layer in enumerate(model.layers)
    )
    return replace(model, architecture="qwen3_moe", layers=layers)


def _dense_layers(read: Reader) -> frozenset[int]:
    indices = read.raw("mlp_only_layers") or []
    count = num_layers(read)
    if not isinstance(indices, list) or any(
        type(index) is not int or not 0 <= index < count for index in indices
    ):
        raise read.wrong("mlp_only_layers", indices, f"a list of layers in 0..{count - 1}")
    return frozenset(indices)
