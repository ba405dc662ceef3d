"""KV memory as bookkeeping: blocks, block tables, who holds what. Pure Python, no torch."""

from octavo.kvcache.allocator import Allocator, PagedAllocator, PrefixAllocator
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.contiguous import BuddyAllocator, ContiguousAllocator
from octavo.kvcache.groups import GroupedAllocator, GroupedPrefixAllocator
from octavo.kvcache.nothing import NoBlocks
from octavo.kvcache.registry import ALLOCATORS, create_allocator
from octavo.kvcache.tiers import TieredAllocator
from octavo.kvcache.usage import MemoryUse, measure_memory

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "BlockPool",
    "BuddyAllocator",
    "ContiguousAllocator",
    "GroupedAllocator",
    "GroupedPrefixAllocator",
    "MemoryUse",
    "NoBlocks",
    "PagedAllocator",
    "PrefixAllocator",
    "TieredAllocator",
    "create_allocator",
    "measure_memory",
]
