"""Which turns of a conversation fit the context, where a client lets the others go.

Knows no items and no engine.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from octavo.errors import ContextLengthError
from octavo.server.prompts import Prompt
from octavo.server.protocol import Message


async def latest_turns(
    messages: Sequence[Message],
    read: Callable[[Sequence[Message]], Awaitable[Prompt]],
    *,
    max_tokens: int,
) -> Prompt:
    """The prompt of as many of the last turns as fit, behind the instructions.

    A turn begins with a user's message, as templates expect of a conversation, so no result of a
    tool loses its call. The last turn stays, whether it fits or not.
    """
    num_instructions = 0
    while num_instructions < len(messages) and messages[num_instructions].role == "system":
        num_instructions += 1
    begins = [i for i, message in enumerate(messages) if message.role == "user"]
    starts = [num_instructions, *(i for i in begins if i > num_instructions)]

    def beginning_at(start: int) -> list[Message]:
        return [*messages[:num_instructions], *messages[start:]]

    async def fits(start: int) -> Prompt | None:
        with suppress(ContextLengthError):
            prompt = await read(beginning_at(start))
            if len(prompt.token_ids) <= max_tokens:
                return prompt
        return None

    if (whole := await fits(starts[0])) is not None:
        return whole
    low, high = (
        min(1, len(starts) - 1),
        len(starts) - 1,
    )  # the first that fits, or the last, is here
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]) is None:
            low = middle + 1
        else:
            high = middle
    return await read(beginning_at(starts[low]))
