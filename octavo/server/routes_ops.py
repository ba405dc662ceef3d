"""/health, /ready, /version, /metrics and the root: what operators and their probes ask.

Liveness and readiness differ: a server that drains is alive but not ready. Knows no generation.
"""

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.errors import ErrorReply, HttpError, unavailable
from octavo.server.keys import Scope
from octavo.server.replies import json_response
from octavo.server.state import Route, ServerState


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
            Route("GET", "/metrics", self.metrics, Scope.METRICS),
            Route("GET", "/debug/requests/{request_id}", self.why, Scope.ADMIN),
            Route("GET", "/", self.root, Scope.INFERENCE),
        ]

    async def health(self, request: Request) -> Response:
        """200 while the engine can answer; `EngineDeadError` becomes the 503."""
        self._state.engine.check_health()
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while new requests are welcome."""
        self._state.engine.check_health()
        if self._state.draining:
            return unavailable("the server is shutting down", "draining").response()
        return json_response({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """As vLLM's."""
        return json_response({"version": octavo_version()})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        exposition = self._state.metrics.exposition()
        return Response(exposition, headers={"content-type": CONTENT_TYPE_LATEST})

    async def why(self, request: Request) -> Response:
        """What the scheduler decided about a request, a sentence for each phase."""
        request_id = request.path_params["request_id"]
        stories = await self._state.engine.why(request_id)
        if not stories:
            message = "no live or recently finished request has this id"
            raise HttpError(ErrorReply(404, message, "invalid_request_error", "request_id"))
        return json_response({"id": request_id, "answers": stories})

    async def root(self, request: Request) -> Response:
        """Something for whoever opens the address in a browser."""
        return json_response(
            {
                "name": "octavo",
                "version": octavo_version(),
                "models": self._state.model_names,
                "see": ["/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics"],
            }
        )


def octavo_version() -> str:
    """Of the package that runs."""
    try:
        return version("octavo")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
