"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

Defaults are transformers' own: what a config leaves out means something else than in Llama's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from octavo.config.families.llama import decoder, num_layers
from octavo.config.model import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, Rope
from octavo.config.reading import FULL, MAX_HIDDEN_SIZE, Reader
from octavo.config.windows import SLIDING, is_null, layer_types, sliding_window

HEAD_DIM = 256
QUERY_PRE_ATTN_SCALAR = 256.0
WINDOW = 4096
ACTIVATION = "gelu_pytorch_tanh"
ATTENTION_SOFTCAP, FINAL_SOFTCAP = 50.0, 30.0  # of Gemma 2
PERIOD = 6  # of Gemma 3: one layer in so many has no window
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0  # of Gemma 3

# `hidden_act` stands beside `hidden_activation` in published configs, which is the one that counts.
_READ = frozenset({"hidden_act", "sliding_window", "final_logit_softcapping"})


def read_gemma2(read: Reader) -> ModelConfig:
    """`Gemma2ForCausalLM`. By default every second layer has a window, from the first on."""
    read.refuse_what_nobody_reads(read=_READ | {"attn_logit_softcapping"})
    count = num_layers(read)
    kinds = layer_types(read, count, [FULL if i % 2 else SLIDING for i in range(count)])
    rope = read.rope(_head_dim(read))
    softcap = _softcap(read, "attn_logit_softcapping", ATTENTION_SOFTCAP)
    attention = replace(_attention(read, rope), logit_softcap=softcap)
    layers = _layers(read, kinds, {FULL: attention, SLIDING: attention})
    return _decoder(read, "gemma2", layers, final_softcap=FINAL_SOFTCAP)


def read_gemma3(read: Reader) -> ModelConfig:
    """`Gemma3ForCausalLM`. Layers with a window have rotary positions of their own.

    An `attn_logit_softcapping` is refused: transformers reads it and does not apply it.
    """
    read.refuse_what_nobody_reads(read=_READ)
    count = num_layers(read)
    period = read.integer("sliding_window_pattern", 1, count + PERIOD, default=PERIOD)
    default = [SLIDING if (i + 1) % period else FULL for i in range(count)]
    kinds = layer_types(read, count, default)
    attentions = {
        kind: replace(_attention(read, _gemma3_rope(read, kind)), qk_norm=True)
        for kind in dict.fromkeys(kinds)
    }
    return _decoder(read, "gemma3", _layers(read, kinds, attentions), final_softcap=None)


def _head_dim(read: Reader) -> int:
    return read.heads(read.integer("hidden_size", 1, MAX_HIDDEN_SIZE), default_dim=HEAD_DIM)[2]


def _attention(read: Reader, rope: Rope) -> AttentionConfig:
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads, num_kv_heads, head_dim = read.heads(hidden_size, default_dim=HEAD_DIM)
    bias = read.boolean("attention_bias", False)
    scalar = read.number("query_pre_attn_scalar", 1e-6, 1e9, default=QUERY_PRE_ATTN_SCALAR)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scalar**-0.5,
        rope=rope,
        bias=bias,
        output_bias=bias,
    )


def _gemma3_rope(read: Reader, kind: str) -> Rope:
    """A section for each kind of layer (transformers 5), or names of their own (4)."""
    theta = GLOBAL_THETA if kind == FULL else LOCAL_THETA
    config = read.everything()
    sections = config.pop("rope_parameters", None)
    if isinstance(sections, Mapping) and not sections.keys().isdisjoint((FULL, SLIDING)):
        config = {"rope_scaling": sections.get(kind), "rope_theta": None}
        return read.over(config).rope(_head_dim(read), default_theta=theta)
    if kind == FULL:
        return read.rope(_head_dim(read), default_theta=theta)
    local = {"rope_theta": config.get("rope_local_base_freq")}
    return read.over(local).rope(_head_dim(read), default_theta=theta)


def _layers(
    read: Reader, kinds: Sequence[str], attentions: Mapping[str, AttentionConfig]
) -> tuple[LayerConfig, ...]:
    if SLIDING in kinds and is_null(read, "sliding_window"):
        raise read.wrong("sliding_window", None, f"a number, as some layers are {SLIDING!r}")
    activation = read.raw("hidden_activation") or ACTIVATION
    if activation != ACTIVATION:
        raise read.unsupported("hidden_activation", activation, f"only {ACTIVATION!r}")
    size = read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE)
    window = sliding_window(read, WINDOW)
    of_kind = {}
    for kind, attention in attentions.items():
        windowed = replace(attention, window=window) if kind == SLIDING else attention
        mlp = MLPConfig(size, activation="gelu_tanh")
        of_kind[kind] = LayerConfig(windowed, mlp, num_norms=4)
    return tuple(of_kind[kind] for kind in kinds)


def _decoder(
    read: Reader,
    architecture: str,
    layers: tuple[LayerConfig, ...],
    *,
    final_softcap: float | None,
) -> ModelConfig:
    config = decoder(read, architecture, layers=layers)
    return replace(
        config,
        tie_word_embeddings=read.boolean("tie_word_embeddings", True),
        zero_centered_norms=True,
        embedding_scale=config.hidden_size**0.5,
        final_logit_softcap=_softcap(read, "final_logit_softcapping", final_softcap),
    )


def _softcap(read: Reader, name: str, default: float | None) -> float | None:
    """A null is no cap, which where the family has one is not what nothing means."""
    if is_null(read, name) or (default is None and not read.has(name)):
        return None
    return read.number(name, 1e-3, 1e6, default=default)
