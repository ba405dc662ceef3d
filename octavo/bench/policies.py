"""One trace of several tenants under each scheduling policy: who waits for whom.

Owns the tenants and their table. Every run is the engine that serves, with nothing changed but the
policy. The trace gives each request a tenant, a priority and perhaps a deadline; each policy looks
at one of the three, or at none.
"""

import dataclasses
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from octavo.config import option
from octavo.scheduler import POLICIES
from octavo.sim.replay import Client, EngineSizes, Machine, ReplaySetup, replay
from octavo.sim.report import draw_distribution, import_pyplot, save, ttft_s
from octavo.sim.workload import RECIPES, TraceRecipe, TraceSize, Workload, make_workload

HEADER = (
    "| policy | tenant | TTFT p50 | TTFT p99 | deadlines met | refused | last answer |",
    "|---|---|---:|---:|---:|---:|---:|",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySizes(EngineSizes):
    """How large the engine is: few places, so that somebody always waits. Its fields are flags."""

    num_blocks: int = option(512, "KV blocks in the pool")
    max_model_len: int = option(1024, "longest prompt and output together, in tokens")
    max_num_seqs: int = option(8, "sequences that run at once")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends requests, what they are like, and what the policies are told about them."""

    name: str
    recipe: TraceRecipe
    size: TraceSize
    priority: int  # the lowest goes first
    deadline: float | None = None  # for the first token, as a share of the time for everything
    all_at_once: bool = False


# A batch job sends everything at once; two tenants who wait for their answers come one by one.
TENANTS = (
    Tenant(
        "batch",
        RECIPES["sharegpt"],
        TraceSize(num_requests=96, scale=0.25, seed=1),
        priority=1,
        all_at_once=True,
    ),
    Tenant(
        "agent",
        RECIPES["sharegpt"],
        TraceSize(num_requests=96, scale=0.25, seed=2),
        priority=0,
        deadline=0.3,
    ),
    Tenant(
        "chat", RECIPES["alpaca"], TraceSize(num_requests=96, seed=3), priority=-1, deadline=0.1
    ),
)


def mix(busy_s: float | None = None) -> Workload:
    """The requests of all tenants in order of arrival; the same argument gives the same trace.

    busy_s: how long the machine needs for all of it. The tenants who come one by one do so within
        that time, so that it is overloaded whatever its speed. None lets everybody come at once,
        without deadlines, which is how that time is found.
    """
    traces = [make_workload(tenant.recipe, _spread(tenant, busy_s)) for tenant in TENANTS]
    requests = [
        msgspec.structs.replace(
            request,
            tenant=tenant.name,
            priority=tenant.priority,
            deadline_ms=None if not (busy_s and tenant.deadline) else _ms(tenant.deadline * busy_s),
        )
        for tenant, trace in zip(TENANTS, traces, strict=True)
        for request in trace.requests
    ]
    requests.sort(key=lambda request: request.arrival_s)
    return Workload(traces[0].header, tuple(requests))


def _spread(tenant: Tenant, busy_s: float | None) -> TraceSize:
    if busy_s is None or tenant.all_at_once:
        return tenant.size
    return dataclasses.replace(tenant.size, rate=tenant.size.num_requests / busy_s)


def _ms(seconds: float) -> int:
    return max(1, round(1e3 * seconds))


def overload(setup: ReplaySetup, machine: Machine) -> Workload:
    """The mix that keeps this machine busy, and a little more."""
    run = replay(mix(), setup, machine)
    return mix(max(client.token_times[-1] for client in run.clients))


@dataclass(frozen=True, slots=True)
class Served:
    """One tenant's part of one run."""

    policy: str
    tenant: str
    clients: list[Client]

    @property
    def answered(self) -> list[Client]:
        """Those who were not refused."""
        return [client for client in self.clients if client.token_times]

    @property
    def deadlines_met(self) -> float | None:
        """Share of first tokens in time, among all who had a deadline, refused ones included.

        None where nobody had one.
        """
        bound = [(c, c.request.deadline_ms) for c in self.clients]
        met = [
            bool(client.token_times) and 1e3 * ttft_s(client) <= deadline_ms
            for client, deadline_ms in bound
            if deadline_ms is not None
        ]
        return sum(met) / len(met) if met else None


def compare_policies(workload: Workload, setup: ReplaySetup, machine: Machine) -> list[Served]:
    """Replay the trace under each policy; one part for each policy and tenant."""
    tenants = sorted({request.tenant for request in workload.requests})
    parts = []
    for policy in POLICIES:
        run = replay(workload, dataclasses.replace(setup, policy=policy), machine)
        for tenant in tenants:
            clients = [client for client in run.clients if client.request.tenant == tenant]
            parts.append(Served(policy, tenant, clients))
    return parts


def as_markdown(parts: SequenceOf[Served]) -> str:
    """The table, a row for each part; a dash stands where there is nothing to tell."""
    lines = list(HEADER)
    for part in parts:
        answered, met = part.answered, part.deadlines_met
        times = ["–"] * 3
        if answered:
            p50, p99 = np.quantile([ttft_s(client) for client in answered], (0.5, 0.99))
            last_s = max(client.token_times[-1] for client in answered)
            times = [f"{p50:.2f} s", f"{p99:.2f} s", f"{last_s:.1f} s"]
        num_refused = len(part.clients) - len(answered)
        share = "–" if met is None else f"{met:.0%}"
        cells = [part.policy, part.tenant, *times[:2], share, str(num_refused), times[2]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_policies(path: Path, parts: SequenceOf[Served]) -> None:
    """The distribution of TTFT under each policy, a picture for each tenant.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    tenants = list(dict.fromkeys(part.tenant for part in parts))
    figure, (pictures,) = import_pyplot().subplots(
        1, len(tenants), figsize=(4 * len(tenants), 3.5), squeeze=False
    )
    for axes, tenant in zip(pictures, tenants, strict=True):
        mine = [part for part in parts if part.tenant == tenant]
        for style, part in zip(("-", "--", "-.", ":"), mine, strict=True):
            draw_distribution(axes, [ttft_s(c) for c in part.answered], style, part.policy)
        axes.set(title=f"{tenant}: share of requests", xlabel="TTFT, s")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)
