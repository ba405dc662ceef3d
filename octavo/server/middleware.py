"""What every request passes before a route sees it: identity, books, limits and the key.

Pure ASGI: a message is passed on as it is, so streams stay streams. Knows no route's meaning.
"""

import logging
import string
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.engine.logs import REQUEST_ID
from octavo.server.answers import Answers
from octavo.server.errors import ErrorReply, HttpError, log_failure, reply_to, unavailable
from octavo.server.keys import ApiKey
from octavo.server.keys import Scope as KeyScope
from octavo.server.limits import MAX_HEADERS, MAX_REQUEST_ID_CHARS
from octavo.server.state import Handler, Route, ServerState, key_of

Watcher = Callable[[Scope, Answers], AbstractContextManager[None]]

access_log = logging.getLogger("octavo.server.access")

_DRAINING = unavailable("the server is shutting down", "draining", retry_after_s=5.0)

_REQUEST_ID_ALPHABET = frozenset(string.ascii_letters + string.digits + "-_.:")


class Books:
    """Gives each request an id, counts each response, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, state: ServerState, labels: Mapping[object, str]):
        self._app = app
        self._metrics = state.metrics
        self._log_requests = state.config.log_requests
        self._labels = labels  # endpoint to route, so that clients cannot invent label values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope["octavo.request_id"] = request_id
        in_context = REQUEST_ID.set(request_id)
        start_s, status = time.monotonic(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                key: ApiKey | None = scope.get("octavo.key")
                if key is not None:
                    headers.update(key.allowance.headers())
                self._metrics.http_requests.labels(self._route(scope), str(status)).inc()
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            log_failure(error, request_id)
            if status:
                raise
            await reply_to(error).response()(scope, receive, send_and_note)
        finally:
            REQUEST_ID.reset(in_context)
            if self._log_requests:
                self._log(scope, status, time.monotonic() - start_s)

    def _route(self, scope: Scope) -> str:
        return self._labels.get(scope.get("endpoint"), "unmatched")

    def _log(self, scope: Scope, status: int, duration_s: float) -> None:
        """One line for a response; by its route, for a path may hold whatever a client wrote."""
        num_prompt_tokens, num_output_tokens = scope.get("octavo.num_tokens", (0, 0))
        facts = {
            "request_id": scope["octavo.request_id"],
            "method": scope["method"],
            "route": self._route(scope),
            "status": status,
            "duration_s": round(duration_s, 6),
            "num_prompt_tokens": num_prompt_tokens,
            "num_output_tokens": num_output_tokens,
        }
        access_log.info(
            "%(method)s %(route)s %(status)d in %(duration_s).3f s, "
            "%(num_prompt_tokens)d + %(num_output_tokens)d tokens, request %(request_id)s",
            facts,
            extra=facts,
        )


class Watched:
    """Lets those who watch requests that generate, for traces or costs, come to each of them.

    Added only where somebody does. A response that outlives its request takes them along.
    """

    def __init__(self, app: ASGIApp, watchers: Sequence[Watcher]):
        self._app = app
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["octavo.watchers"] = self._watchers
        await self._app(scope, receive, send)


def _request_id(offered: str | None) -> str:
    """The client's id where it is harmless in a log line and a header, else a fresh one."""
    if (
        offered
        and len(offered) <= MAX_REQUEST_ID_CHARS
        and _REQUEST_ID_ALPHABET.issuperset(offered)
    ):
        return offered
    return uuid.uuid4().hex


class Gate:
    """Refuses what has too many headers or no key.

    Denies by default: a request is open only if its method and path are, to the letter, those of a
    `public` route. The path is the one that the router matches, never one rebuilt from the Host
    header. What a key is good for is `guard`'s.
    """

    def __init__(self, app: ASGIApp, state: ServerState, public: frozenset[tuple[str, str]]):
        self._app = app
        self._state = state
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ErrorReply | None:
        close = {"connection": "close"}  # the body is left unread
        if len(scope["headers"]) > MAX_HEADERS:
            message = f"more than {MAX_HEADERS} headers"
            return ErrorReply(431, message, "invalid_request_error", headers=close)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # one route for both
        if (method, scope["path"]) in self._public:
            return None
        if not self._state.keys.is_open and not self._take_key(scope):
            headers = close | {"www-authenticate": "Bearer"}
            message = "a valid API key is required: Authorization: Bearer <key>"
            return ErrorReply(
                401, message, "authentication_error", None, "invalid_api_key", headers
            )
        return None

    def _take_key(self, scope: Scope) -> bool:
        """Find out whose request it is, for all that comes later; False where it is nobody's."""
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, presented = value.partition(b" ")
                if scheme.lower() == b"bearer":
                    scope["octavo.key"] = self._state.keys.find(presented.strip())
                break
        return scope.get("octavo.key") is not None


def guard(route: Route, state: ServerState) -> Handler:
    """The route's handler behind a check of what the request's key is good for, and how often.

    Nothing is begun while the server drains. While the engine's queue is full, what would wait in
    it is refused here, before its body is read or a text of it tokenized: overload costs those
    least who are being answered.
    """
    scope = route.scope
    waits = scope is KeyScope.INFERENCE and route.method == "POST" and route.queues

    async def guarded(request: Request) -> Response:
        if state.draining and request.method == "POST":
            return _DRAINING.response()
        key = key_of(request)
        if key is not None and scope is not KeyScope.PUBLIC and scope not in key.scopes:
            message = f"this key is not for {scope} routes"
            raise HttpError(ErrorReply(403, message, "permission_error", None, "wrong_scope"))
        if waits:
            state.engine.check_room()
        if key is not None and scope is KeyScope.INFERENCE and request.method == "POST":
            key.allowance.admit()
        return await route.handler(request)

    return guarded
