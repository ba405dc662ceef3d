"""Gemma 3's text models (arXiv 2503.19786): Gemma 2's blocks, with QK-norm in the attention."""

from octavo.models.gemma2 import Gemma2
from octavo.models.qwen3 import Qwen3Attention


class Gemma3(Gemma2):
    """Embedding, blocks, norm, head, as Gemma 2's. Rotary positions differ by kind of layer."""

    attention_type = Qwen3Attention
