"""Writes a step's keys and values into the paged KV cache.

Owns the layout of the cache as a write sees it: kv_cache [2, num_blocks, Hkv, block_size, D], keys
first. Does not know which request a slot belongs to.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from octavo.kernels.dispatch import Op


class KvWrite(Protocol):
    def __call__(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """key, value [T, Hkv, D] (strided views allowed) -> rows of kv_cache.

        slots [T] int64: token t goes to block slots[t] // block_size, row slots[t] % block_size.
        """
        ...


def reference_kv_write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    block_size = kv_cache.shape[3]
    blocks, rows = slots // block_size, slots % block_size
    kv_cache[0, blocks, :, rows] = key
    kv_cache[1, blocks, :, rows] = value


KV_WRITE: Op[KvWrite] = Op("kv_write", reference_kv_write)
