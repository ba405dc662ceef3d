"""OpenTelemetry: a span for each request that generates, and below it one for each phase.

A span is made when its request is over, from the books that are kept anyway, so nothing is added to
the way of a token. Attributes follow the GenAI conventions; no text of a client goes into any. The
packages are the extra `otel`, and imported only where an endpoint is set.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from octavo import __version__
from octavo.core import SamplingParams
from octavo.errors import ConfigError
from octavo.server.answers import Answers, Tally
from octavo.server.errors import ClientDisconnected, reply_to

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

EXPORT_TIMEOUT_S = 5  # a collector that is gone must hold no drain up for long
NS = 1_000_000_000
CHATS = ("/v1/chat/completions", "/v1/responses")


class RequestTracer:
    """From the books of a request to its spans. Owns the exporter, which has a thread of its own.

    The provider is ours and not the process', so that nobody else's spans go to our collector.
    """

    def __init__(self, exporter: "SpanExporter"):
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = {"service.name": "octavo", "service.version": __version__}
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before.
        resource = Resource.create(service).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> "RequestTracer":
        """One that sends to a collector by OTLP over HTTP."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise ConfigError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error.name} is missing): "
                "pip install 'octavo[otel]'"
            ) from None
        logging.getLogger("opentelemetry").addFilter(_of_one_line)
        return cls(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S))

    async def close(self) -> None:
        """Send what is left, and end."""
        await asyncio.to_thread(self._provider.shutdown)

    @contextmanager
    def watch(self, scope: Scope, answers: Answers) -> Iterator[None]:
        """Tell of a request when it is over."""
        try:
            yield
        finally:
            self._record(scope, answers)

    def _record(self, scope: Scope, answers: Answers) -> None:
        now_s, now_ns = time.monotonic(), time.time_ns()

        def at(monotonic_s: float) -> int:
            return now_ns - int((now_s - monotonic_s) * NS)

        model: str = scope["octavo.model"]
        operation = "chat" if scope["path"] in CHATS else "text_completion"
        if answers.task.pooling is not None:
            operation = "embeddings"
        parent = self._propagator.extract(dict(Headers(scope=scope)))
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=parent,
            kind=_kind_of_server(),
            attributes=_request_attributes(model, answers.task.sampling, operation)
            | {"octavo.request_id": scope["octavo.request_id"]}
            | _result_attributes(answers),
            start_time=at(answers.arrival_s),
        )
        _set_outcome(span, answers.error)
        if span.is_recording():
            self._record_phases(span, answers, at)
        span.end(now_ns)

    def _record_phases(self, span: "Span", answers: Answers, at: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        below = set_span_in_context(span)

        def phase(name: str, start_s: float, end_s: float, choice: int) -> None:
            attributes = {"octavo.choice": choice}
            child = self._tracer.start_span(
                name, below, start_time=at(start_s), attributes=attributes
            )
            child.end(at(max(start_s, end_s)))

        for choice, tally in enumerate(answers.tallies):
            if tally.first_token_s:
                for name, start_s, end_s in phases_of(tally):
                    phase(name, start_s, end_s, choice)


def phases_of(tally: Tally) -> list[tuple[str, float, float]]:
    """Where the time of an answer went: name, begin and end of each phase, on the monotonic clock.

    Queue and prefill are as long as the engine says; they end where the first token came.
    """
    first_s = tally.first_token_s
    prefill_s = first_s - tally.prefill_time_s
    return [
        ("queue", prefill_s - tally.queue_time_s, prefill_s),
        ("prefill", prefill_s, first_s),
        ("decode", first_s, tally.last_token_s),
    ]


def _request_attributes(model: str, sampling: SamplingParams, operation: str) -> dict[str, Any]:
    asked = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "seed": sampling.seed,
        "frequency_penalty": sampling.frequency_penalty or None,
        "presence_penalty": sampling.presence_penalty or None,
        "choice.count": sampling.n if sampling.n > 1 else None,
    }
    fixed = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
    }
    return fixed | {f"gen_ai.request.{k}": v for k, v in asked.items() if v is not None}


def _result_attributes(answers: Answers) -> dict[str, Any]:
    num_prompt_tokens, num_tokens = answers.num_tokens
    firsts = [tally.first_token_s for tally in answers.tallies if tally.num_tokens]
    reasons = [t.finish_reason.value for t in answers.tallies if t.finish_reason is not None]
    found: dict[str, Any] = {
        "gen_ai.response.id": answers.response_id,
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.output_tokens": num_tokens,
        "gen_ai.usage.cache_read.input_tokens": sum(
            tally.num_cached_tokens for tally in answers.tallies[:: answers.num_per_prompt]
        ),
    }
    if reasons:
        found["gen_ai.response.finish_reasons"] = reasons
    if firsts:
        found["gen_ai.server.time_to_first_token"] = min(firsts) - answers.arrival_s
    return found


def _set_outcome(span: "Span", error: Exception | None) -> None:
    from opentelemetry.trace import Status, StatusCode

    if isinstance(error, ClientDisconnected):
        span.set_attribute("error.type", "client_disconnected")
    elif error is not None:
        reply = reply_to(error)
        span.set_attribute("error.type", reply.code or reply.type)
        if reply.status >= 500:  # below that it is the client's failure, not ours
            span.set_status(Status(StatusCode.ERROR))


def _kind_of_server() -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind.SERVER


def _of_one_line(record: logging.LogRecord) -> bool:
    """A collector that is away is worth a line each time, and no stack."""
    record.exc_info = None
    return True
