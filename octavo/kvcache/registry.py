"""The ladder of allocators by name, from one run for each sequence to shared pages."""

from octavo.core import KVGroups
from octavo.errors import ConfigError
from octavo.kvcache.allocator import Allocator, PagedAllocator, PrefixAllocator
from octavo.kvcache.contiguous import BuddyAllocator, ContiguousAllocator
from octavo.kvcache.groups import GroupedAllocator, GroupedPrefixAllocator
from octavo.kvcache.nothing import NoBlocks

WHOLE_CONTEXTS = KVGroups()
ALLOCATORS = ("contiguous", "contiguous-buddy", "paged", "paged+prefix")


def create_allocator(
    name: str,
    num_blocks: int,
    block_size: int,
    *,
    max_model_len: int,
    groups: KVGroups = WHOLE_CONTEXTS,
) -> Allocator:
    """The allocator of this name over a pool of `num_blocks` blocks.

    Beside the ladder there is "none", of models that keep nothing.

    groups: what layers keep; windows are for those that page.

    Raises:
        ConfigError: there is none of this name.
    """
    match name:
        case "paged" if not groups.keep_all:
            return GroupedAllocator(num_blocks, block_size, groups=groups)
        case "paged+prefix" if not groups.keep_all:
            return GroupedPrefixAllocator(num_blocks, block_size, groups=groups)
        case "none":
            return NoBlocks(block_size)
        case "contiguous":
            return ContiguousAllocator(num_blocks, block_size, max_model_len=max_model_len)
        case "contiguous-buddy":
            return BuddyAllocator(num_blocks, block_size)
        case "paged":
            return PagedAllocator(num_blocks, block_size)
        case "paged+prefix":
            return PrefixAllocator(num_blocks, block_size)
    raise ConfigError(f"no allocator is called {name!r}; there are: {', '.join(ALLOCATORS)}")
