"""Policies in the simulator: each one does to the tenants what its name says."""

import dataclasses

import pytest
from helpers import create_recorded
from msgspec import structs

from octavo.bench.policies import (
    TENANTS,
    PolicySizes,
    Served,
    as_markdown,
    compare_policies,
    mix,
    overload,
)
from octavo.cli import main
from octavo.scheduler import POLICIES
from octavo.sim.replay import Client, ReplaySetup, SimulatedMachine
from octavo.sim.report import ttft_s
from octavo.sim.step_time import (
    COSTS,
    VERSION,
    FitReport,
    StepTimes,
    write_step_times,
)
from octavo.sim.workload import TraceRequest, Workload, write_trace

# A machine on which a step of one token takes 24 ms and each further token 0.75 ms.
TIMES = StepTimes(
    octavo_steps=VERSION,
    recorded=create_recorded(max_num_seqs=16, max_num_batched_tokens=512),
    costs=dict.fromkeys(COSTS, 0.0) | {"step": 0.024, "token": 0.00075},
    host_costs={"step": 0.0, "sequence": 0.0, "sampled": 0.0},
    fit=FitReport(num_steps=1, median=0.0, p90=0.0, total=0.0),
)
SETUP = ReplaySetup(**dataclasses.asdict(PolicySizes()))


@pytest.fixture(scope="module")
def parts():
    machine = SimulatedMachine(TIMES)
    served = compare_policies(overload(SETUP, machine), SETUP, machine)
    return {(part.policy, part.tenant): part for part in served}


def mean_ttft_s(part):
    return sum(ttft_s(client) for client in part.answered) / len(part.answered)


def last_s(part):
    return max(client.token_times[-1] for client in part.answered)


def test_the_mix_is_all_tenants_in_order_of_arrival_each_as_it_is_described():
    workload = mix(100.0)
    arrivals = [request.arrival_s for request in workload.requests]
    assert arrivals == sorted(arrivals)
    for tenant in TENANTS:
        mine = [r for r in workload.requests if r.tenant == tenant.name]
        assert len(mine) == tenant.size.num_requests
        deadline_ms = None if tenant.deadline is None else round(100_000 * tenant.deadline)
        assert {(r.priority, r.deadline_ms) for r in mine} == {(tenant.priority, deadline_ms)}
    assert len(workload.requests) == sum(tenant.size.num_requests for tenant in TENANTS)


def test_the_overload_grows_with_the_machine():
    slow = structs.replace(TIMES, costs={cost: 3 * value for cost, value in TIMES.costs.items()})
    fast, long = (overload(SETUP, SimulatedMachine(times)) for times in (TIMES, slow))
    assert long.requests[-1].arrival_s == pytest.approx(3 * fast.requests[-1].arrival_s, rel=0.01)


def test_every_policy_serves_every_tenant_and_refuses_only_for_a_deadline(parts):
    assert set(parts) == {(policy, t.name) for policy in POLICIES for t in TENANTS}
    for part in parts.values():
        for client in part.clients:
            if client.refusal is None:
                assert len(client.token_times) == client.request.num_output_tokens
            else:
                assert client.request.deadline_ms is not None and not client.token_times


def test_in_order_of_arrival_the_batch_job_is_first_done_and_everybody_else_waits_for_it(parts):
    for tenant in ("agent", "chat"):
        waits = {policy: mean_ttft_s(parts[policy, tenant]) for policy in POLICIES}
        assert waits["fcfs"] > 2 * max(waits[policy] for policy in POLICIES if policy != "fcfs")
    ends = {policy: last_s(parts[policy, "batch"]) for policy in POLICIES}
    assert ends["fcfs"] < 0.6 * min(ends[policy] for policy in POLICIES if policy != "fcfs")


def test_each_policy_prefers_whom_it_says(parts):
    def fastest(tenant):
        return min(POLICIES, key=lambda policy: mean_ttft_s(parts[policy, tenant]))

    assert fastest("chat") == fastest("agent") == "priority"  # it pushes the batch job out
    met = {policy: parts[policy, "chat"].deadlines_met for policy in POLICIES}
    assert met["deadline"] >= met["fair"] > met["fcfs"]
    assert mean_ttft_s(parts["deadline", "chat"]) < mean_ttft_s(parts["fair", "chat"])
    # Fair between tenants: the batch job is not starved, as it is where deadlines alone count.
    assert mean_ttft_s(parts["fair", "batch"]) < mean_ttft_s(parts["deadline", "batch"])


def client(deadline_ms, *token_times, refusal=None):
    request = TraceRequest(
        arrival_s=1.0,
        num_prompt_tokens=4,
        num_output_tokens=2,
        tenant="a",
        deadline_ms=deadline_ms,
    )
    made = Client(request, refusal=refusal)
    made.token_times.extend(token_times)
    return made


def test_the_table_counts_refused_requests_as_late_and_says_nothing_of_nobody():
    some = [client(500, 1.5, 9.0), client(500, 1.6), client(500, refusal="full"), client(None, 2.0)]
    lines = as_markdown(
        [Served("fcfs", "a", some), Served("fair", "b", [client(None, refusal="full")])]
    ).splitlines()
    assert lines[2] == "| fcfs | a | 0.60 s | 0.99 s | 33% | 1 | 9.0 s |"
    assert lines[3] == "| fair | b | – | – | – | 1 | – |"


def test_the_command_prints_a_row_for_each_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_step_times(tmp_path / "steps.json", TIMES)
    workload = mix(100.0)
    few = Workload(workload.header, tuple(workload.requests[80:130]))
    start_s = few.requests[0].arrival_s
    moved = tuple(structs.replace(r, arrival_s=r.arrival_s - start_s) for r in few.requests)
    write_trace(tmp_path / "trace.jsonl", Workload(few.header, moved))
    picture = tmp_path / "policies.png"
    flags = ["--steps", tmp_path / "steps.json", "--trace", tmp_path / "trace.jsonl"]
    assert main(["bench", "policies", *map(str, flags), "--plot", str(picture)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(POLICIES) * len({r.tenant for r in moved})
    assert picture.read_bytes().startswith(b"\x89PNG")
