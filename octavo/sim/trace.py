"""The last things that happened in a simulation, kept cheaply and told readably. Knows no rules."""

from collections import deque
from dataclasses import dataclass, field

from octavo.core import RequestEvent, StepPlan
from octavo.sim.actions import Action, Arrive
from octavo.sim.faults import Injection

NUM_TRACED_STEPS = 12


@dataclass(frozen=True, slots=True)
class TracedStep:
    """What happened in one step, kept until it is known whether anybody wants to read it."""

    at_s: float
    plan: StepPlan | None
    injections: list[Injection]
    outcome: list[RequestEvent] | Exception

    def __str__(self) -> str:
        lines = [f"t={self.at_s:.4f}s"]
        if self.plan is not None:
            shares = ", ".join(
                f"{s.sequence_id}+{s.num_tokens}{'!' if s.samples else ''}"
                f"{list(s.new_block_ids) or ''}"
                for s in self.plan.scheduled
            )
            lines[0] += f" step {self.plan.step}: {shares or 'nobody runs'}"
            for new in self.plan.new:
                cached = f", {new.num_computed_tokens} computed" if new.num_computed_tokens else ""
                blocks = list(new.block_ids)
                lines.append(
                    f"new {new.sequence_id}: {len(new.token_ids)} tokens{cached}, {blocks}"
                )
            if self.plan.transfers:
                moves = (
                    f"{t.source_tier.name} {t.source} to {t.target_tier.name} {t.target}"
                    for t in self.plan.transfers
                )
                lines.append(f"copied {', '.join(moves).lower()}")
            if self.plan.dropped:
                lines.append(f"dropped {', '.join(self.plan.dropped)}")
        lines += [f"fault: {i.fault} ({', '.join(i.request_ids)})" for i in self.injections]
        if isinstance(self.outcome, Exception):
            lines.append(f"raised {type(self.outcome).__name__}: {self.outcome}")
        else:
            lines += [
                f"{e.request_id}: {list(e.token_ids)} {e.finish_reason or ''} {e.error or ''}"
                for e in self.outcome
            ]
        return "\n      ".join(lines)


@dataclass(slots=True)
class Trace:
    """The last steps and actions, for whoever has to understand a failure."""

    entries: deque[TracedStep | tuple[float, Action]] = field(
        default_factory=lambda: deque(maxlen=NUM_TRACED_STEPS)
    )

    def __str__(self) -> str:
        return "\n".join(
            f"  {e}" if isinstance(e, TracedStep) else f"  t={e[0]:.4f}s {_describe(e[1])}"
            for e in self.entries
        )


def _describe(action: Action) -> str:
    match action:
        case Arrive(request=request):
            sampling = request.sampling
            salt = request.options.cache_salt
            return (
                f"{request.request_id} arrives: {len(request.prompt_token_ids)} prompt tokens, "
                f"at most {sampling.max_tokens}, salt {salt}"
            )
        case _:
            return str(action)
