"""The server's Prometheus metrics: vLLM's names with our prefix. Knows no HTTP.

Counts and gauges of the engine are read from it at every scrape. TTFT and end-to-end latency are
seen from here, so they include tokenizing and the way between the processes; what a request
waited and computed is told by the engine. Names, types and labels are frozen by `docs/metrics.md`.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo import __version__
from octavo.core import EngineStats, FinishReason, SleepReport
from octavo.engine import ServingEngine
from octavo.errors import EngineDeadError
from octavo.server.experts import ExpertLoad
from octavo.server.watchdog import State

PREFIX = "octavo_"
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_SLOW_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_AWAKE = SleepReport(
    level=0, kv_cache_bytes=0, weight_bytes=0, host_weight_bytes=0, freed_bytes=0, seconds=0.0
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class ServerMetrics:
    """The books of one front-end process, in a registry of its own."""

    def __init__(self, engine: ServingEngine):
        registry = _Registry()
        registry.register(_EngineMetrics(engine))
        self._experts = ExpertLoad(engine, prefix=PREFIX)
        registry.register(self._experts)
        ProcessCollector(registry=registry)
        build = Info(PREFIX + "build", "What runs here; always 1", registry=registry)
        build.info({"version": __version__})
        self._registry = registry
        self.http_requests = Counter(
            PREFIX + "http_requests", "HTTP responses", ["route", "code"], registry=registry
        )
        self.request_success = Counter(
            PREFIX + "request_success",
            "Answers by the way they ended",
            ["finished_reason"],
            registry=registry,
        )
        for reason in FinishReason:  # so that rates exist from the start
            self.request_success.labels(reason.value)
        self.time_to_first_token = self._seconds(
            "time_to_first_token", "From the request's arrival to the first token of an answer"
        )
        self.inter_token_latency = self._seconds(
            "inter_token_latency",
            "Between one token of an answer and the next",
            buckets=_FAST_S,
        )
        self.e2e_request_latency = self._seconds(
            "e2e_request_latency", "From the request's arrival to the end of an answer"
        )
        self.request_queue_time = self._seconds(
            "request_queue_time", "From arrival at the engine to the first step"
        )
        self.request_prefill_time = self._seconds(
            "request_prefill_time", "From the first step to the first token"
        )
        self.request_decode_time = self._seconds(
            "request_decode_time", "From the first token of an answer to its last"
        )
        self.request_prompt_tokens = self._tokens(
            "request_prompt_tokens", "Prompt tokens of an answer's request"
        )
        self.request_generation_tokens = self._tokens(
            "request_generation_tokens", "Tokens of an answer"
        )

    def show_state(self, ask: Callable[[], State]) -> None:
        """From now on, tell how it stands with the engine; asked at every scrape."""
        self._registry.register(_StateMetric(ask))

    def register(self, collector: Collector) -> None:
        """Export what this one tells, too; asked at every scrape."""
        self._registry.register(collector)

    async def refresh(self) -> None:
        """Ask for what does not come with the engine's news."""
        await self._experts.refresh()

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _seconds(self, name: str, text: str, *, buckets: tuple[float, ...] = _SLOW_S) -> Histogram:
        return Histogram(f"{PREFIX}{name}_seconds", text, buckets=buckets, registry=self._registry)

    def _tokens(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=_TOKENS, registry=self._registry)


class _Registry(CollectorRegistry):
    """Leaves out when each series began: a third of the text, and nobody asks."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class _EngineMetrics(Collector):
    """Reads the engine's own books at every scrape, so nothing is counted twice."""

    def __init__(self, engine: ServingEngine):
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask an engine that may not have started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield _gauge("engine_up", "1 while the engine can answer", _is_alive(self._engine))
        yield from _gauges(stats)
        yield from _sleep(self._engine.rest.report)
        yield from _counters(stats)
        if stats.max_loras:
            yield from _adapters(stats)


class _StateMetric(Collector):
    """1 for the state that holds, 0 for the others: so each state has a series from the start."""

    def __init__(self, ask: Callable[[], State]):
        self._ask = ask

    def describe(self) -> Iterator[Metric]:
        """Nothing: see `_EngineMetrics`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        now = self._ask()
        states = GaugeMetricFamily(
            PREFIX + "engine_state",
            "How it stands with the engine: 1 for the state that holds",
            labels=["state"],
        )
        for state in State:
            states.add_metric([state.value], state is now)
        yield states


def _is_alive(engine: ServingEngine) -> bool:
    try:
        engine.check_health()
    except EngineDeadError:
        return False
    return True


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    num_used = stats.num_blocks - stats.num_free_blocks
    usage = num_used / (stats.num_blocks or 1)
    yield _gauge("num_requests_running", "Requests in the current batch", stats.num_running)
    yield _gauge("num_requests_waiting", "Requests in the queue", stats.num_waiting)
    yield _gauge("kv_cache_usage_ratio", "KV blocks in use; 1 is all", usage)
    yield _gauge("kv_blocks", "KV blocks of the pool", stats.num_blocks)
    yield _gauge("kv_blocks_free", "KV blocks that nobody holds", stats.num_free_blocks)
    by_reason = GaugeMetricFamily(
        PREFIX + "num_requests_waiting_by_reason",
        "Requests in the queue, by the limit that binds them",
        labels=["reason"],
    )
    for reason, count in stats.waiting_by_reason.items():
        by_reason.add_metric([reason], count)
    yield by_reason


def _sleep(report: SleepReport | None) -> Iterator[Metric]:
    report = report or _AWAKE
    yield _gauge("sleep_level", "How deep the engine sleeps; 0: awake", report.level)
    given_up = GaugeMetricFamily(
        PREFIX + "sleep_released_bytes",
        "What a sleeping engine has given up, by what it held",
        labels=["memory"],
    )
    given_up.add_metric(["kv_cache"], report.kv_cache_bytes)
    given_up.add_metric(["weights"], report.weight_bytes)
    yield given_up


def _adapters(stats: EngineStats) -> Iterator[Metric]:
    """Where adapters are served: requests by adapter, and the same as vLLM tells it."""
    requests = GaugeMetricFamily(
        PREFIX + "lora_requests",
        "Requests that name an adapter, by adapter and state",
        labels=["lora_name", "state"],
    )
    for name, counts in stats.adapters.items():
        for state, count in zip(("running", "waiting"), counts, strict=True):
            requests.add_metric([name, state], count)
    yield requests
    running, waiting = (
        ",".join(name for name, counts in stats.adapters.items() if counts[place])
        for place in (0, 1)
    )
    info = GaugeMetricFamily(
        PREFIX + "lora_requests_info",
        "Adapters with requests, and how many a step may hold; the value is the time in seconds",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    info.add_metric([str(stats.max_loras), running, waiting], time.time())
    yield info


def _counters(stats: EngineStats) -> Iterator[Metric]:
    counts = [
        ("engine_steps", "Steps of the engine", stats.num_steps),
        ("num_preemptions", "Requests that lost their KV blocks", stats.num_preemptions),
        ("prompt_tokens", "Prompt tokens computed", stats.num_prompt_tokens),
        ("generation_tokens", "Tokens sampled", stats.num_generation_tokens),
        (
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            stats.num_prefix_queries,
        ),
        ("prefix_cache_hits", "Prompt tokens found there", stats.num_prefix_hits),
    ]
    for name, text, value in counts:
        yield CounterMetricFamily(PREFIX + name, text, value=value)
    moved = CounterMetricFamily(
        PREFIX + "kv_block_transfers",
        "KV blocks copied, by the tiers that they went from and to",
        labels=["way"],
    )
    for way, count in stats.num_transfers.items():
        moved.add_metric([way], count)
    yield moved


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)
