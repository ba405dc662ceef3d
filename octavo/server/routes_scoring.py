"""/score in vLLM's shape and /rerank in Jina's and Cohere's: how well texts fit each other.

A cross-encoder reads two texts together. Of other models it is the cosine of their vectors. The way
to the engine is that of generation, with its bounds and its books.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.core import NO_TOKENS, SCORE, PoolingParams
from octavo.engine.scoring import matched
from octavo.server.body import decode, read_json
from octavo.server.errors import bad_request
from octavo.server.generation import generate, shape_options
from octavo.server.keys import Scope
from octavo.server.limits import Limits
from octavo.server.prompts import Prompt, PromptReader, fitted
from octavo.server.protocol import Refusals
from octavo.server.response_shape import ShapeOptions
from octavo.server.routes_embeddings import SchedulingFields, options_of
from octavo.server.score_shape import PairShape, RerankShape, ScoreShape
from octavo.server.state import Route, ServerState

Texts = str | list[str]
MAX_TOP_N = 2**31


class ScoreRequest(SchedulingFields, kw_only=True):
    """POST /score: `text_1` against `text_2`, which are `queries` and `documents` as well."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    model: str | None = None
    truncate_prompt_tokens: int | None = None


class Document(msgspec.Struct):
    """A document as an object."""

    text: str


class RerankRequest(SchedulingFields, kw_only=True):
    """POST /rerank. Documents come back by default, but not at Cohere's path /v2/rerank."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
    model: str | None = None
    truncate_prompt_tokens: int | None = None


_SCORE, _RERANK = msgspec.json.Decoder(ScoreRequest), msgspec.json.Decoder(RerankRequest)
_REFUSED_SCORES = Refusals(ScoreRequest, {})
_REFUSED_RANKS = Refusals(RerankRequest, {"max_tokens_per_doc": (), "rank_fields": ([],)})


def parse_score(body: bytes, limits: Limits) -> tuple[ScoreRequest, list[str], list[str]]:
    """A checked request, its queries and its documents."""
    fields = decode(body, _SCORE)
    _REFUSED_SCORES.check(body, limits)
    found: list[list[str]] = []
    for first, second in (("text_1", "queries"), ("text_2", "documents")):
        given = [t for t in (getattr(fields, first), getattr(fields, second)) if t is not None]
        if len(given) != 1:
            raise bad_request(f"give one of {first} and {second}", param=first)
        found.append([given[0]] if isinstance(given[0], str) else given[0])
    queries, documents = found
    return fields, queries, documents


def parse_rerank(body: bytes, limits: Limits) -> tuple[RerankRequest, list[str]]:
    """A checked request and its documents."""
    fields = decode(body, _RERANK)
    _REFUSED_RANKS.check(body, limits)
    if fields.top_n is not None and not 1 <= fields.top_n <= MAX_TOP_N:
        raise bad_request(f"top_n must be an integer in 1..{MAX_TOP_N}", param="top_n")
    return fields, [one if isinstance(one, str) else one.text for one in fields.documents]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the engine is asked for, and how scores come of it."""

    options: ShapeOptions
    pairs: Sequence[tuple[int, int]] | None  # as of `PairShape`
    pooling: PoolingParams


class ScoringRoutes:
    """The handlers of one server."""

    def __init__(self, state: ServerState):
        self._state = state

    def routes(self) -> list[Route]:
        """What the application serves."""
        user = Scope.INFERENCE
        return [
            *(Route("POST", p, self.score, user, ScoreRequest) for p in ("/score", "/v1/score")),
            *(
                Route("POST", f"{version}/rerank", self.rerank, user, RerankRequest)
                for version in ("", "/v1", "/v2")
            ),
        ]

    async def score(self, request: Request) -> Response:
        """Say how well each document fits the query, or its own one of several."""
        arrival_s, state = time.monotonic(), self._state
        fields, queries, documents = parse_score(
            await read_json(request, state.limits), state.limits
        )
        plan = await self._plan(fields, queries, documents)
        shape = ScoreShape(plan.options, state.logprob_shaper, pairs=plan.pairs)
        return self._answer(request, shape, plan, fields, arrival_s)

    async def rerank(self, request: Request) -> Response:
        """Sort documents by how well they fit a query."""
        arrival_s, state = time.monotonic(), self._state
        fields, documents = parse_rerank(await read_json(request, state.limits), state.limits)
        plan = await self._plan(fields, [fields.query], documents)
        shows = fields.return_documents
        if shows is None:
            shows = not request.url.path.startswith("/v2")
        shape = RerankShape(
            plan.options,
            state.logprob_shaper,
            pairs=plan.pairs,
            top_n=fields.top_n or len(documents),
            documents=documents if shows else None,
        )
        return self._answer(request, shape, plan, fields, arrival_s)

    async def _plan(
        self, fields: ScoreRequest | RerankRequest, queries: list[str], documents: list[str]
    ) -> _Plan:
        state = self._state
        name, model = state.check_model(fields.model), state.engine.model
        texts = matched(queries, documents)
        reader = PromptReader(model, state.limits, field="documents")
        limit, tasks = fields.truncate_prompt_tokens, model.tasks
        pairs, prompts = None, list[Prompt]()
        if tasks.num_classes:
            tasks.check_scores()
            prompts = await reader.pairs(texts, limit)
        else:
            places = {text: i for i, text in enumerate(dict.fromkeys(t for p in texts for t in p))}
            prompts = await reader.completion(list(places), add_special_tokens=True)
            prompts = fitted(prompts, limit, model=model)
            pairs = [(places[first], places[second]) for first, second in texts]
        options = shape_options(state, prompts, NO_TOKENS, model=name, shows_prompt=True)
        return _Plan(options, pairs, SCORE if pairs is None else tasks.embedding)

    def _answer(
        self,
        request: Request,
        shape: PairShape,
        plan: _Plan,
        fields: SchedulingFields,
        arrival_s: float,
    ) -> Response:
        return generate(
            request,
            self._state,
            shape,
            NO_TOKENS,
            options=options_of(fields),
            stream=False,
            arrival_s=arrival_s,
            pooling=plan.pooling,
        )
