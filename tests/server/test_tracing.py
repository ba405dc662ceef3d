"""Traces: the tree of a request, its attributes, the client's context, and a real collector."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server.helpers import CONFIG, eventually, serving

from octavo.errors import ConfigError
from octavo.server import ServerConfig, create_app
from octavo.server.middleware import Watched
from octavo.server.tracing import RequestTracer
from octavo.testing.fake_engine import FakeEngine

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "a secret of mine"


async def spans_of(
    engine: FakeEngine, path: str, body: dict, headers: dict[str, str] | None = None
) -> tuple[httpx.Response, list[ReadableSpan]]:
    """What one request leaves behind."""
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter)
    app = create_app(engine, CONFIG)
    app.add_middleware(Watched, watchers=[tracer.watch])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        response = await client.post(path, json=body, headers=headers)
    await tracer.close()
    return response, list(exporter.get_finished_spans())


async def test_a_request_is_a_span_with_one_for_each_phase(engine: FakeEngine) -> None:
    engine.script.queue_delay_s, engine.script.token_delay_s = 0.05, 0.01
    body = {
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": [SECRET],
        "stream": True,
    }
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine"}
    response, spans = await spans_of(engine, "/v1/chat/completions", body, headers)
    assert response.status_code == 200
    by_name = {span.name: span for span in spans}
    root = by_name.pop("chat fake-model")
    assert set(by_name) == {"queue", "prefill", "decode"}
    assert root.kind is SpanKind.SERVER and root.status.status_code is StatusCode.UNSET
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert root.parent is not None and f"{root.parent.span_id:016x}" == PARENT_ID
    for span in by_name.values():
        assert span.parent is not None and span.parent.span_id == root.context.span_id
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    assert by_name["queue"].end_time == by_name["prefill"].start_time
    assert by_name["prefill"].end_time == by_name["decode"].start_time
    queued_ns = by_name["queue"].end_time - by_name["queue"].start_time
    assert abs(queued_ns - 50e6) < 1e6
    told = dict(root.attributes or {})
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == "fake-model"
    assert told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.usage.input_tokens"] > len(SECRET)
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert 0.05 <= told["gen_ai.server.time_to_first_token"] < 5
    assert told["octavo.request_id"] == "mine"
    assert SECRET not in str([span.to_json() for span in spans])


async def test_a_failure_is_named_and_a_client_that_sampled_nothing_gets_nothing(
    engine: FakeEngine,
) -> None:
    engine.script.fail_after = 2
    body = {"prompt": SECRET, "max_tokens": 5, "n": 2}
    response, spans = await spans_of(engine, "/v1/completions", body)
    assert response.status_code == 500
    [root] = [span for span in spans if span.parent is None]
    assert root.name == "text_completion fake-model"
    assert root.status.status_code is StatusCode.ERROR
    told = dict(root.attributes or {})
    assert told["error.type"] == "generation_failed" and told["gen_ai.request.choice.count"] == 2
    unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    engine.script.fail_after = None
    assert (await spans_of(engine, "/v1/completions", body, unsampled))[1] == []


async def test_what_never_reaches_the_engine_leaves_no_span(engine: FakeEngine) -> None:
    response, [root] = await spans_of(engine, "/v1/completions", {"prompt": []})
    assert response.status_code == 400 and root.status.status_code is StatusCode.UNSET
    assert "error.type" in (root.attributes or {})
    assert (await spans_of(engine, "/v1/completions", {"prompt": "", "top_p": 5}))[1] == []
    assert (await spans_of(engine, "/tokenize", {"prompt": "Hello"}))[1] == []


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """One that keeps what it is sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_is_told_before_the_server_ends() -> None:
    with collector() as (endpoint, received):
        config = ServerConfig(otlp_traces_endpoint=endpoint)
        with serving(FakeEngine(), config) as live:
            body = {"prompt": "Hello", "max_tokens": 3}
            assert httpx.post(f"{live.url}/v1/completions", json=body).status_code == 200
        eventually(lambda: bool(received))
        [resource_spans] = received[0].resource_spans
        attributes = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
        assert attributes["service.name"] == "octavo"
        names = {span.name for scope in resource_spans.scope_spans for span in scope.spans}
        assert names == {"text_completion fake-model", "queue", "prefill", "decode"}


def test_no_import_where_it_is_off() -> None:
    code = (
        "import sys\nfrom octavo.server import ServerConfig, create_app\n"
        "from octavo.testing.fake_engine import FakeEngine\n"
        "create_app(FakeEngine(), ServerConfig())\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', "
        "'opentelemetry.exporter', 'google.protobuf'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[otel\]'"):
        create_app(FakeEngine(), ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318"))


def test_an_endpoint_that_is_no_http_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="port 4318"):
        ServerConfig(otlp_traces_endpoint="grpc://127.0.0.1:4317")
