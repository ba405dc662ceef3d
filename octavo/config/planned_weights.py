"""What of a model stays in memory: its weights, and what its layers keep of each token.

Owns the arithmetic of how they are stored. Knows no torch and no steps.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from octavo.config.lora import slot_matrices
from octavo.config.planned_vision import encoder_parts
from octavo.config.resolve import DTYPE_BYTES, ResolvedConfig

FP32 = 4  # bytes
# The packed layout of `octavo.kernels.linear`: rows of a weight are padded to whole panels, and
# its columns to this many.
PANEL_ROWS = 16
PACKED_DEPTH_STEP = {"bfloat16": 32, "float32": 1}


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """All weights of one kind, over all layers."""

    kind: str
    num_parameters: int
    num_bytes: int
    layout: str  # how they are stored


@dataclass(frozen=True, slots=True)
class KVLayers:
    """The layers that keep the same things of a token."""

    kind: str
    num_layers: int
    bytes_per_token_and_layer: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over these layers."""
        return self.num_layers * self.bytes_per_token_and_layer


def plan_weights(config: ResolvedConfig, *, packed: bool) -> tuple[WeightGroup, ...]:
    """Weights by kind. A packed weight replaces the plain one; a tied matrix is stored once."""
    model, hidden = config.model, config.model.hidden_size
    layout = f"{config.dtype}, packed for the CPU" if packed else f"{config.dtype}, plain"
    plain = f"{config.dtype}, plain"

    def group(kind: str, parts: list[tuple[tuple[tuple[int, int], ...], int, int]]) -> WeightGroup:
        """Of (matrices, numbers in vectors, copies)."""
        num_parameters = num_stored = 0
        for matrices, num_values, copies in parts:
            stored = (_stored(*m, config.dtype) if packed else math.prod(m) for m in matrices)
            num_parameters += copies * (sum(map(math.prod, matrices)) + num_values)
            num_stored += copies * (sum(stored) + num_values)
        return WeightGroup(kind, num_parameters, num_stored * DTYPE_BYTES[config.dtype], layout)

    def of_layers(kind: str, name: str) -> WeightGroup:
        parts = []
        for layer, copies in model.kinds_of_layers.items():
            part = getattr(layer, name)
            parts.append((part.matrices(hidden), part.num_vector_values(hidden), copies))
        return group(kind, parts)

    vocabulary = (model.vocab_size, hidden)
    num_embedded = math.prod(vocabulary)
    outer = [group("embedding, also the output head", [((vocabulary,), 0, 1)])]
    if model.is_encoder or not model.tie_word_embeddings:
        num_bytes = num_embedded * DTYPE_BYTES[config.dtype]
        embedding = WeightGroup("embedding", num_embedded, num_bytes, plain)
        outer = [embedding]
    if not (model.is_encoder or model.tie_word_embeddings):
        outer.append(group("output head", [((vocabulary,), 0, 1)]))
    if model.num_token_types:
        n = model.num_token_types * hidden
        outer.append(WeightGroup("token types", n, n * DTYPE_BYTES[config.dtype], plain))
    if (head := model.class_head) is not None:
        parts = head.matrices(hidden), head.num_vector_values(hidden), 1
        outer.append(group("head of classes", [parts]))
    if model.num_learned_positions:
        n = model.num_learned_positions * hidden
        outer.append(WeightGroup("learned positions", n, n * DTYPE_BYTES[config.dtype], plain))
    if model.vision is not None:
        outer.append(group("vision encoder", encoder_parts(model.vision)))
    if config.lora is not None:
        matrices = tuple(slot_matrices(model, config.lora))
        slots = group("slots of adapters", [(matrices, 0, config.lora.max_loras)])
        outer.append(replace(slots, num_parameters=0))  # those of adapters are not the model's
    num_norms = model.num_norm_values
    shared = "one for all layers" if len(model.ropes) < 2 else "one for layers that turn alike"
    norm_dtype = "float32" if model.zero_centered_norms else config.dtype
    table_bytes = sum(rope.rotary_dim for rope in model.ropes) * config.max_model_len * FP32
    return (
        *outer,
        of_layers("attention", "attention"),
        of_layers("MLP", "mlp"),
        WeightGroup(
            "norms", num_norms, num_norms * DTYPE_BYTES[norm_dtype], f"{norm_dtype}, plain"
        ),
        WeightGroup("table of rotary angles", 0, table_bytes, f"float32, {shared}"),
    )


def _stored(rows: int, columns: int, dtype: str) -> int:
    """Numbers in the packed layout of a weight, padding included."""
    step = PACKED_DEPTH_STEP[dtype]
    return -(-rows // PANEL_ROWS) * PANEL_ROWS * (-(-columns // step) * step)


def plan_kv_layers(config: ResolvedConfig) -> tuple[KVLayers, ...]:
    """What layers keep of each token: here a key and a value for every key/value head.

    A layer with a window keeps those of the tokens before it, too.
    """
    itemsize = DTYPE_BYTES[config.dtype]
    kinds = Counter(
        (layer.attention.window, layer.attention.num_cached_values)
        for layer in config.model.layers
        if layer.attention.num_cached_values
    )
    return tuple(
        KVLayers(
            "full attention" if window is None else f"attention in a window of {window:,}",
            num_layers,
            num_values * itemsize,
        )
        for (window, num_values), num_layers in kinds.items()
    )
