"""/health, /ready, /metrics, /load and the like: what operators and their probes ask.

Liveness and readiness differ: a server that drains is alive but not ready. Knows no generation.
"""

from importlib.metadata import PackageNotFoundError, version

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from octavo.engine import ServingEngine
from octavo.server.errors import ErrorReply, HttpError, unavailable
from octavo.server.experts import imbalance
from octavo.server.keys import Scope
from octavo.server.replies import json_response
from octavo.server.routes_sleep import sleep_facts
from octavo.server.state import Route, ServerState
from octavo.server.watchdog import Condition, State


class OpsRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        return [
            Route("GET", "/health", self.health, Scope.PUBLIC),
            Route("GET", "/ready", self.ready, Scope.METRICS),
            Route("GET", "/version", self.version, Scope.METRICS),
            Route("GET", "/metrics", self.metrics, Scope.METRICS, media=("text/plain",)),
            Route("GET", "/load", self.load, Scope.METRICS),
            Route("GET", "/server_info", self.server_info, Scope.ADMIN),
            Route("GET", "/debug/requests", self.requests, Scope.ADMIN),
            Route("GET", "/debug/requests/{request_id}", self.why, Scope.ADMIN),
            Route("GET", "/debug/experts", self.experts, Scope.ADMIN),
            Route("POST", "/reset_prefix_cache", self.reset_prefix_cache, Scope.ADMIN),
        ]

    async def health(self, request: Request) -> Response:
        """200 while the engine can answer; `EngineDeadError` becomes the 503."""
        self._state.engine.check_health()
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while new requests are welcome, with the state of the engine either way."""
        condition = self._state.condition()
        refusal = refuse_unready(self._state.engine, condition)
        if refusal is not None:
            return refusal
        return json_response({"status": "ready", "state": condition.state, "why": condition.why})

    async def version(self, request: Request) -> Response:
        """As vLLM's."""
        return json_response({"version": octavo_version()})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        await self._state.metrics.refresh()
        exposition = self._state.metrics.exposition()
        return Response(exposition, headers={"content-type": CONTENT_TYPE_LATEST})

    async def load(self, request: Request) -> Response:
        """How busy the engine is, for whoever balances load; `server_load` is vLLM's."""
        stats = self._state.engine.stats()
        num_used = stats.num_blocks - stats.num_free_blocks
        return json_response(
            {
                "server_load": stats.num_running + stats.num_waiting,
                "num_requests_running": stats.num_running,
                "num_requests_waiting": stats.num_waiting,
                "kv_cache_usage_ratio": num_used / (stats.num_blocks or 1),
            }
        )

    async def server_info(self, request: Request) -> Response:
        """The model, its sleep, and every setting with where it came from and why."""
        model = self._state.engine.model
        settings = {
            name: {"value": value, "source": source, "why": why}
            for name, value, source, why in self._state.engine.settings
        }
        return json_response(
            {
                "version": octavo_version(),
                "model": model.name,
                "max_model_len": model.max_model_len,
                "vocab_size": model.vocab_size,
                "sleep": sleep_facts(self._state.engine),
                "settings": settings,
            }
        )

    async def requests(self, request: Request) -> Response:
        """All live requests, one entry for each answer."""
        statuses = await self._state.engine.operations.requests()
        return json_response({"requests": [msgspec.structs.asdict(status) for status in statuses]})

    async def experts(self, request: Request) -> Response:
        """How many tokens each expert of each layer got, and how uneven that is."""
        counted = await self._state.engine.operations.expert_tokens()
        if not counted:
            message = (
                "no experts' tokens are counted now: start a mixture with --count-expert-tokens, "
                "and wake the engine if it sleeps"
            )
            raise HttpError(ErrorReply(404, message, "invalid_request_error", None))
        layers = {
            name: {"imbalance": imbalance(tokens), "tokens": tokens}
            for name, tokens in counted.items()
        }
        return json_response({"layers": layers})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Let no content that is cached now be found again."""
        await self._state.engine.operations.reset_prefix_cache()
        return json_response({"status": "ok"})

    async def why(self, request: Request) -> Response:
        """What the scheduler decided about a request, a sentence for each phase."""
        request_id = request.path_params["request_id"]
        stories = await self._state.engine.operations.why(request_id)
        if not stories:
            message = "no live or recently finished request has this id"
            raise HttpError(ErrorReply(404, message, "invalid_request_error", "request_id"))
        return json_response({"id": request_id, "answers": stories})


def refuse_unready(engine: ServingEngine, condition: Condition) -> Response | None:
    """The 503 of a server that wants no new requests; None where they are welcome.

    Slow and starved servers are ready: others may be no better, and they may recover.
    """
    engine.check_health()
    if condition.state not in (State.STUCK, State.SLEEPING, State.DRAINING):
        return None
    body = unavailable(condition.why, condition.state).body(state=condition.state)
    return Response(body, 503, media_type="application/json")


def octavo_version() -> str:
    """Of the package that runs."""
    try:
        return version("octavo")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
