"""What sentence-transformers' files beside a checkpoint say of how its vectors are made.

`modules.json` lists the steps from tokens to a vector; each has a folder with a config. Nothing in
them is executed: a step that we do not have is refused by name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.config.checkpoint import Checkpoint
from octavo.config.model import ModelConfig
from octavo.config.reading import MAX_POSITIONS, Reader, short
from octavo.errors import CheckpointError, UnsupportedModelError

MODULES = "modules.json"
FOLDER = re.compile(r"\w[\w-]*")  # no way out of the checkpoint
POOLINGS = {  # in the words of `octavo.core.PoolingParams`
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # of `pooling_mode`, in newer files


def with_sentence_transformers(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """`config` with the pooling, the norm and the longest text of these files, where there are any.

    Raises:
        UnsupportedModelError: a step or a pooling that is not supported.
        CheckpointError: a file is damaged.
    """
    modules = checkpoint.json_list(MODULES)
    if not modules:
        return config
    kinds: dict[str, str] = {}
    for module in modules:
        kind = module.get("type") if isinstance(module, Mapping) else None
        folder = module.get("path") if isinstance(module, Mapping) else None
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise CheckpointError(f"{checkpoint.path}: {MODULES} has an entry without type or path")
        kinds[kind.rpartition(".")[2]] = folder
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {MODULES} has {short(unknown[0])}, but only Transformer, Pooling "
            "and Normalize are supported"
        )
    changes: dict[str, Any] = {"normalizes": "Normalize" in kinds}
    if "Pooling" in kinds:
        changes["pooling"] = _pooling(kinds["Pooling"], checkpoint)
    longest = Reader(checkpoint.json("sentence_bert_config.json"), where="sentence_bert_config")
    if longest.has("max_seq_length"):
        length = longest.integer("max_seq_length", 1, MAX_POSITIONS)
        changes["max_position_embeddings"] = min(length, config.max_position_embeddings)
    return replace(config, **changes)


def _pooling(folder: str, checkpoint: Checkpoint) -> str:
    if not FOLDER.fullmatch(folder):
        raise CheckpointError(f"{checkpoint.path}: {MODULES} leads to {short(folder)}")
    where = f"{folder}/config.json"
    written = checkpoint.json(where)
    modes = [name for name, value in written.items() if name.startswith("pooling_mode_") and value]
    mode = written.get("pooling_mode")
    found = [POOLINGS.get(name) for name in modes]
    if mode is not None:
        modes, found = [str(mode)], [MODES.get(str(mode))]
    if len(found) == 1 and found[0] is not None:
        return found[0]
    raise UnsupportedModelError(
        f"{checkpoint.path}: {where} pools by {short(' and '.join(modes) or 'nothing')}, but only "
        "one of cls, mean and last is supported"
    )
