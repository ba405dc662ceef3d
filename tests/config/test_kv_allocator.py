"""The choice of a KV allocator, and what it decides about prefix caching and the context."""

import pytest
from checkpoint_files import HF_CONFIG

from octavo.config import DeviceFacts, EngineOptions, model_config_from_hf, resolve
from octavo.engine.build import create_allocator
from octavo.errors import ConfigError
from octavo.kvcache import BuddyAllocator, ContiguousAllocator, PagedAllocator, PrefixAllocator

FACTS = DeviceFacts("cpu", "a test", 1, 2**30, 2**30)
MODEL = model_config_from_hf(HF_CONFIG)


def resolved(**values):
    return resolve(EngineOptions.from_flat("a model", values), MODEL, FACTS)


def setting(config, name):
    found = {s.name: (s.value, s.source) for s in config.settings}
    return found[name]


@pytest.mark.parametrize(
    ("values", "kind", "is_cached", "source"),
    [
        ({}, PrefixAllocator, True, "default"),
        ({"enable_prefix_caching": True}, PrefixAllocator, True, "user"),
        ({"enable_prefix_caching": False}, PagedAllocator, False, "user"),
        ({"kv_allocator": "contiguous"}, ContiguousAllocator, False, "rule"),
        ({"kv_allocator": "contiguous-buddy"}, BuddyAllocator, False, "rule"),
        (
            {"kv_allocator": "contiguous", "enable_prefix_caching": False},
            ContiguousAllocator,
            False,
            "user",
        ),
    ],
)
def test_the_allocator_decides_whether_prefixes_are_shared(values, kind, is_cached, source):
    config = resolved(**values)
    assert config.enable_prefix_caching is is_cached
    assert setting(config, "enable_prefix_caching") == (is_cached, source)
    assert setting(config, "kv_allocator")[1] == ("user" if "kv_allocator" in values else "default")
    assert type(create_allocator(config, 100)) is kind


@pytest.mark.parametrize("name", ["contiguous", "contiguous-buddy"])
def test_sharing_what_lies_in_one_run_is_refused(name):
    with pytest.raises(ConfigError, match=f"enable_prefix_caching.*kv_allocator {name}"):
        resolved(kv_allocator=name, enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"kv_allocator": "slab"},
            "kv_allocator must be one of contiguous, contiguous-buddy, paged",
        ),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be true or false"),
    ],
)
def test_values_out_of_range_are_refused(values, expected):
    with pytest.raises(ConfigError, match=expected):
        resolved(**values)


def test_the_context_fits_one_run():
    """Seven blocks are 112 slots, but the longest run of a power of two has four."""
    num_bytes = 7 * resolved().kv_block_bytes
    assert resolved(kv_cache_memory_bytes=num_bytes).max_model_len == 112
    config = resolved(kv_cache_memory_bytes=num_bytes, kv_allocator="contiguous-buddy")
    assert config.max_model_len == 64
    allocator = create_allocator(config, 7)
    assert allocator.num_blocks_for(config.max_model_len - 1) == 4
    with pytest.raises(ConfigError, match="one run of a power of two"):
        resolved(kv_cache_memory_bytes=num_bytes, kv_allocator="contiguous-buddy", max_model_len=65)
