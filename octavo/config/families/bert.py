"""BERT (arXiv 1810.04805), RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (arXiv 1911.02116).

Encoders: they make vectors of texts, or with a head of classes a score of a pair of texts.
"""

from dataclasses import replace

from octavo.config.families.gpt2 import activation, plain_heads
from octavo.config.model import ClassHead, LayerConfig, MLPConfig, ModelConfig
from octavo.config.reading import (
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    Reader,
)

MAX_TOKEN_TYPES = 2**10
# RoBERTa counts positions from the one behind its padding token's id, which is 1 in all of them.
PADDING_ID = 1
SIGMOIDS = ("torch.nn.modules.activation.Sigmoid", "sigmoid")
IDENTITIES = ("torch.nn.modules.linear.Identity", "identity")


def read_bert(read: Reader) -> ModelConfig:
    """`BertModel`."""
    return _read(read, "bert", num_skipped_positions=0)


def read_bert_masked_lm(read: Reader) -> ModelConfig:
    """`BertForMaskedLM`, without its head."""
    return _read(read, "bert_masked_lm", num_skipped_positions=0)


def read_bert_classifier(read: Reader) -> ModelConfig:
    """`BertForSequenceClassification`."""
    return _with_class_head(read, _read(read, "bert_classifier", num_skipped_positions=0))


def read_roberta(read: Reader) -> ModelConfig:
    """`RobertaModel`."""
    return _read_roberta(read, "roberta")


def read_roberta_classifier(read: Reader) -> ModelConfig:
    """`RobertaForSequenceClassification`."""
    return _with_class_head(read, _read_roberta(read, "roberta_classifier"))


def read_xlm_roberta(read: Reader) -> ModelConfig:
    """`XLMRobertaModel`."""
    return _read_roberta(read, "xlm_roberta")


def read_xlm_roberta_classifier(read: Reader) -> ModelConfig:
    """`XLMRobertaForSequenceClassification`."""
    return _with_class_head(read, _read_roberta(read, "xlm_roberta_classifier"))


def _read_roberta(read: Reader, architecture: str) -> ModelConfig:
    padding_id = read.integer("pad_token_id", 0, MAX_VOCAB_SIZE, default=PADDING_ID)
    if padding_id != PADDING_ID:
        raise read.unsupported("pad_token_id", padding_id, f"only {PADDING_ID}")
    return _read(read, architecture, num_skipped_positions=PADDING_ID + 1)


def _read(read: Reader, architecture: str, *, num_skipped_positions: int) -> ModelConfig:
    read.refuse_what_nobody_reads(read=("hidden_act",))
    kind = read.raw("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise read.unsupported("position_embedding_type", kind, "only 'absolute'")
    for name in ("is_decoder", "add_cross_attention"):
        if read.boolean(name, False):
            raise read.unsupported(name, True, "only False")
    hidden_size = read.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    mlp = MLPConfig(
        read.integer("intermediate_size", 1, 8 * MAX_HIDDEN_SIZE),
        bias=True,
        activation=activation(read, "hidden_act", "gelu"),
        gated=False,
    )
    attention = replace(plain_heads(read, hidden_size, "num_attention_heads"), causal=False)
    num_layers = read.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_rows = read.integer(
        "max_position_embeddings", num_skipped_positions + 1, MAX_POSITIONS, default=512
    )
    vocab_size = read.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(LayerConfig(attention, mlp),) * num_layers,
        norm_eps=read.number("layer_norm_eps", 0.0, 1.0, default=1e-12),
        max_position_embeddings=num_rows - num_skipped_positions,
        tie_word_embeddings=True,
        dtype=read.dtype(),
        bos_token_id=None,
        eos_token_ids=(),
        norm="layer",
        num_learned_positions=num_rows,
        num_token_types=read.integer("type_vocab_size", 1, MAX_TOKEN_TYPES, default=2),
        pooling="cls",
    )


def _with_class_head(read: Reader, config: ModelConfig) -> ModelConfig:
    """One class or several; what is done to one follows sentence-transformers' `CrossEncoder`."""
    labels = read.raw("id2label")
    num_labels = len(labels) if isinstance(labels, dict) and labels else 2
    num_classes = read.integer("num_labels", 1, 2**16, default=num_labels)
    written = read.raw("sentence_transformers")
    name = written.get("activation_fn") if isinstance(written, dict) else None
    name = name or read.raw("sbert_ce_default_activation_function")
    if name is None:
        name = SIGMOIDS[0] if num_classes == 1 else IDENTITIES[0]
    if name not in SIGMOIDS + IDENTITIES:
        raise read.unsupported("activation_fn", name, "only Sigmoid and Identity")
    head = ClassHead(num_classes, sigmoid=name in SIGMOIDS)
    return replace(config, class_head=head)
