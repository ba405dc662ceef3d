"""Models some of whose layers see a window: contexts far longer than it, in blocks given back.

Whatever an engine says is held to transformers, in fp32. Blocks that nobody has hold NaN, so that
a kernel which looks behind a window, or a block that is given back too early, shows at once.
"""

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError
from octavo.kernels import reference_only
from octavo.testing.tiny_models import reference_logits, write_tiny_model

NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(n)]} for n in (1, 16, 45, 130, 200)
]
S, F = "sliding_attention", "full_attention"
MODELS = {
    "mistral": ("mistral", {"sliding_window": 24}),
    "gemma2": ("gemma2", {"sliding_window": 9, "num_hidden_layers": 4}),
    "gemma3": ("gemma3", {"num_hidden_layers": 6, "layer_types": [S, S, S, S, S, F]}),
    "gemma3, places left empty": (
        "gemma3",
        {"num_hidden_layers": 9, "layer_types": [S, S, S, F] * 2 + [S], "sliding_window": 33},
    ),
}


def create_llm(model, **options):
    # Nothing here is large enough for two threads.
    defaults = {"kv_cache_memory_bytes": 2**23, "dtype": "float32", "num_threads": 1}
    return LLM(str(model), **(defaults | options), check_integrity=True)


def tokens(llm, prompts=PROMPTS, sampling=GREEDY):
    return [
        [o.token_ids for o in r.outputs] for r in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def poison(llm):
    """From now on, blocks that nobody has and nobody finds are NaN when a step runs.

    Which they are is noted when the step is planned: what runs ahead of it may still read others.
    """
    core = llm.engine.core
    scheduler, executor = core._scheduler, core._executor
    pool, storage = scheduler.allocator._pool, executor._runnable[1]
    schedule, execute, unused = scheduler.schedule, executor.execute, {}

    def noting():
        plan = schedule()
        copied = {block for t in plan.transfers for block in (t.source, t.target)}
        free = [b for b in pool._free if pool.key_of(b) is None and b not in copied]
        unused[plan.step] = [*free, pool.num_blocks]
        return plan

    def poisoning(plan):
        blocks = unused.pop(plan.step)
        for cache in storage.kv_caches:
            cache[:, blocks] = torch.nan
        return execute(plan)

    scheduler.schedule, executor.execute = noting, poisoning


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    architecture, changes = MODELS[request.param]
    directory = tmp_path_factory.mktemp("models") / architecture
    return directory, write_tiny_model(directory, architecture, seed=3, **changes)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected(tiny):
    """What an engine answers as it is by default; each token is transformers' likeliest."""
    answers = tokens(create_llm(tiny[0]))
    for prompt, [answer] in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + answer])
        logits = reference_logits(tiny[1], ids)[0, -NUM_TOKENS - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
    # A model that repeats itself would prove little.
    assert len({token for [answer] in answers for token in answer}) > 20
    return answers


WAYS = {
    "as it is by default": {},
    "chunks": {"max_num_batched_tokens": 13, "max_num_seqs": 3},
    "chunks, a step ahead": {"max_num_batched_tokens": 13, "async_scheduling": True},
    "small blocks": {"block_size": 4, "max_num_batched_tokens": 50},
    "nothing is found again": {"enable_prefix_caching": False, "max_num_batched_tokens": 30},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_that_of_transformers_and_no_freed_block_is_read(model, expected, way):
    llm = create_llm(model, **WAYS[way])
    poison(llm)
    assert tokens(llm) == expected
    assert tokens(llm) == expected  # most of it is found this time


class RunAgain:
    """Stands in for a CUDA graph: keeps the work's result in one place, as that does."""

    def __init__(self, work):
        self._work = work
        self.out = work().clone()

    def run(self):
        self.out.copy_(self._work())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_that_are_filled_up_for_graphs_change_no_token(model, expected, asynchronous):
    llm = create_llm(
        model, max_num_batched_tokens=40, max_num_seqs=4, async_scheduling=asynchronous
    )
    llm.engine.core._executor._runnable[0].capture_graphs(lambda: RunAgain)
    poison(llm)
    assert tokens(llm) == expected


def test_no_reference_kernel_reads_a_freed_block(model, expected):
    with reference_only():
        llm = create_llm(model, max_num_batched_tokens=33)
        poison(llm)
        assert tokens(llm) == expected


def test_the_text_is_the_same_where_windows_keep_whole_contexts(model, expected):
    llm = create_llm(model, free_outside_windows=False)
    assert llm.engine.config.layer_groups.keep_all
    assert tokens(llm) == expected


def test_a_prefix_is_found_behind_its_windows_and_after_most_of_it_was_evicted(model, expected):
    llm = create_llm(model, max_num_batched_tokens=64)
    tokens(llm)
    again = llm.generate(PROMPTS[-1:], GREEDY, use_tqdm=False)[0]
    assert again.outputs[0].token_ids == expected[-1][0]
    assert again.num_cached_tokens == 192
    pool = llm.engine.core._scheduler.allocator._pool
    for _ in range(3):  # others use all of the pool but for what is in the last blocks freed
        taken = pool.take(pool.num_free - 4)
        pool.give_back(taken)
    poison(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [[output.outputs[0].token_ids] for output in outputs] == expected


def test_preemption_does_not_change_the_text(model):
    crowd = [{"prompt_token_ids": [(31 * i + 7 * n) % 301 for i in range(15)]} for n in range(1, 9)]
    roomy = create_llm(model, max_model_len=64)
    # All of them start, in a block for each group, and each of them is to grow to several.
    tight_bytes = 10 * roomy.engine.config.kv_groups.num_groups * roomy.engine.config.kv_block_bytes
    tight = create_llm(model, max_model_len=64, kv_cache_memory_bytes=tight_bytes)
    poison(tight)
    assert tokens(tight, crowd) == tokens(roomy, crowd)
    assert tight.stats().num_preemptions > roomy.stats().num_preemptions


def test_several_answers_share_what_their_windows_see(model, expected):
    llm = create_llm(model, max_num_batched_tokens=40)
    poison(llm)
    several = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=3)
    assert tokens(llm, sampling=several) == [answers * 3 for answers in expected]


def test_beams_are_those_of_an_engine_that_keeps_everything(model):
    beams = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, use_beam_search=True, n=3)
    whole = create_llm(model, free_outside_windows=False, block_size=4)
    windowed = create_llm(model, block_size=4)
    poison(windowed)
    assert tokens(windowed, sampling=beams) == tokens(whole, sampling=beams)


def test_a_pool_holds_more_long_sequences_than_without_windows(model):
    """As many run at once as the sum of what their windows and their contexts take."""

    def most_at_once(**options):
        llm = create_llm(
            model, kv_cache_memory_bytes=num_bytes, max_num_batched_tokens=32, **options
        )
        core, most = llm.engine.core, 0
        schedule = core._scheduler.schedule

        def counting():
            nonlocal most
            plan = schedule()
            most = max(most, len(plan.scheduled) if not plan.new else 0)
            return plan

        core._scheduler.schedule = counting
        crowd = [{"prompt_token_ids": [(n + i) % 301 for i in range(200)]} for n in range(12)]
        answers = tokens(llm, crowd)
        assert llm.stats().num_running == 0
        return most, answers

    whole = create_llm(model, free_outside_windows=False).engine.config
    num_bytes = 4 * -(-240 // 16) * whole.kv_block_bytes  # four of them, with all of their tokens
    (with_windows, ours), (without, theirs) = (
        most_at_once(),
        most_at_once(free_outside_windows=False),
    )
    assert ours == theirs
    assert with_windows > without


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_allocator": "contiguous"}, "one run of blocks"),
        ({"kv_offloading_size": 0.001}, "move between memories"),
        ({"max_model_len": 9}, "no context is longer"),
    ],
)
def test_what_cannot_go_with_groups_keeps_whole_contexts_and_says_so(model, options, reason):
    llm = create_llm(model, **options)
    [setting] = [s for s in llm.engine.config.settings if s.name == "free_outside_windows"]
    assert setting.value is False and reason in setting.why
    with pytest.raises(ConfigError, match=f"free_outside_windows cannot be had.*{reason}"):
        create_llm(model, free_outside_windows=True, **options)
