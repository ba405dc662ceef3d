"""What a config says of a model, supported or not: who runs it, what is refused and what is unread.

A reader ends at the first thing that it refuses. Here that entry is taken out and the config read
again, so that all reasons come together. Knows no tensors and no torch.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.config.architectures import (
    BRIDGE,
    architecture_of,
    architectures,
    hf_name_of,
    read_model_config,
    read_with,
    refuse_unknown_names,
)
from octavo.config.checkpoint import Checkpoint
from octavo.config.families.transformers_bridge import REMEDY, is_installed
from octavo.config.model import ModelConfig
from octavo.config.options import EngineOptions
from octavo.config.planned_weights import WeightGroup, plan_weights
from octavo.config.plugins import Architecture
from octavo.config.reading import Reader
from octavo.config.resolve import DeviceFacts, resolve
from octavo.errors import CheckpointError, ConfigError, ModelError, UnsupportedModelError

# Of transformers' configs: training, bookkeeping, and what only its own code is steered by.
BOOKKEEPING = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "auto_map"),
    *("torch_dtype", "dtype", "pad_token_id", "is_encoder_decoder", "problem_type"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("initializer_range", "pretraining_tp", "chunk_size_feed_forward", "id2label", "label2id"),
    *("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"),
    *("output_router_logits", "router_aux_loss_coef", "attn_implementation"),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one architecture makes of a config."""

    architecture: Architecture
    config: ModelConfig | None  # without what is refused; None: even so it cannot be read
    refused: tuple[str, ...]  # why it is not supported; empty: it is
    unread: tuple[str, ...]  # entries that say something and that nobody asked for


@dataclass(frozen=True, slots=True)
class Inspection:
    """Who would run a model, and why not others."""

    hf_name: str
    model_type: str | None
    ours: Reading | None  # None: no package here has this architecture
    nearest: Reading | None  # where there is none: ours that refuses and leaves out least
    problems: tuple[str, ...]  # why it is not `ours`; empty: it is
    bridge_problems: tuple[str, ...]  # why transformers' modules do not run it here

    @property
    def best(self) -> Reading | None:
        """The reading to look at: the one that runs it, or else the nearest."""
        return self.ours or self.nearest


class _Watched(dict[str, Any]):
    """A config that notes which entries were asked for, of it and of its copies."""

    def __init__(self, config: Mapping[str, Any], asked: set[str] | None = None):
        super().__init__(config)
        self.asked: set[str] = set() if asked is None else asked

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def pop(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().pop(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def __copy__(self) -> "_Watched":
        return _Watched(self, self.asked)


def inspect_config(checkpoint: Checkpoint) -> Inspection:
    """All that there is to say about the config of a located checkpoint.

    Raises:
        CheckpointError: the config cannot be read at all, or names no architecture.
    """
    written, generation_config = checkpoint.config(), checkpoint.generation_config()
    hf_name = hf_name_of(written)
    ours: Reading | None = None
    nearest: Reading | None = None
    problems: tuple[str, ...]
    try:
        ours = read_all(architecture_of(written), written, generation_config)
        problems = ours.refused
        if checkpoint.kind == "gguf":
            refuse_unknown_names(checkpoint, ours.architecture)
        if not problems:
            # What lies beside the config may be refused, too.
            read_model_config(checkpoint, "octavo")
    except CheckpointError as error:
        problems = (str(error),)
    except UnsupportedModelError as error:
        problems = (*(ours.refused if ours else ()), str(error))
        readings = [read_all(one, written, generation_config) for one in architectures().values()]
        nearest = min((one for one in readings if one.config), key=_distance, default=None)
    except ConfigError as error:  # of another package
        problems = (str(error),)
    model_type = written.get("model_type")
    return Inspection(
        hf_name=hf_name,
        model_type=model_type if isinstance(model_type, str) else None,
        ours=ours,
        nearest=None if ours else nearest,
        problems=problems,
        bridge_problems=_why_not_bridged(checkpoint, written) if problems else (),
    )


def read_all(
    architecture: Architecture,
    written: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
) -> Reading:
    """Read a config as an architecture does, to the end: past each entry that it refuses."""
    rest = copy.deepcopy(dict(written))
    refused: dict[str, str] = {}
    asked: set[str] = set()
    config: ModelConfig | None = None
    while config is None:
        watched = _Watched(rest)
        try:
            config = read_with(architecture, Reader(watched, generation_config))
        except (ModelError, ConfigError) as error:
            field = error.field if isinstance(error, ModelError) else None
            if field not in refused:
                refused[field or ""] = str(error)
            if field is None or field == "model_type" or not _take_out(rest, field):
                break
        finally:
            asked |= watched.asked
    unread = (name for name in written if name not in asked | BOOKKEEPING)
    says = (name for name in unread if written[name] not in (None, False, [], {}))
    return Reading(architecture, config, tuple(refused.values()), tuple(sorted(says)))


def weight_groups(config: ModelConfig) -> tuple[WeightGroup, ...]:
    """A model's weights by kind, plain and in the config's own dtype, on a device of any size."""
    anywhere = DeviceFacts("cpu", "any", 1, 2**62, 2**62)
    options = EngineOptions.from_flat("any", {"device": "cpu", "dtype": config.dtype})
    groups = plan_weights(resolve(options, config, anywhere), packed=False)
    return tuple(group for group in groups if group.num_parameters)


def _distance(reading: Reading) -> tuple[int, int]:
    return len(reading.refused), len(reading.unread)


def _why_not_bridged(checkpoint: Checkpoint, written: Mapping[str, Any]) -> tuple[str, ...]:
    if checkpoint.kind == "gguf":
        return ("it reads safetensors, not GGUF; take the model's safetensors",)
    if not is_installed():
        return (f"it is not installed: {REMEDY}",)
    return read_all(BRIDGE, written).refused


def _take_out(section: dict[str, Any], name: str) -> bool:
    """Take an entry out of a config and of the sections in it; whether there was one."""
    found = section.pop(name, None) is not None
    for inner in section.values():
        found |= isinstance(inner, dict) and _take_out(inner, name)
    return found
