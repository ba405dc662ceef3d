"""Puts the server together: routes, middleware, error table, lifespan.

Handlers are registered as plain Starlette routes: bodies are read by `body`, with its limits, and
never by the framework.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from itertools import chain

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from octavo.engine import ServingEngine
from octavo.errors import OctavoError
from octavo.server.config import ServerConfig
from octavo.server.costs import CostBook, Prices
from octavo.server.errors import ClientDisconnected, HttpError, handle_error
from octavo.server.keys import KeyRing, Scope
from octavo.server.limits import Limits
from octavo.server.metrics import ServerMetrics
from octavo.server.middleware import Books, Gate, Watched, Watcher, guard
from octavo.server.routes_adapters import AdapterRoutes
from octavo.server.routes_embeddings import EmbeddingRoutes
from octavo.server.routes_kserve import KServeRoutes
from octavo.server.routes_openai import OpenAIRoutes
from octavo.server.routes_ops import OpsRoutes
from octavo.server.routes_pages import PageRoutes
from octavo.server.routes_responses import ResponsesRoutes
from octavo.server.routes_scoring import ScoringRoutes
from octavo.server.routes_sleep import SleepRoutes
from octavo.server.routes_tgi import TGIRoutes
from octavo.server.routes_tokenize import TokenizeRoutes
from octavo.server.state import Route, ServerState
from octavo.server.tracing import RequestTracer

Lifespan = Callable[[], AbstractAsyncContextManager[object]]


def create_app(
    engine: ServingEngine, config: ServerConfig, *, lifespan: Lifespan = nullcontext
) -> FastAPI:
    """The HTTP application around an engine.

    `lifespan` is entered on the server's event loop before the first request and left after the
    last: the place to start and stop an engine that lives on that loop. Nothing reads the engine
    before that.
    """
    state = ServerState(engine, config, Limits.of(config), ServerMetrics(engine), KeyRing(config))

    endpoint = config.otlp_traces_endpoint
    tracer = None if endpoint is None else RequestTracer.to(endpoint)

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tracer is not None:
                stack.push_async_callback(tracer.close)
            try:
                await stack.enter_async_context(lifespan())
            except Exception as error:
                state.startup_error = error
                raise
            yield
            await state.background.close()
            state.keys.usage.save()

    app = FastAPI(
        title="Octavo",
        lifespan=run,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
    )
    app.state.octavo = state
    labels: dict[object, str] = {}
    public: set[tuple[str, str]] = set()
    for route in chain.from_iterable(route_table(state).values()):
        guarded = guard(route, state)
        app.add_route(route.path, guarded, methods=[route.method])
        labels[guarded] = route.path
        public |= {(route.method, route.path)} if route.scope is Scope.PUBLIC else set()
    for kind in (OctavoError, HttpError, ClientDisconnected, HTTPException):
        app.add_exception_handler(kind, handle_error)
    app.add_middleware(Gate, state=state, public=frozenset(public))
    watchers: list[Watcher] = [] if tracer is None else [tracer.watch]
    if config.cost_file is not None:
        costs = CostBook(Prices.read(config.cost_file))
        state.metrics.register(costs)
        watchers.append(costs.watch)
    if watchers:
        app.add_middleware(Watched, watchers=watchers)
    app.add_middleware(Books, state=state, labels=labels)  # added last, so it is the outermost
    return app


def route_table(state: ServerState) -> dict[str, list[Route]]:
    """All routes, by the name of the surface that they belong to."""
    table = {
        "OpenAI": OpenAIRoutes(state).routes(),
        "Embeddings": [*EmbeddingRoutes(state).routes(), *ScoringRoutes(state).routes()],
        "Responses": ResponsesRoutes(state).routes(),
        "Tokens": TokenizeRoutes(state).routes(),
        "Text Generation Inference": TGIRoutes(state).routes(),
        "KServe and Triton": KServeRoutes(state).routes(),
        "Adapters": AdapterRoutes(state).routes(),
        "Operations": [*OpsRoutes(state).routes(), *SleepRoutes(state).routes()],
    }
    # The pages show the whole table, themselves included: they read it when they are asked.
    table["Pages"] = PageRoutes(state, table).routes()
    return table
