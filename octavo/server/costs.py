"""What serving costs, by tenant and phase: the price of a machine turned into the price of tokens.

The machine costs money as long as it is there. While requests are in it, that is theirs, in
proportion to the seconds that each spent in prefill and in decode; at rest it is `idle`, nobody's.
So the sum of all is the price of the time since the start, and nothing is counted twice. Knows no
device: power is what the price file says.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from octavo.errors import ConfigError
from octavo.server.answers import Answers
from octavo.server.keys import ApiKey

PREFILL, DECODE, IDLE = "prefill", "decode", "idle"
HOUR_S = 3600.0
SETTLE_INTERVAL_S = 1.0  # shares are found anew so often while requests come and go

_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Account = tuple[str, str]  # tenant and phase


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a price file says. Both kinds of price may be there: they add up.

    usd_per_gpu_hour, num_gpus: rent, which runs whether there is work or not.
    usd_per_joule, busy_watts, idle_watts: energy, of the whole machine as its owner measured it.
    """

    usd_per_gpu_hour: _NotNegative = 0.0
    num_gpus: Annotated[int, msgspec.Meta(gt=0)] = 1
    usd_per_joule: _NotNegative = 0.0
    busy_watts: _NotNegative = 0.0
    idle_watts: _NotNegative = 0.0

    @property
    def busy_usd_per_s(self) -> float:
        """While requests are there."""
        return self._rent_usd_per_s + self.usd_per_joule * self.busy_watts

    @property
    def idle_usd_per_s(self) -> float:
        """While there are none."""
        return self._rent_usd_per_s + self.usd_per_joule * self.idle_watts

    @property
    def _rent_usd_per_s(self) -> float:
        return self.usd_per_gpu_hour * self.num_gpus / HOUR_S

    @classmethod
    def read(cls, path: str) -> "Prices":
        """From a TOML file.

        Raises:
            ConfigError: it is not there, or says nothing that could be counted with.
        """
        try:
            prices = msgspec.toml.decode(Path(path).read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"cannot read the cost file {path}: {error.strerror}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"the cost file {path} is not valid: {error}") from None
        if prices.usd_per_joule and not prices.busy_watts:
            raise ConfigError(f"the cost file {path} has usd_per_joule: give busy_watts, too")
        if not prices.busy_usd_per_s:
            raise ConfigError(
                f"the cost file {path} has no price: give usd_per_gpu_hour, or usd_per_joule and "
                "busy_watts"
            )
        return prices


@dataclass(slots=True, eq=False)
class _Guest:
    """A request that may be in the engine, and what of it has been counted already."""

    tenant: str
    answers: Answers
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_tokens: int = 0
    has_begun: bool = False  # some prompt of it is computed


class CostBook(Collector):
    """The books of one server. Sole writer of them; everything happens on the event loop."""

    def __init__(self, prices: Prices, clock: Callable[[], float] = time.monotonic):
        self._prices = prices
        self._clock = clock
        self._then_s = self._settled_s = clock()
        self._pot_usd = 0.0  # of time with requests, not shared out yet
        self._weights: dict[_Account, float] = {}  # seconds since it was shared out last
        self._guests: set[_Guest] = set()
        self._num_tokens = {PREFILL: 0, DECODE: 0}
        self.usd: dict[_Account, float] = {("", IDLE): 0.0}

    @contextmanager
    def watch(self, scope: Scope, answers: Answers) -> Iterator[None]:
        """Count a request for as long as it is there.

        Its tenant is its key's: clients that name one themselves could invent labels without end.
        """
        key: ApiKey | None = scope.get("octavo.key")
        tenant = key.entry.tenant if key is not None else None
        guest = self.enter(answers, tenant or "")
        try:
            yield
        finally:
            self.leave(guest)

    def enter(self, answers: Answers, tenant: str) -> _Guest:
        """A request goes to the engine."""
        self._pass_time()
        guest = _Guest(tenant, answers)
        self._guests.add(guest)
        return guest

    def leave(self, guest: _Guest) -> None:
        """It is over."""
        self._pass_time()
        self._weigh(guest)
        self._guests.remove(guest)
        if not self._guests or self._clock() - self._settled_s > SETTLE_INTERVAL_S:
            self.settle()

    def settle(self) -> None:
        """Share out what the time with requests has cost so far."""
        self._pass_time()
        for guest in self._guests:
            self._weigh(guest)
        total_s = sum(self._weights.values())
        if total_s > 0:
            for account, seconds in self._weights.items():
                share_usd = self._pot_usd * seconds / total_s
                self.usd[account] = self.usd.get(account, 0.0) + share_usd
        elif not self._guests:  # who was there got no token: nobody is to pay
            self.usd["", IDLE] += self._pot_usd
        if total_s > 0 or not self._guests:
            self._pot_usd = 0.0
        self._weights.clear()
        self._settled_s = self._clock()

    def describe(self) -> Iterator[Metric]:
        """Nothing: what there is depends on who came."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """For a scrape."""
        self.settle()
        costs = CounterMetricFamily(
            "octavo_cost_usd", "What the machine cost", labels=["tenant", "phase"]
        )
        for (tenant, phase), usd in self.usd.items():
            costs.add_metric([tenant, phase], usd)
        yield costs
        per_million = GaugeMetricFamily(
            "octavo_cost_usd_per_million_tokens",
            "The same over the tokens of the phase; of all, over all tokens",
            labels=["phase"],
        )
        for phase, num_tokens in (*self._num_tokens.items(), ("all", self._num_all_tokens)):
            if num_tokens:
                usd = sum(u for (_, p), u in self.usd.items() if phase in ("all", p))
                per_million.add_metric([phase], 1e6 * usd / num_tokens)
        yield per_million

    @property
    def _num_all_tokens(self) -> int:
        return sum(self._num_tokens.values())

    def _pass_time(self) -> None:
        """Book the time since the last call, in which the guests were the same."""
        now_s = self._clock()
        passed_s, self._then_s = now_s - self._then_s, now_s
        if self._guests:
            self._pot_usd += passed_s * self._prices.busy_usd_per_s
        else:
            self.usd["", IDLE] += passed_s * self._prices.idle_usd_per_s

    def _weigh(self, guest: _Guest) -> None:
        """Add what a guest did since it was weighed last."""
        tallies = [tally for tally in guest.answers.tallies if tally.first_token_s]
        prefill_s = sum(tally.prefill_time_s for tally in tallies)
        decode_s = sum(tally.last_token_s - tally.first_token_s for tally in tallies)
        num_prompt_tokens, num_tokens = guest.answers.num_tokens
        self._add(guest.tenant, PREFILL, prefill_s - guest.prefill_s)
        self._add(guest.tenant, DECODE, decode_s - guest.decode_s)
        if tallies and not guest.has_begun:
            guest.has_begun = True
            self._num_tokens[PREFILL] += num_prompt_tokens
        self._num_tokens[DECODE] += num_tokens - guest.num_tokens
        guest.prefill_s, guest.decode_s, guest.num_tokens = prefill_s, decode_s, num_tokens

    def _add(self, tenant: str, phase: str, seconds: float) -> None:
        account = tenant, phase
        self._weights[account] = self._weights.get(account, 0.0) + seconds
