"""Traces of requests: when each came, how long it was, what it shared. No text, no token ids.

Owns the file format, its strict reading, and the making of traces from a seed. A file is JSON
lines: a header, then one request a line in order of arrival. What requests share is named by
hashes of their leading blocks; `prompt_token_ids` makes ids of them for whoever replays a trace.
Knows no engine.
"""

import hashlib
import math
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from octavo.config import option
from octavo.errors import ConfigError

VERSION = 1

Count = Annotated[int, msgspec.Meta(ge=1)]


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of a trace: what the rest means, and where it came from."""

    octavo_trace: int  # version of the format
    block_size: Count  # tokens that one hash of a prefix stands for
    made_by: str = ""  # how to make the same trace again


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request. `arrival_s` counts from the beginning of the trace.

    prefix: the names of the leading blocks that other requests may share, in order. A name stands
        for the block's content and for everything before it.
    """

    arrival_s: Annotated[float, msgspec.Meta(ge=0)]
    num_prompt_tokens: Count
    num_output_tokens: Count
    prefix: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    tenant: str = ""
    priority: int = 0
    deadline_ms: Count | None = None


Row = TypeVar("Row", TraceHeader, TraceRequest)


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace in memory: requests in order of arrival."""

    header: TraceHeader
    requests: tuple[TraceRequest, ...]

    @property
    def num_output_tokens(self) -> int:
        """Tokens that all requests ask for together."""
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def max_num_tokens(self) -> int:
        """Prompt and output of the longest request."""
        return max(r.num_prompt_tokens + r.num_output_tokens for r in self.requests)


def read_trace(path: Path) -> Workload:
    """Read a trace.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; names line and cause.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from error
    if not lines:
        raise ConfigError(f"the trace {path} is empty: its first line must be a header")
    header = _decode(lines[0], TraceHeader, path, 1)
    if header.octavo_trace != VERSION:
        raise ConfigError(
            f"{path}, line 1: the trace has version {header.octavo_trace}, and this Octavo reads "
            f"version {VERSION}; make it again with `octavo trace`"
        )
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines[1:], start=2):
        request = _decode(line, TraceRequest, path, number)
        cause = _fault(request, header, requests[-1] if requests else None)
        if cause is not None:
            raise ConfigError(f"{path}, line {number}: {cause}")
        requests.append(request)
    if not requests:
        raise ConfigError(f"the trace {path} holds no requests")
    return Workload(header, tuple(requests))


def write_trace(path: Path, workload: Workload) -> None:
    """Write a trace; raises `ConfigError` where the file cannot be written."""
    encoder = msgspec.json.Encoder()
    lines = [encoder.encode(row) for row in (workload.header, *workload.requests)]
    try:
        path.write_bytes(b"\n".join(lines) + b"\n")
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be written: {error.strerror}") from error


def _decode(line: bytes, kind: type[Row], path: Path, number: int) -> Row:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        what = "header" if kind is TraceHeader else "request"
        raise ConfigError(f"{path}, line {number}, is not a {what}: {error}") from error


def _fault(request: TraceRequest, header: TraceHeader, before: TraceRequest | None) -> str | None:
    """What is wrong with a request that has the right fields."""
    if not math.isfinite(request.arrival_s):
        return "arrival_s is not finite"
    if before is not None and request.arrival_s < before.arrival_s:
        return f"arrival_s goes back from {before.arrival_s} to {request.arrival_s}"
    num_shared = len(request.prefix) * header.block_size
    if num_shared > request.num_prompt_tokens:
        return (
            f"the prefix has {len(request.prefix)} blocks of {header.block_size} tokens, more than "
            f"the prompt's {request.num_prompt_tokens} tokens"
        )
    return None


def prompt_token_ids(
    request: TraceRequest, index: int, *, block_size: int, vocab_size: int
) -> list[int]:
    """Ids for the prompt of a trace's request number `index`, in 0..vocab_size-1.

    Blocks of the same name get the same ids in every request; all other ids are hashes of `index`.
    """
    ids: list[int] = []
    for name in request.prefix:
        ids += _hashed_ids(f"block {name}", block_size, vocab_size)
    return ids + _hashed_ids(f"request {index}", request.num_prompt_tokens - len(ids), vocab_size)


def _hashed_ids(key: str, count: int, vocab_size: int) -> list[int]:
    words = array("I", hashlib.shake_128(key.encode()).digest(4 * count))
    return [word % vocab_size for word in words]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecipe:
    """What a made trace is like. Lengths are log-normal with these means, in tokens.

    num_groups, num_shared_tokens: each request begins with the text of one of so many groups, so
        long, before its own prompt.
    """

    mean_prompt_tokens: float
    mean_output_tokens: float
    num_groups: int = 0
    num_shared_tokens: int = 0


# The means are those of PagedAttention (arXiv 2309.06180, figure 11).
RECIPES: dict[str, TraceRecipe] = {
    "sharegpt": TraceRecipe(mean_prompt_tokens=161.31, mean_output_tokens=337.99),
    "alpaca": TraceRecipe(mean_prompt_tokens=19.31, mean_output_tokens=58.45),
    # ShareGPT's lengths behind one of a few system prompts.
    "chat": TraceRecipe(
        mean_prompt_tokens=161.31, mean_output_tokens=337.99, num_groups=4, num_shared_tokens=64
    ),
    "shared-prefix": TraceRecipe(
        mean_prompt_tokens=19.31, mean_output_tokens=58.45, num_groups=4, num_shared_tokens=512
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSize:
    """How many requests, how fast and how long. Its fields are flags."""

    num_requests: int = option(200, "requests in the trace")
    rate: float | None = option(
        None, "Poisson arrivals a second; default: all requests come at once"
    )
    scale: float = option(
        1.0, "factor on all lengths, for machines that are too slow for the full ones"
    )
    max_model_len: int = option(
        2048, "prompt and output together are cut to fit this context, before they are scaled"
    )
    block_size: int = option(16, "tokens that one hash of a shared prefix stands for")
    # PagedAttention's figure draws the spread of lengths but gives no number for it.
    spread: float = option(
        1.0, "standard deviation of the logarithm of lengths: at 1 the mean is 1.65 medians"
    )
    seed: int = option(0, "the same seed gives the same trace")


def make_workload(recipe: TraceRecipe, size: TraceSize, *, made_by: str = "") -> Workload:
    """A trace from a recipe. The same arguments give the same trace."""
    _check(recipe, size)
    rng = random.Random(size.seed)
    arrival_s = 0.0
    requests = []
    for _ in range(size.num_requests):
        requests.append(_draw_request(rng, recipe, size, arrival_s))
        if size.rate is not None:
            arrival_s += rng.expovariate(size.rate)
    header = TraceHeader(octavo_trace=VERSION, block_size=size.block_size, made_by=made_by)
    return Workload(header, tuple(requests))


def _draw_request(
    rng: random.Random, recipe: TraceRecipe, size: TraceSize, arrival_s: float
) -> TraceRequest:
    num_blocks = round(size.scale * recipe.num_shared_tokens) // size.block_size
    prefix: tuple[int, ...] = ()
    if recipe.num_groups and num_blocks:
        group = rng.randrange(recipe.num_groups)
        prefix = tuple(range(group * num_blocks, (group + 1) * num_blocks))
    room = size.max_model_len - recipe.num_shared_tokens
    prompt = min(_draw_length(rng, recipe.mean_prompt_tokens, size.spread), room - 1)
    output = min(_draw_length(rng, recipe.mean_output_tokens, size.spread), room - prompt)
    # The sum is scaled, not each length, so that rounding cannot overflow the context.
    total = max(2, int(size.scale * (prompt + output)))
    scaled_prompt = min(max(1, round(size.scale * prompt)), total - 1)
    return TraceRequest(
        arrival_s=round(arrival_s, 6),
        num_prompt_tokens=len(prefix) * size.block_size + scaled_prompt,
        num_output_tokens=total - scaled_prompt,
        prefix=prefix,
    )


def _draw_length(rng: random.Random, mean: float, spread: float) -> int:
    """A log-normal length of at least 1 whose mean is `mean` before rounding."""
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def _check(recipe: TraceRecipe, size: TraceSize) -> None:
    if size.num_requests < 1 or size.block_size < 1:
        raise ConfigError("a trace needs at least one request, and blocks of at least one token")
    if size.rate is not None and not 0 < size.rate < math.inf:
        raise ConfigError(f"the rate of arrivals must be positive and finite, got {size.rate}")
    if not 0 <= size.spread <= 3:
        raise ConfigError(f"the spread of lengths must be in 0..3, got {size.spread}")
    if not 0 < size.scale <= 1:
        raise ConfigError(f"the scale of a trace must be in 0..1, got {size.scale}")
    if size.max_model_len < recipe.num_shared_tokens + 2:
        raise ConfigError(
            f"a context of {size.max_model_len} tokens has no room for the "
            f"{recipe.num_shared_tokens} shared ones, a prompt and an output"
        )
