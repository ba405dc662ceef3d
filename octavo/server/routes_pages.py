"""The pages for people: a chat at `/`, and `/docs` with the document that it shows.

A page is one file that asks this server alone. Its Content-Security-Policy holds it to that: the
browser runs only the script and the style whose digests are in the header. Pages and document say
nothing of this server, its model or its users, so they need no key; what they ask for does.
"""

import base64
import hashlib
import re
from functools import cached_property
from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.keys import Scope
from octavo.server.openapi import Surfaces, document
from octavo.server.replies import json_response
from octavo.server.routes_ops import octavo_version
from octavo.server.state import JSON, Route, ServerState

HTML = "text/html"
_PAGES = Path(__file__).parent / "pages"


class PageRoutes:
    """The handlers of one server. `surfaces` are the routes to describe; read at the first use."""

    def __init__(self, state: ServerState, surfaces: Surfaces):
        self._state = state
        self._surfaces = surfaces
        self._chat = _page("chat.html")
        self._docs = _page("docs.html")

    def routes(self) -> list[Route]:
        """What the application serves."""
        return [
            Route("GET", "/", self.root, Scope.PUBLIC, media=(HTML, JSON)),
            Route("GET", "/docs", self.docs, Scope.PUBLIC, media=(HTML,)),
            Route("GET", "/openapi.json", self.openapi, Scope.PUBLIC),
        ]

    async def root(self, request: Request) -> Response:
        """A chat for browsers; other clients get the server's name, as JSON."""
        vary = {"vary": "accept"}
        if HTML in request.headers.get("accept", ""):
            return _html(self._chat, vary)
        about: dict[str, object] = {"name": "octavo", "see": ["/docs", "/openapi.json"]}
        if self._state.keys.is_open:  # where it is not, these want a key: see /version, /v1/models
            about |= {"version": octavo_version(), "models": self._state.model_names}
        response = json_response(about)
        response.headers.update(vary)
        return response

    async def docs(self, request: Request) -> Response:
        """This document as a page."""
        return _html(self._docs)

    async def openapi(self, request: Request) -> Response:
        """This document: all routes, as OpenAPI 3.1."""
        return Response(self._document, media_type=JSON)

    @cached_property
    def _document(self) -> bytes:
        return orjson.dumps(document(self._surfaces))


def _page(name: str) -> tuple[bytes, dict[str, str]]:
    """A file, and the headers that allow it what is in it and no more."""
    text = (_PAGES / name).read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {_digests('script', text)}; style-src {_digests('style', text)}"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers


def _digests(element: str, text: str) -> str:
    """Sources of a policy: the SHA-256 of each such element."""
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.S)
    digests = [hashlib.sha256(content.encode()).digest() for content in found]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _html(page: tuple[bytes, dict[str, str]], more: dict[str, str] | None = None) -> Response:
    body, headers = page
    return Response(body, headers=headers | (more or {}), media_type=HTML)
