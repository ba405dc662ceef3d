"""Which layers share a block table, and what that makes of memory, context and capacity."""

import dataclasses
import random

import pytest
from helpers import create_request

from octavo.config import DeviceFacts, EngineOptions, model_config_from_hf, resolve
from octavo.config.capacity import Pool
from octavo.config.kv_groups import group_by_window, why_not_grouped
from octavo.config.memory_plan import plan_memory, plan_rows
from octavo.config.planned_devices import device_budget
from octavo.core import RUNNING, KVGroups, Sequence
from octavo.errors import ConfigError
from octavo.kvcache import GroupedAllocator

S, F = "sliding_attention", "full_attention"
CPU = DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40)


def gemma3(num_layers, pattern=6):
    kinds = [F if (i + 1) % pattern == 0 else S for i in range(num_layers)]
    return model_config_from_hf(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 301,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 512,
            "max_position_embeddings": 4096,
            "layer_types": kinds,
            "torch_dtype": "bfloat16",
        }
    )


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "num_places"), [(26, 7, 4), (34, 6, 6), (48, 5, 10), (62, 5, 13)]
)
def test_layers_are_cut_to_few_groups_of_one_size(num_layers, num_groups, num_places):
    """Of the sizes of Gemma 3, whose every sixth layer sees everything."""
    config = gemma3(num_layers)
    groups = group_by_window(config)
    assert (len(groups.windows), groups.num_places) == (num_groups, num_places)
    assert num_groups * num_places <= num_layers * 1.125
    assert groups.windows[0] is None and set(groups.windows[1:]) == {512}
    # No two layers have the same place in the same group, and each is in a group of its window.
    assert len(set(zip(groups.groups, groups.places, strict=True))) == num_layers
    assert max(groups.places) < num_places
    for layer, group in zip(config.layers, groups.groups, strict=True):
        assert groups.windows[group] == layer.attention.window


def test_layers_that_keep_different_amounts_do_not_share_blocks():
    config = gemma3(12)
    narrow = dataclasses.replace(config.layers[0].attention, num_kv_heads=1)
    layers = (dataclasses.replace(config.layers[0], attention=narrow), *config.layers[1:])
    mixed = dataclasses.replace(config, layers=layers)
    assert why_not_grouped(config) is None
    assert "different amounts" in why_not_grouped(mixed)
    options = EngineOptions.from_flat("m", {"free_outside_windows": True})
    with pytest.raises(ConfigError, match="free_outside_windows cannot be had: its layers keep"):
        resolve(options, mixed, CPU)
    assert resolve(EngineOptions.from_flat("m", {}), mixed, CPU).kv_groups.keep_all


def plan(**options):
    config = resolve(EngineOptions.from_flat("m", options), gemma3(26), CPU)
    budget = device_budget(CPU, major=0, utilization=1.0)
    return config, plan_memory(config, budget)


def test_a_pool_plans_more_long_sequences_and_hardly_fewer_short_ones():
    memory = {"kv_cache_memory_bytes": 2**26, "max_num_batched_tokens": 128}
    (_, grouped), (_, whole) = plan(**memory), plan(free_outside_windows=False, **memory)
    assert grouped.kv_bytes_per_token == whole.kv_bytes_per_token
    assert grouped.kv_pool_bytes <= 2**26 and whole.kv_pool_bytes <= 2**26
    assert grouped.pool.num_sequences(4096) > 3 * whole.pool.num_sequences(4096)
    # Two of the 28 places in the blocks for 26 layers stay empty.
    assert grouped.pool.num_sequences(256) >= int(whole.pool.num_sequences(256) * 26 / 28) - 1
    assert grouped.num_kv_tokens > 3 * whole.num_kv_tokens


def test_rows_have_a_table_for_each_group():
    (config, grouped), (_, whole) = plan(), plan(free_outside_windows=False)
    tables = (config.max_num_seqs + 1) * -(-config.max_model_len // 16) * 4
    assert grouped.row_bytes - whole.row_bytes == (config.kv_groups.num_groups - 1) * tables
    assert plan_rows(config) == grouped.row_bytes


def test_the_context_is_what_the_pool_can_hold_with_steps_on_their_way():
    """Below the checkpoint's: as many tokens as one sequence alone can have."""
    config, planned = plan(kv_cache_memory_bytes=2**21 + 2**20, max_num_batched_tokens=64)
    groups, num_blocks = config.kv_groups, config.num_device_blocks
    assert config.max_model_len == planned.largest_context < 4096
    assert groups.num_blocks_for(config.max_model_len, 16) <= num_blocks
    assert groups.num_blocks_for(config.max_model_len + 16, 16) > num_blocks
    with pytest.raises(ConfigError, match="raise kv_cache_memory_bytes or lower max_model_len"):
        plan(kv_cache_memory_bytes=2**21 + 2**20, max_num_batched_tokens=64, max_model_len=4096)


@pytest.mark.parametrize("seed", range(10))
def test_what_capacity_says_a_sequence_holds_is_what_the_allocator_gives_it(seed):
    rng = random.Random(seed)
    windows = (None, *(rng.randint(1, 40) for _ in range(rng.randint(1, 3))))
    groups = KVGroups(windows, max_step_tokens=rng.choice((1, 7, 30)))
    size = rng.choice((1, 4, 16))
    allocator = GroupedAllocator(2000, size, groups=groups)
    pool = Pool(2000, size, "paged", 2000, groups)
    sequence = Sequence(create_request(prompt=[1], max_tokens=200), 200, arrival_s=0)
    sequence.num_computed_tokens = allocator.start(sequence)
    sequence.status = RUNNING
    held = []
    for num_tokens in range(1, 150):
        allocator.extend(sequence, num_tokens)
        held.append(2000 - allocator.num_free_blocks)
        # A window may lie well in its blocks: then it holds one fewer than it may.
        assert 0 <= pool.blocks_of(num_tokens) - held[-1] <= len(windows) - 1
        sequence.num_computed_tokens = sequence.num_committed_tokens = num_tokens
        allocator.computed(sequence)
        sequence.token_ids.append(1)
    assert pool.mean_blocks(149, 100) == pytest.approx(
        sum(map(pool.blocks_of, range(50, 150))) / 100
    )
