"""What each client saw, and whether it may have been so. Knows clients and events, no engine.

Owns the promises made to a client: exactly one terminal event and nothing after it; tokens that
equal the oracle's; an end for the reason that is true; an error only where a fault struck. A broken
promise raises `IntegrityError` at the event that breaks it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from octavo.core import FailureCode, FinishReason, Request, RequestEvent
from octavo.errors import IntegrityError
from octavo.sim.fake_executor import oracle_token
from octavo.sim.faults import Fault, Injection


class Client:
    """One accepted request, from its client's side. Sole writer: the history."""

    __slots__ = (
        "accepted_at_s",
        "accepted_step",
        "began",
        "cancelled",
        "due_step",
        "end",
        "ended_at_s",
        "ended_step",
        "error",
        "fault",
        "max_num_tokens",
        "num_cached_tokens",
        "request",
        "together",
        "token_ids",
    )

    def __init__(self, request: Request, max_tokens: int, *, at_s: float, step: int):
        self.request = request
        self.token_ids = list(request.prompt_token_ids)  # and what came since
        self.max_num_tokens = len(self.token_ids) + max_tokens
        self.accepted_at_s = at_s
        self.accepted_step = step
        self.together = [self]  # with those who wait for other answers to the same prompt
        self.began = False  # it was in a step
        self.due_step: int | None = None  # by then it must have been answered, where a bound holds
        self.ended_at_s = at_s
        self.ended_step = step
        self.num_cached_tokens = 0
        self.cancelled = False
        self.fault: Fault | None = None  # the last one that touched it
        self.end: FinishReason | None = None
        self.error: str | None = None

    @property
    def deadline_s(self) -> float:
        """When the first token is due."""
        deadline_ms = self.request.options.deadline_ms
        return math.inf if deadline_ms is None else self.accepted_at_s + deadline_ms / 1e3

    @property
    def num_output_tokens(self) -> int:
        """Tokens received."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def why_over(self) -> FinishReason | None:
        """The reason for which the text is over by itself, or None."""
        if not self.num_output_tokens:
            return None
        is_stop = self.token_ids[-1] in self.request.stop_ids
        if is_stop and self.num_output_tokens >= self.request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_num_tokens else None


class History:
    """All clients of one run. Sole writer: the simulated engine."""

    def __init__(self, *, vocab_size: int, block_size: int):
        self._vocab_size = vocab_size
        self._block_size = block_size
        self.clients: list[Client] = []  # in order of acceptance
        self.live: dict[str, Client] = {}
        self.num_refused = 0
        self.num_injected: Counter[Fault] = Counter()
        self.engine_died = False

    def accept(self, request: Request, max_tokens: int, *, at_s: float, step: int) -> Client:
        """The engine took a request: from here on it owes an end."""
        if request.request_id in self.live:
            raise IntegrityError(f"{request.request_id} was accepted while its id was in use")
        client = Client(request, max_tokens, at_s=at_s, step=step)
        self.clients.append(client)
        self.live[request.request_id] = client
        return client

    def refuse(self) -> None:
        """The engine did not take a request; nothing may be heard of it."""
        self.num_refused += 1

    def run(self, request_ids: Iterable[str]) -> None:
        """These are in a step."""
        for request_id in request_ids:
            if request_id in self.live:
                self.live[request_id].began = True

    def overdue(self, at_s: float) -> list[str]:
        """Who had not begun by then though the first token was due, and still waits."""
        late = {name: client for name, client in self.live.items() if client.deadline_s < at_s}
        return [name for name, c in late.items() if not any(o.began for o in c.together)]

    def cancel(self, request_ids: Iterable[str]) -> None:
        """These clients go away; unknown ids are nobody's."""
        for request_id in request_ids:
            if request_id in self.live:
                self.live[request_id].cancelled = True

    def touch(self, injection: Injection) -> None:
        """A fault struck these requests: they may fail, and only they."""
        self.num_injected[injection.fault] += 1
        for request_id in injection.request_ids:
            if request_id in self.live:
                self.live[request_id].fault = injection.fault
        if injection.fault in (Fault.LOST_BLOCK, Fault.OUT_OF_MEMORY):
            self.forget_due_times()  # somebody starts anew

    def forget_due_times(self) -> None:
        """What happened has delayed everybody who is here, for nobody knows how long."""
        for client in self.live.values():
            client.due_step = None

    def note(self, event: RequestEvent, *, at_s: float, step: int) -> None:
        """An event reached its client. Raises `IntegrityError` where it breaks a promise."""
        client = self.live.get(event.request_id)
        if client is None:
            raise IntegrityError(
                f"an event for {event.request_id}, which nobody waits for: {event}"
            )
        if event.num_cached_tokens:
            self._check_cached(client, event.num_cached_tokens)
        for token_id in event.token_ids:
            expected = oracle_token(client.token_ids, self._vocab_size)
            if token_id != expected:
                raise IntegrityError(
                    f"{event.request_id} got token {token_id} at position {len(client.token_ids)}, "
                    f"not {expected}"
                )
            client.token_ids.append(token_id)
        self._check_end(client, event, at_s)
        if event.finish_reason is not None:
            if client.due_step is not None and step > client.due_step:
                raise IntegrityError(
                    f"{event.request_id} came at step {client.accepted_step} and ends at {step}, "
                    f"but must by {client.due_step}"
                )
            client.end, client.error = event.finish_reason, event.error
            client.ended_at_s, client.ended_step = at_s, step
            del self.live[event.request_id]

    def die(self, *, at_s: float, step: int) -> None:
        """The engine is gone; the front end ends every stream with an error."""
        self.engine_died = True
        for client in self.live.values():
            client.end, client.error = FinishReason.ERROR, "the engine is gone"
            client.ended_at_s, client.ended_step = at_s, step
        self.live.clear()

    def _check_end(self, client: Client, event: RequestEvent, at_s: float) -> None:
        """The end comes when it is due, and for the reason that is true."""
        name, reason = event.request_id, event.finish_reason
        why_over = client.why_over()
        match reason:
            case None | FinishReason.STOP | FinishReason.LENGTH:
                if reason != why_over:
                    raise IntegrityError(f"{name} ends with {reason}, but {why_over} is true")
            case FinishReason.ABORT:
                if not client.cancelled:
                    raise IntegrityError(f"{name} was aborted, but its client did not go away")
            case FinishReason.ERROR if event.error_code is FailureCode.DEADLINE_EXCEEDED:
                began = any(c.began and (c is client or c.end is None) for c in client.together)
                if began or at_s <= client.deadline_s:
                    raise IntegrityError(f"{name} was given up, but had begun or was in time")
            case FinishReason.ERROR:
                lacks = event.error_code is FailureCode.OUT_OF_MEMORY
                if lacks and client.fault not in (Fault.OUT_OF_MEMORY, Fault.CONSEQUENCE):
                    raise IntegrityError(f"{name} gave way, but there was memory")
                if client.fault is None:
                    raise IntegrityError(f"{name} failed with {event.error!r}, but no fault struck")
        if (event.error is not None) != (reason is FinishReason.ERROR):
            raise IntegrityError(f"{name} ends with {reason} and error {event.error!r}")

    def _check_cached(self, client: Client, num_cached: int) -> None:
        """Cached KV must come from a request with the same beginning and the same salt."""
        client.num_cached_tokens = num_cached
        if num_cached % self._block_size or num_cached >= len(client.token_ids):
            raise IntegrityError(f"{client.request.request_id} found {num_cached} tokens cached")
        prefix = client.token_ids[:num_cached]
        for other in self._others_like(client):
            if other.token_ids[:num_cached] == prefix:
                return
        raise IntegrityError(
            f"{client.request.request_id} found {num_cached} tokens cached that nobody with its "
            "salt has sent"
        )

    def _others_like(self, client: Client) -> Iterator[Client]:
        extras = client.request.cache_extras
        for other in self.clients:
            if other is not client and other.request.cache_extras == extras:
                yield other
