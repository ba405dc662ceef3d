"""KV memory as bookkeeping: blocks, block tables, who holds what. Pure Python, no torch."""

from octavo.kvcache.allocator import Allocator, PagedAllocator, PrefixAllocator
from octavo.kvcache.block_pool import BlockPool

__all__ = ["Allocator", "BlockPool", "PagedAllocator", "PrefixAllocator"]
