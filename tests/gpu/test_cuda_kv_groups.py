"""Windows that give blocks back on an NVIDIA GPU: graphs, steps ahead, freed blocks of NaN."""

import pytest
import torch
from models.test_kv_groups import GREEDY, MODELS, NUM_TOKENS, PROMPTS

from octavo import LLM
from octavo.testing.tiny_models import reference_logits, write_tiny_model

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

WAYS = [
    ("mistral", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("gemma3", {"async_scheduling": False}),
    ("gemma3", {"enforce_eager": True}),
    ("mistral", {"max_num_batched_tokens": 32, "max_num_seqs": 3}),
    ("gemma2", {"block_size": 32, "enable_prefix_caching": False, "max_num_batched_tokens": 48}),
]


def write_tiny(path, name):
    """(directory of the checkpoint, transformers' model)"""
    architecture, changes = MODELS[name]
    return path / name, write_tiny_model(path / name, architecture, seed=3, **changes)


def poison(llm):
    """From now on, blocks that nobody has and nobody finds are NaN when a step runs.

    They are filled on the stream that steps run on, behind those that may still read them.
    """
    core = llm.engine.core
    scheduler, executor = core._scheduler, core._executor
    pool, storage = scheduler.allocator._pool, executor._runnable[1]
    schedule, unused = scheduler.schedule, {}

    def noting():
        plan = schedule()
        copied = {block for t in plan.transfers for block in (t.source, t.target)}
        free = [b for b in pool._free if pool.key_of(b) is None and b not in copied]
        unused[plan.step] = torch.tensor([*free, pool.num_blocks], device="cuda")
        return plan

    def poisoning(run):
        def poisoned(plan):
            for cache in storage.kv_caches:
                cache[:, unused[plan.step]] = torch.nan
            return run(plan)

        return poisoned

    scheduler.schedule = noting
    executor.execute = poisoning(executor.execute)
    if core._launch is not None:
        core._launch = poisoning(core._launch)


@pytest.mark.parametrize(("name", "options"), WAYS, ids=str)
def test_the_text_is_that_of_transformers_and_no_freed_block_is_read(tmp_path, name, options):
    directory, reference = write_tiny(tmp_path, name)
    memory = {"kv_cache_memory_bytes": 2**24, "dtype": "float32", "max_num_seqs": 8}
    llm = LLM(str(directory), device="cuda", **(memory | options), check_integrity=True)
    poison(llm)
    first, second = (
        [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
        for _ in range(2)  # most of it is found the second time
    )
    assert first == second
    for prompt, answer in zip(PROMPTS, first, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt["prompt_token_ids"] + answer])
            logits = reference_logits(reference, ids)[0, -NUM_TOKENS - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


def test_a_sleep_forgets_blocks_and_not_groups(tmp_path):
    directory, _ = write_tiny(tmp_path, "gemma3")
    memory = {"kv_cache_memory_bytes": 2**24, "dtype": "float32", "max_num_seqs": 4}
    llm = LLM(str(directory), device="cuda", **memory, check_integrity=True)
    before = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    llm.sleep(level=1)
    llm.wake_up()
    after = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    assert after == before
