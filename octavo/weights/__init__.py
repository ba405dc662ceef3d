"""Checkpoints to parameters: safetensors, GGUF and random weights."""

from octavo.weights.adapters import read_adapter
from octavo.weights.dummy import dummy_tensors
from octavo.weights.loading import TensorStream, load_weights
from octavo.weights.reading import read_tensors

__all__ = ["TensorStream", "dummy_tensors", "load_weights", "read_adapter", "read_tensors"]
