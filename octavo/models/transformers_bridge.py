"""Any decoder of transformers': its own modules, with our paged attention in them.

Only wiring: `octavo.layers.transformers_attention` is what attends, and the modules bring their
names of weights. A step's tokens are one row of transformers' batch. No code of a checkpoint runs.
"""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Decoded

from octavo.config import ModelConfig, excerpt
from octavo.errors import UnsupportedModelError
from octavo.layers import Attention, Build, Slot, StepContext
from octavo.layers.transformers_attention import NAME, Attend, Survey, paged
from octavo.models.base import Model


class _Given(nn.Module):
    """Stands in the decoder's place when the head runs: what comes out is what was put in."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Decoded:
        return Decoded(last_hidden_state=inputs_embeds)


class TransformersBridge(Model):
    """Decoder and head, run one after the other: the head sees wanted tokens only.

    The modules start without memory. A weight gets its own when it is loaded.

    Raises:
        UnsupportedModelError: transformers cannot build it, or our attention cannot run it.
    """

    def __init__(self, config: ModelConfig, build: Build, *, max_positions: int):
        super().__init__()
        self._device = build.device
        written = json.loads(config.transformers_config or "{}")
        try:
            model = _without_memory(written, build.dtype)
            self._places = _places(model)
            self._prefix = model.base_model_prefix
            self.decoder: Any = getattr(model, self._prefix)
            setattr(model, self._prefix, _Given())
            self.head: Any = model
            survey = self._survey(config)
            for part in (self.decoder, self.head):
                _compute_buffers(part, build.device)
            for layer, (module, shape) in enumerate(survey.layers()):
                module.attend = Attention(shape, layer, build)
        except Exception as error:  # each of its families has its own ways to fail
            raise UnsupportedModelError(
                f"transformers' {written.get('model_type')} cannot be run by Octavo: "
                f"{excerpt(error) or type(error).__name__}"
            ) from error

    def _survey(self, config: ModelConfig) -> Survey:
        """What attention is asked for, by a step of tensors that are shapes alone."""
        survey = Survey(tuple(layer.attention for layer in config.layers))
        ids = torch.zeros(2, dtype=torch.int64, device="meta")
        with torch.inference_mode():
            logits = self.logits(self._decode(ids, ids, survey))
        if logits.shape != (2, config.vocab_size):
            raise UnsupportedModelError(f"its head makes {tuple(logits.shape)[1:]} logits")
        survey.layers()
        return survey

    def slots(self) -> dict[str, Slot]:
        """Checkpoint tensor names and the places that wait for them; what is tied has one name."""
        return {
            name: Slot(tuple(getattr(*places[0]).shape), partial(self._load, places))
            for name, places in self._places.items()
        }

    def slot_name(self, name: str) -> str:
        """What was saved without its head lacks the decoder's name in front."""
        whole = f"{self._prefix}.{name}"
        return whole if whole in self._places else name

    def _load(self, places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
        waiting = getattr(*places[0])
        loaded = torch.empty_like(waiting, device=self._device, requires_grad=False).copy_(tensor)
        if isinstance(waiting, nn.Parameter):
            loaded = nn.Parameter(loaded, requires_grad=False)
        for module, name in places:
            setattr(module, name, loaded)

    def forward(self, token_ids: Tensor, context: StepContext) -> Tensor:
        """token_ids [T] -> hidden states of the wanted ones [S, hidden_size]."""
        hidden = self._decode(token_ids, context.positions, paged(context))
        return context.wanted_of(hidden)[0]

    def _decode(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        row = {"input_ids": token_ids[None], "position_ids": positions[None]}
        hidden: Tensor = self.decoder(**row, use_cache=False, **{NAME: attend}).last_hidden_state
        return hidden[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden_size] -> logits [S, vocab_size], scaled or capped as there."""
        logits: Tensor = self.head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]


def _without_memory(written: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model for a config, for inference, on the device where tensors are shapes."""
    config = CONFIG_MAPPING[written["model_type"]].from_dict(written)
    create: Any = AutoModelForCausalLM.from_config  # untyped
    with torch.device("meta"):
        model = create(config, dtype=dtype, attn_implementation=NAME)
    if not model.is_backend_compatible():
        raise UnsupportedModelError("transformers does not let others do all of its attention")
    return model.eval()


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each tensor of a checkpoint belongs: in several modules, if they share it."""
    names: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, attribute = name.rpartition(".")
        first = names.setdefault(id(tensor), name)
        places.setdefault(first, []).append((model.get_submodule(owner), attribute))
    return places


def _compute_buffers(model: Any, device: str) -> None:
    """Tables that no checkpoint has (rotary frequencies), by the rules of transformers' loading."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # of what is on no device yet, nothing comes
