"""How evenly the experts of a mixture are loaded, for /metrics.

The engine counts on the device (`--count-expert-tokens`) and is asked at a scrape, between two of
its steps; one that is in a long step is not waited for. Knows no HTTP.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.engine import ServingEngine
from octavo.errors import OctavoError

LEAST_INTERVAL_S = 5.0  # between two questions, however many scrape: each waits for the device
PATIENCE_S = 1.0  # of a scrape; Prometheus' own is 10 s
# On average, for a figure: the largest of some hundred experts' shares of fewer tokens is large by
# chance alone.
LEAST_TOKENS_EACH = 100


def imbalance(tokens: Sequence[int]) -> float:
    """The most that one expert of a layer got over the mean: 1 is even, 0 is nothing at all."""
    return max(tokens) * len(tokens) / (sum(tokens) or 1)


class ExpertLoad(Collector):
    """What was last heard of an engine's experts. Says nothing where nobody counts.

    A layer's imbalance is that of a window: the tokens since the last figure, as soon as there are
    enough. So it follows what the traffic is now, and idle hours leave it as it was.
    """

    def __init__(self, engine: ServingEngine, *, prefix: str):
        self._engine = engine
        self._prefix = prefix
        self._asked_s: float | None = None
        self._tokens: dict[str, list[int]] = {}  # since the engine started or woke, by layer
        self._window_start: dict[str, list[int]] = {}
        self._imbalance: dict[str, float] = {}

    async def refresh(self) -> None:
        """Ask the engine, unless it was asked just now. What it cannot tell stays as it was."""
        now_s = time.monotonic()
        if self._asked_s is not None and now_s - self._asked_s < LEAST_INTERVAL_S:
            return
        counts = {(name, value) for name, value, *_ in self._engine.settings}
        if ("count_expert_tokens", "True") not in counts:
            return
        self._asked_s = now_s
        with contextlib.suppress(OctavoError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                self._note(await self._engine.operations.expert_tokens())

    def _note(self, counted: dict[str, list[int]]) -> None:
        for layer, tokens in counted.items():
            start = self._window_start.get(layer, [0] * len(tokens))
            window = [now - before for now, before in zip(tokens, start, strict=True)]
            if min(window) < 0:  # the engine slept, and counts from 0 since it woke
                self._window_start[layer], window = [0] * len(tokens), tokens
            if sum(window) >= LEAST_TOKENS_EACH * len(window):
                self._imbalance[layer] = imbalance(window)
                self._window_start[layer] = tokens
            self._tokens[layer] = tokens

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask an engine that may not have started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if not self._tokens:
            return
        of_all = CounterMetricFamily(
            self._prefix + "expert_tokens",
            "Tokens that an expert got, by its number, summed over the layers",
            labels=["expert"],
        )
        for expert, tokens in enumerate(zip_longest(*self._tokens.values(), fillvalue=0)):
            of_all.add_metric([str(expert)], sum(tokens))
        yield of_all
        uneven = GaugeMetricFamily(
            self._prefix + "expert_load_imbalance_ratio",
            "Tokens of the layer's busiest expert over the mean of its experts; 1 is even",
            labels=["layer"],
        )
        for layer, ratio in self._imbalance.items():
            uneven.add_metric([layer], ratio)
        yield uneven
