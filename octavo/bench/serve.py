"""An open-loop load on a completions endpoint: requests come when they come, answered or not.

Owns arrivals, the client and what is made of the times it saw. Only a server on this machine is
asked: a load test of somebody else's is an attack. Knows no engine, and no way to start a server.
"""

import asyncio
import ipaddress
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from octavo.bench.draws import MAX_SERVED_TOKEN_ID, TEMPERATURE, Work, served_work
from octavo.bench.offline import check_positive
from octavo.config import option
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    import aiohttp

PERCENTILES = (50, 90, 99)
REQUEST_TIMEOUT_S = 600.0
NUM_AT_ONCE = 512
DATA = b"data: "
DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSetup:
    """The requests of a load. Its fields are flags."""

    random_input_len: int = option(512, "tokens of each prompt")
    random_output_len: int = option(128, "tokens of each output")
    num_prompts: int | None = option(
        None, f"requests; default: what comes within --seconds, {NUM_AT_ONCE} at an infinite rate"
    )
    seconds: float = option(20.0, "how long requests arrive where --num-prompts is not given")
    num_warmups: int = option(0, "requests before the first that counts, one after the other")
    max_token_id: int = option(
        MAX_SERVED_TOKEN_ID, "largest id in the prompts; lower it for a model with fewer tokens"
    )
    temperature: float = option(TEMPERATURE, "0 takes the likeliest token")
    seed: int = option(1, "the same seed draws the same requests and arrivals")

    def __post_init__(self) -> None:
        check_positive(self, "random_input_len", "random_output_len", "num_prompts")
        if self.seconds <= 0 or self.num_warmups < 0 or self.max_token_id < 10:
            raise ConfigError(
                "seconds must be positive, num_warmups not negative, max_token_id at least 10"
            )

    def num_requests(self, rate: float) -> int:
        """How many requests come at this rate."""
        if self.num_prompts is not None:
            return self.num_prompts
        return NUM_AT_ONCE if math.isinf(rate) else max(1, int(rate * self.seconds))


class Spread(msgspec.Struct, frozen=True):
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p99: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What clients saw at one rate.

    TPOT is a request's time from its first to its last token by the tokens after the first; ITL is
    each gap between two chunks.
    """

    request_rate: float | None  # None: all at once
    num_prompts: int
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread


@dataclass(slots=True)
class Exchange:
    """One request and the times at which chunks of its answer came."""

    num_output_tokens: int
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    error: str | None = None


def check_loopback(url: str) -> str:
    """`url` without its trailing slash; raises `ConfigError` unless it is of this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    if parts.scheme != "http" or not is_here:
        raise ConfigError(
            f"a load test goes to a server on this machine only, such as http://127.0.0.1:8000, "
            f"not to {url!r}"
        )
    return url.rstrip("/")


def measure_load(url: str, model: str, setup: ServeSetup, rate: float) -> Load:
    """Send all requests at this rate (a second; infinite: all at once) and wait for the answers.

    Raises:
        ConfigError: the server is not on this machine, or aiohttp is not installed.
        OctavoError: a request failed, or was not answered with all tokens that it asked for.
    """
    if not rate > 0:
        raise ConfigError(f"the request rate must be positive, got {rate}")
    return asyncio.run(_measure(check_loopback(url), model, setup, rate))


async def _measure(url: str, model: str, setup: ServeSetup, rate: float) -> Load:
    aiohttp = _import_aiohttp()
    num_requests = setup.num_requests(rate)
    lengths = (setup.random_input_len, setup.random_output_len)
    work = served_work(num_requests, *lengths, last_id=setup.max_token_id, seed=setup.seed)
    async with aiohttp.ClientSession(
        base_url=url,
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        first = _bodies(work, model, setup)[0]
        for _ in range(setup.num_warmups):
            _check([await _ask(session, first)])
        gaps_s = arrival_gaps_s(num_requests, rate, seed=setup.seed)
        start = time.perf_counter()
        exchanges = await _send_all(session, _bodies(work, model, setup), gaps_s)
        duration_s = time.perf_counter() - start
    _check(exchanges)
    return summarise(exchanges, rate=rate, duration_s=duration_s)


def arrival_gaps_s(num_requests: int, rate: float, *, seed: int) -> list[float]:
    """Seconds before each request: a Poisson process, or none at an infinite rate."""
    if math.isinf(rate):
        return [0.0] * num_requests
    gaps: list[float] = np.random.default_rng(seed).exponential(1 / rate, num_requests).tolist()
    return gaps


def _import_aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as error:
        raise ConfigError("a load test needs aiohttp: install octavo[bench]") from error
    return aiohttp


def _bodies(work: Work, model: str, setup: ServeSetup) -> list[dict[str, Any]]:
    """The requests. Usage is asked for because it alone says how many tokens there were."""
    common = {
        "model": model,
        "temperature": setup.temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return [
        common | {"prompt": prompt, "max_tokens": num_tokens}
        for prompt, num_tokens in zip(work.prompts, work.num_output_tokens, strict=True)
    ]


async def _send_all(
    session: "aiohttp.ClientSession", bodies: list[dict[str, Any]], gaps_s: list[float]
) -> list[Exchange]:
    """One task for each request, begun at its own time whatever became of those before it."""
    tasks = []
    due_s = time.perf_counter()
    for body, gap_s in zip(bodies, gaps_s, strict=True):
        due_s += gap_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(session, body)))
    return await asyncio.gather(*tasks)


async def _ask(session: "aiohttp.ClientSession", body: dict[str, Any]) -> Exchange:
    """One streamed completion. While it runs, only the clock is read: lines are parsed later."""
    exchange = Exchange(body["max_tokens"])
    exchange.sent_s = time.perf_counter()
    last = b""
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                exchange.error = f"{response.status}: {(await response.text())[:200]}"
                return exchange
            async for line in response.content:
                if line.startswith(DATA) and not line.startswith(DONE):
                    exchange.times_s.append(time.perf_counter())
                    last = line
    except Exception as error:  # of many classes; each is an answer that did not come
        exchange.error = repr(error)
        return exchange
    _close(exchange, last)
    return exchange


def _close(exchange: Exchange, last: bytes) -> None:
    """Check the number of tokens, and keep the times of tokens: not of what says the end."""
    try:
        usage = msgspec.json.decode(last.removeprefix(DATA))["usage"]
        num_tokens = usage["completion_tokens"]
    except (msgspec.DecodeError, KeyError, TypeError):
        exchange.error = f"the stream ended without usage: {last[:200]!r}"
        return
    if num_tokens != exchange.num_output_tokens:
        exchange.error = f"{num_tokens} tokens came, {exchange.num_output_tokens} were asked for"
    del exchange.times_s[-1]  # the chunk with the usage
    # A chunk may hold several tokens or, where text is empty, be left out; but there are never more
    # chunks than tokens, except for a last one that only has the reason of the end.
    del exchange.times_s[num_tokens:]
    if not exchange.times_s:
        exchange.error = exchange.error or "no token came before the end"


def _check(exchanges: Sequence[Exchange]) -> None:
    errors = [exchange.error for exchange in exchanges if exchange.error is not None]
    if errors:
        raise OctavoError(f"{len(errors)} of {len(exchanges)} requests failed: {errors[0]}")


def summarise(exchanges: Sequence[Exchange], *, rate: float, duration_s: float) -> Load:
    """Reduce the exchanges, all of them complete, to percentiles and throughput."""
    ttft = [e.times_s[0] - e.sent_s for e in exchanges]
    tpot = [(e.times_s[-1] - e.times_s[0]) / max(1, e.num_output_tokens - 1) for e in exchanges]
    itl = [gap for e in exchanges for gap in np.diff(e.times_s)]
    return Load(
        request_rate=None if math.isinf(rate) else rate,
        num_prompts=len(exchanges),
        duration_s=duration_s,
        output_tokens_per_s=sum(e.num_output_tokens for e in exchanges) / duration_s,
        requests_per_s=len(exchanges) / duration_s,
        ttft_ms=_spread(ttft),
        tpot_ms=_spread(tpot),
        itl_ms=_spread(itl),
    )


def _spread(seconds: Sequence[float]) -> Spread:
    if not len(seconds):
        return Spread(0.0, 0.0, 0.0)  # outputs of one token have no gaps
    return Spread(*(float(1e3 * x) for x in np.percentile(seconds, PERCENTILES)))
