"""How llama.cpp's converter writes each architecture: names of tensors, and what it does to them.

Owns the table from its names to Hugging Face's. Knows no files and no number formats.
"""

import re
from dataclasses import dataclass, field

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """One of llama.cpp's architectures."""

    renamed: dict[str, str] = field(default_factory=dict)  # parts of layers, where unusual
    # Its rotary code turns neighbours, so the converter reorders the rows of queries and keys.
    pairs_are_neighbours: bool = False
    norm_offset: float = 0.0  # what the converter adds to the weights of norms

    def hf_name(self, name: str) -> str:
        """The Hugging Face name; a name that is not known stays, for the model to refuse."""
        layer, names = LAYER.fullmatch(name), LAYER_NAMES | self.renamed
        if layer and layer[2] in names:
            return f"model.layers.{layer[1]}.{names[layer[2]]}.{layer[3]}"
        stem, _, leaf = name.rpartition(".")
        return f"{NAMES[stem]}.{leaf}" if stem in NAMES else name


# By `general.architecture`.
LAYOUTS = {
    "llama": GgufLayout(pairs_are_neighbours=True),
    "qwen2": GgufLayout(),
    "qwen3": GgufLayout(),
    "gemma2": GgufLayout(SANDWICH, norm_offset=1.0),
    "gemma3": GgufLayout(SANDWICH, norm_offset=1.0),
}
