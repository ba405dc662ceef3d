"""Groups of layers that share a block table, and how much of a sequence each of them keeps.

A block holds the KV of some tokens in the layers of one group. All groups have the same number of
layers, so that a block is as large whichever group it serves, and one pool is enough for them all
(vLLM's hybrid KV cache manager). Knows no layers' names and no pools.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVGroups:
    """What each group keeps: the tokens of a window, or with None all of them.

    A table of several groups is one flat list: the block of group g for tokens i * block_size and
    on stands at i * num_groups + g.

    max_step_tokens: the most tokens that one step computes of a sequence.
    """

    windows: tuple[int | None, ...] = (None,)
    max_step_tokens: int = 0

    @property
    def num_groups(self) -> int:
        """Block tables of a sequence."""
        return len(self.windows)

    @property
    def keep_all(self) -> bool:
        """Whether there is one group, which keeps whole contexts: the plainest of tables."""
        return self.windows == (None,)

    def num_blocks_for(self, num_tokens: int, block_size: int) -> int:
        """The most blocks that a sequence of so many tokens holds at a time, over all groups.

        With a window: its tokens, those of a step that is in flight, and those of the next step.
        """
        num_blocks = -(-num_tokens // block_size)
        return sum(
            num_blocks if window is None else min(num_blocks, self.most_blocks(window, block_size))
            for window in self.windows
        )

    def most_blocks(self, window: int, block_size: int) -> int:
        """Blocks that one group with this window holds at most."""
        return blocks_at_most(window - 1 + 2 * self.max_step_tokens, block_size)

    def longest_in(self, num_blocks: int, block_size: int, limit: int) -> int:
        """Tokens of the longest sequence that so many blocks hold, as far as it is below `limit`.

        At or above the limit it is of no matter by how much.
        """
        low, high = 0, -(-limit // block_size) + 1  # in blocks: `low` fits, `high` is not asked for
        while high - low > 1:
            middle = (low + high) // 2
            if self.num_blocks_for(middle * block_size, block_size) <= num_blocks:
                low = middle
            else:
                high = middle
        return low * block_size

    def num_blocks_at_rest(self, num_tokens: int, block_size: int) -> int:
        """As many while it decodes: a window holds its tokens and no step's."""
        num_blocks = -(-num_tokens // block_size)
        return sum(
            num_blocks if window is None else min(num_blocks, blocks_at_most(window, block_size))
            for window in self.windows
        )


def first_seen_block(window: int, num_tokens: int, block_size: int) -> int:
    """The first block that the token after `num_tokens` tokens sees, and whatever follows it."""
    return max(0, num_tokens - window + 1) // block_size


def blocks_at_most(num_tokens: int, block_size: int) -> int:
    """Blocks that so many tokens in a row lie in at most, wherever the first of them stands."""
    return -(-(num_tokens - 1) // block_size) + 1 if num_tokens else 0
