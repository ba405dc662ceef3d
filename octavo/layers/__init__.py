"""The parts that models are wired from. They carry sharding, formats and kernels; no requests."""

from octavo.layers.attention import Attention, KVSpec, kv_specs
from octavo.layers.build import Build, KernelReport, Layer, finish_layers
from octavo.layers.context import StepContext
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import QKNorm, RMSNorm
from octavo.layers.rotary import Rotary
from octavo.layers.slot import Slot
from octavo.layers.vocabulary import Vocabulary

__all__ = [
    "Attention",
    "Build",
    "GatedMLP",
    "KVSpec",
    "KernelReport",
    "Layer",
    "Linear",
    "QKNorm",
    "RMSNorm",
    "Rotary",
    "Slot",
    "StepContext",
    "Vocabulary",
    "finish_layers",
    "kv_specs",
]
