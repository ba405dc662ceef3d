"""The parts that models are wired from. They carry sharding, formats and kernels; no requests."""

from octavo.layers.adapters import AdapterSlots, AdapterWeights, adapt_model
from octavo.layers.attention import Attention, KVSpec, kv_specs
from octavo.layers.build import Build, KernelReport, Layer, finish_layers
from octavo.layers.class_head import ClassHead
from octavo.layers.context import StepContext, StepImages
from octavo.layers.encoder_attention import EncoderAttention
from octavo.layers.latent_attention import LatentAttention
from octavo.layers.layer_norm import LayerNorm, residual_norm
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import (
    MixtureOfExperts,
    expert_tokens,
    feed_forward,
    forget_expert_tokens,
)
from octavo.layers.norm import QKNorm, RMSNorm
from octavo.layers.plain_mlp import PlainMLP
from octavo.layers.positions import LearnedPositions
from octavo.layers.rotary import Rotary
from octavo.layers.sectioned_rotary import SectionAngles, SectionedAttention
from octavo.layers.slot import Slot
from octavo.layers.typed_tokens import TypedTokens
from octavo.layers.vocabulary import Vocabulary, create_vocabulary

__all__ = [
    "AdapterSlots",
    "AdapterWeights",
    "Attention",
    "Build",
    "ClassHead",
    "EncoderAttention",
    "GatedMLP",
    "KVSpec",
    "KernelReport",
    "LatentAttention",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MixtureOfExperts",
    "PlainMLP",
    "QKNorm",
    "RMSNorm",
    "Rotary",
    "SectionAngles",
    "SectionedAttention",
    "Slot",
    "StepContext",
    "StepImages",
    "TypedTokens",
    "Vocabulary",
    "adapt_model",
    "create_vocabulary",
    "expert_tokens",
    "feed_forward",
    "finish_layers",
    "forget_expert_tokens",
    "kv_specs",
    "residual_norm",
]
