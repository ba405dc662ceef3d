"""What a step's result must be to be booked, and what a first token tells. Pure Python."""

import msgspec

from octavo.core import RequestEvent, SampledTokens, Sequence, StepPlan, StepResult
from octavo.errors import IntegrityError


def check_result(plan: StepPlan, result: StepResult, sampled: dict[str, SampledTokens]) -> None:
    """Refuse a result that does not answer the plan, before anything of it is booked."""
    if result.step != plan.step:
        raise IntegrityError(f"the result of step {result.step} came for step {plan.step}")
    missing = [s.sequence_id for s in plan.scheduled if s.samples and s.sequence_id not in sampled]
    if missing:
        raise IntegrityError(f"step {plan.step} brought no token for {missing[:4]}")


def has_failed(tokens: SampledTokens | None) -> bool:
    """Whether a sequence failed in this step: the KV that it wrote must not be found by others."""
    return tokens is not None and tokens.error is not None


def with_first_token(event: RequestEvent, sequence: Sequence, now_s: float) -> RequestEvent:
    """The event, and how the request came to its first token."""
    first_scheduled_s = min(sequence.first_scheduled_s, now_s)  # inf: a beam that never ran itself
    return msgspec.structs.replace(
        event,
        num_cached_tokens=sequence.num_cached_tokens,
        queue_time_s=first_scheduled_s - sequence.arrival_s,
        prefill_time_s=now_s - first_scheduled_s,
        prompt_logprobs=None if sequence.num_prompt_logprobs is None else tuple(sequence.scores),
        vector=sequence.vector,
    )
