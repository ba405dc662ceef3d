"""From the hidden states of a prompt to its one vector: gather some of them, then a list of steps.

Which hidden states, and whether they come in one piece or in many, is `Gather`'s business; what
happens to the gathered vector (a head, a norm) is a list of functions. Knows no rows and no plans.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.core import PoolingParams

Step = Callable[[Tensor], Tensor]  # from vector to vector, fp32


class Gather(Protocol):
    """Picks a prompt's hidden states while chunks of it are computed, each token once."""

    def wanted(self, start: int, stop: int) -> range:
        """Those positions of a chunk whose hidden states it takes."""
        ...

    def add(self, hidden: Tensor) -> None:
        """Take them: [n, hidden_size], in the model's dtype, in order."""
        ...

    @property
    def vector(self) -> Tensor | None:
        """What they came to: [hidden_size] fp32; None while some are missing."""
        ...


class LastToken:
    """The hidden state of the last token, which alone has seen all of a decoder's prompt."""

    def __init__(self, num_tokens: int):
        self._last = num_tokens - 1
        self.vector: Tensor | None = None

    def wanted(self, start: int, stop: int) -> range:
        return range(max(start, self._last), min(stop, self._last + 1))

    def add(self, hidden: Tensor) -> None:
        self.vector = hidden[0].to(torch.float32, copy=True)  # the next step writes over it


class FirstToken:
    """The hidden state of the first token, where each token sees all of the prompt."""

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def wanted(self, start: int, stop: int) -> range:
        return range(start, min(stop, 1))

    def add(self, hidden: Tensor) -> None:
        self.vector = hidden[0].to(torch.float32, copy=True)


class Mean:
    """The mean over all tokens: a running sum in fp32, however the prompt is cut."""

    def __init__(self, num_tokens: int):
        self._num_tokens = num_tokens
        self._num_left = num_tokens
        self._sum: Tensor | None = None

    def wanted(self, start: int, stop: int) -> range:
        return range(start, min(stop, self._num_tokens))

    def add(self, hidden: Tensor) -> None:
        total = hidden.float().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._num_left -= len(hidden)

    @property
    def vector(self) -> Tensor | None:
        if self._sum is None or self._num_left:
            return None
        return self._sum / self._num_tokens


class Pooler:
    """One prompt's way to its vector."""

    def __init__(self, gather: Gather, steps: Sequence[Step], *, uses_head: bool = False):
        self._gather = gather
        self._steps = steps
        self._uses_head = uses_head

    def wanted(self, start: int, stop: int) -> range:
        """The positions of a share whose hidden states it takes."""
        return self._gather.wanted(start, stop)

    def read(self, hidden: Tensor, head: Step) -> Tensor | None:
        """Take hidden states [n, hidden_size]; the vector, fp32, with the last of them.

        `head`: the model's, from [n, hidden_size] to [n, values], in the model's dtype.
        """
        self._gather.add(hidden)
        vector = self._gather.vector
        if vector is None:
            return None
        if self._uses_head:
            vector = head(vector[None].to(hidden.dtype))[0].float()
        for step in self._steps:
            vector = step(vector)
        return vector


def create_pooler(params: PoolingParams, num_tokens: int) -> Pooler:
    """The pooler of a prompt of so many tokens."""
    gathers: dict[str, Callable[[], Gather]] = {
        "cls": FirstToken,
        "last": lambda: LastToken(num_tokens),
        "mean": lambda: Mean(num_tokens),
    }
    steps = [normalize] if params.normalize else []
    return Pooler(gathers[params.pooling](), steps, uses_head=params.uses_head)


def normalize(vector: Tensor) -> Tensor:
    """The vector divided by its Euclidean length, as `torch.nn.functional.normalize` does it."""
    return torch.nn.functional.normalize(vector, dim=-1)
