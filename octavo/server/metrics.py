"""The server's Prometheus metrics, named as vLLM's so that dashboards fit. Knows no HTTP.

Gauges come from the engine when somebody scrapes; latencies are seen from the front end, so they
include queues, tokenizing and the way between the processes.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.core import FinishReason
from octavo.engine import ServingEngine

PREFIX = "octavo:"
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """The books of one front-end process, in a registry of its own."""

    def __init__(self, engine: ServingEngine):
        registry = CollectorRegistry()
        registry.register(_EngineGauges(engine))
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
        self.time_to_first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_SLOW_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            PREFIX + "inter_token_latency_seconds",
            "Between one token of an answer and the next",
            buckets=_FAST_S,
            registry=registry,
        )
        self.e2e_request_latency = Histogram(
            PREFIX + "e2e_request_latency_seconds",
            "From the request's arrival to the end of an answer",
            buckets=_SLOW_S,
            registry=registry,
        )

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _EngineGauges(Collector):
    """Reads the engine's own books at every scrape, so nothing is counted twice."""

    def __init__(self, engine: ServingEngine):
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask an engine that may not have started."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        num_used = stats.num_blocks - stats.num_free_blocks
        gauges: list[tuple[str, str, float]] = [
            ("num_requests_running", "Requests in the current batch", stats.num_running),
            ("num_requests_waiting", "Requests in the queue", stats.num_waiting),
            (
                "kv_cache_usage_perc",
                "KV blocks in use; 1 is all",
                num_used / (stats.num_blocks or 1),
            ),
            ("kv_blocks_free", "KV blocks that nobody holds", stats.num_free_blocks),
            ("kv_blocks_total", "KV blocks of the pool", stats.num_blocks),
        ]
        counters: list[tuple[str, str, float]] = [
            ("num_preemptions", "Requests that lost their blocks", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens computed", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens sampled", stats.num_generation_tokens),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache",
                stats.num_prefix_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found there", stats.num_prefix_hits),
        ]
        by_reason = GaugeMetricFamily(
            PREFIX + "num_requests_waiting_by_reason",
            "Requests in the queue, by the limit that binds them",
            labels=["reason"],
        )
        for reason, count in stats.waiting_by_reason.items():
            by_reason.add_metric([reason], count)
        yield by_reason
        moved = CounterMetricFamily(
            PREFIX + "kv_block_transfers",
            "KV blocks copied, by the tiers that they went from and to",
            labels=["way"],
        )
        for way, count in stats.num_transfers.items():
            moved.add_metric([way], count)
        yield moved
        for name, text, value in gauges:
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in counters:
            yield CounterMetricFamily(PREFIX + name, text, value=value)
