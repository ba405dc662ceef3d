"""Blocks of layers that keep different things of a token, on their way between tiers."""

import torch

from octavo.core import Tier, Transfer
from octavo.layers import KVSpec
from octavo.runner import KVStorage, allocate_kv_caches


def test_blocks_of_keys_and_values_and_of_latents_go_to_the_host_and_come_back():
    caches = allocate_kv_caches(
        [KVSpec(2, 8), KVSpec(1, 24, num_parts=1)],
        num_blocks=5,
        block_size=4,
        dtype=torch.float32,
        device="cpu",
    )
    assert [tuple(cache.shape) for cache in caches] == [(2, 5, 2, 4, 8), (1, 5, 1, 4, 24)]
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    before = [cache.clone() for cache in caches]
    storage = KVStorage(caches, num_host_blocks=3)
    out = tuple(Transfer(Tier.DEVICE, block, Tier.HOST, place) for block, place in ((1, 2), (4, 0)))
    back = tuple(
        Transfer(Tier.HOST, place, Tier.DEVICE, block) for place, block in ((2, 0), (0, 3))
    )
    assert storage.transfer(out)[0] == ()
    assert storage.transfer(back)[0] == ()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, [0, 3]], old[:, [1, 4]])
        assert torch.equal(cache[:, [1, 2, 4]], old[:, [1, 2, 4]])
