"""BLIP-2 (arXiv 2301.12597): the config of language model and tower, a Q-Former between them.

MiniGPT-4 (arXiv 2304.10592) is of the same shape with Llama's decoder; its own checkpoints have a
layout that no class of transformers reads.
"""

from octavo.config.families.llava import TEXT_MODELS as OF_LLAVA
from octavo.config.families.llava import TextModels, read_text, with_vision
from octavo.config.families.opt import read_opt
from octavo.config.families.vision_blip2 import read_blip2_vision
from octavo.config.model import ModelConfig
from octavo.config.reading import Reader

# By transformers' `model_type`: who reads the section, and the defaults of transformers' config
# class, which published checkpoints leave out. Flan-T5, the other language model of BLIP-2, is an
# encoder and a decoder, and not supported.
TEXT_MODELS: TextModels = {
    "opt": (
        read_opt,
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "llama": OF_LLAVA["llama"],
}


def read_blip2(read: Reader) -> ModelConfig:
    """`Blip2ForConditionalGeneration`. Whether embeddings are tied is the section's to say."""
    text = read_text(read, TEXT_MODELS, kind="opt", around=("dtype", "torch_dtype", "eos_token_id"))
    return with_vision(read, "blip2", read_blip2_vision(read.everything()), text=text)
