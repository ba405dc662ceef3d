"""Which LoRA adapter each token of a step goes through, told to the device. Knows no plans.

The slots of all tokens lie in one place for as long as the runner lives, so that CUDA graphs can
read them there.
"""

from collections.abc import Sequence

import numpy as np

from octavo.layers import AdapterSlots
from octavo.models import Model
from octavo.runner.layout import StepLayout
from octavo.runner.links import Uplink
from octavo.runner.rows import Row


class TokenAdapters:
    """The way down of tokens' adapters. Sole writer: the model runner."""

    def __init__(self, slots: AdapterSlots, device: str):
        self._slots = slots
        self._uplink = Uplink(len(slots.tokens), device)
        slots.tokens = self._uplink.device_memory.fill_(-1)

    def send(self, step: StepLayout, rows: Sequence[Row], num_tokens: int) -> None:
        """Make room for the adapters of a step, and tell which token has which.

        Args:
            step: the layout of the step.
            rows: its sequences, in their order.
            num_tokens: of the pass that will run, which may be more than the step has.
        """
        places = self._slots.slots_of(row.adapter for row in rows if row.adapter is not None)
        of_rows = [-1 if row.adapter is None else places[row.adapter] for row in rows]
        tokens = self._uplink.next_buffer().numpy()
        tokens[: step.sizes.num_tokens] = np.repeat(of_rows, np.diff(step.query_starts))
        tokens[step.sizes.num_tokens : num_tokens] = -1
        self._uplink.send(num_tokens)


def create_token_adapters(model: Model, device: str) -> TokenAdapters | None:
    """That of a model which has slots for adapters."""
    return None if model.adapters is None else TokenAdapters(model.adapters, device)
