"""Who may join the queue at all. Pure Python.

A queue without bound turns overload into latency for everybody; a request that cannot be answered
in time costs those that could. Both are refused at once, so that their clients can go elsewhere.
"""

from collections.abc import Callable

from octavo.core import Sequence
from octavo.errors import CapacityError, OverloadedError
from octavo.kvcache import Allocator


class PrefillSpeed:
    """Prompt tokens a second, as measured over recent steps. Sole writer: the scheduler."""

    SMOOTHING = 0.2  # weight of the newest step: a few steps are remembered

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step computed this many tokens, most of them of prompts, in so many seconds."""
        if num_tokens and seconds > 0:
            speed = num_tokens / seconds
            before = self.tokens_per_s
            self.tokens_per_s = (
                speed if before is None else before + self.SMOOTHING * (speed - before)
            )


def check_capacity(allocator: Allocator, num_tokens: int) -> None:
    """Refuse what could never fit the pool, even alone; `CapacityError` has both numbers."""
    needed = allocator.num_blocks_for(num_tokens)
    if needed > allocator.num_blocks:
        raise CapacityError(
            f"the request needs {needed} KV blocks of {allocator.block_size} tokens, but the whole "
            f"pool has {allocator.num_blocks}; ask for fewer tokens or give the pool more memory",
            param="max_tokens",
        )


class QueueBounds:
    """How many requests and prompt tokens may wait; rule: queued tokens ≤ TTFT × prefill speed.

    target_ttft_ms: holds requests without a deadline of their own to that rule, with the speed that
        was measured last.
    """

    def __init__(
        self,
        speed: PrefillSpeed,
        *,
        max_num_reqs: int | None = None,
        max_num_tokens: int | None = None,
        target_ttft_ms: int | None = None,
    ):
        self.speed = speed
        self._max_num_reqs = max_num_reqs
        self._max_num_tokens = max_num_tokens
        self._target_ttft_ms = target_ttft_ms

    def check(
        self,
        sequence: Sequence,
        *,
        num_queued: int,
        num_queued_tokens: int,
        tokens_ahead: Callable[[Sequence], int],
        num_new: int = 1,
    ) -> None:
        """Raise `OverloadedError` where the queue is full or the deadline cannot be met.

        tokens_ahead: how many queued prompt tokens the policy serves before a sequence's.
        num_new: so many answers to one prompt come at once; it is computed once for all of them.
        """
        if self._max_num_reqs is not None and num_queued + num_new > self._max_num_reqs:
            raise OverloadedError(
                f"{num_queued} requests wait, and at most {self._max_num_reqs} may"
            )
        num_tokens = num_queued_tokens + sequence.num_prompt_tokens
        if self._max_num_tokens is not None and num_queued and num_tokens > self._max_num_tokens:
            raise OverloadedError(
                f"{num_queued_tokens} prompt tokens wait, and with this request's "
                f"{sequence.num_prompt_tokens} they would be more than {self._max_num_tokens}"
            )
        deadline_ms = sequence.request.options.deadline_ms or self._target_ttft_ms
        speed = self.speed.tokens_per_s
        if deadline_ms is not None and speed is not None:
            num_tokens = tokens_ahead(sequence) + sequence.num_prompt_tokens
            expected_ms = 1e3 * num_tokens / speed
            if expected_ms > deadline_ms:
                raise OverloadedError(
                    f"the first token would take some {expected_ms:.0f} ms ({num_tokens} prompt "
                    f"tokens at {speed:.0f} a second), later than the {deadline_ms} ms that are "
                    "wanted",
                    retry_after_s=max(1.0, (expected_ms - deadline_ms) / 1e3),
                )
