"""Steps replayed as CUDA graphs, and launched ahead of their results: the tokens do not change."""

import random

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.core import FinishReason, Request
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

LOOPS = {
    "eager": {"enforce_eager": True, "async_scheduling": False},
    "eager, ahead": {"enforce_eager": True},
    "graphs": {"async_scheduling": False},
    "graphs, ahead": {},
}
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]}
    for n in (1, 3, 17, 33, 60, 5, 9, 2, 70, 41, 12)
]


def draws(index):
    """A mix of plain draws and of all that needs more than a draw."""
    options = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 1.2, "logprobs": 2},
        {"temperature": 0.5, "top_k": 7, "min_tokens": 5, "stop_token_ids": [3, 4]},
    ][index % 5]
    return SamplingParams(seed=index, max_tokens=10 + index, ignore_eos=True, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


def answers(model, **options):
    llm = LLM(model, dtype="float32", max_model_len=128, max_num_seqs=8, **options)
    sampling = [draws(index) for index in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    llm.close()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def on_cpu(model):
    return answers(model, device="cpu")


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_gives_the_tokens_of_the_cpu(model, on_cpu, loop):
    options = {"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**24, **LOOPS[loop]}
    assert answers(model, device="cuda", check_integrity=True, **options) == on_cpu


BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, sizes, tokens, fp32


@pytest.mark.parametrize("num_blocks", [20, 60, 400])
def test_a_thousand_random_mixed_steps(model, num_blocks):
    """Arrivals, cancellations, chunks and preemptions; the books are checked after every step."""
    rng = random.Random(num_blocks)
    llm = LLM(
        model,
        device="cuda",
        dtype="float32",
        max_model_len=256,
        max_num_seqs=11,
        max_num_batched_tokens=90,
        kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
        check_integrity=True,
    )
    core = llm.engine.core
    assert llm.engine.num_blocks == num_blocks
    requests, tokens, cancelled = {}, {}, set()
    while core.stats().num_steps < 1_000 or core.has_work:
        is_over = core.stats().num_steps >= 1_000
        if (
            not is_over
            and core.stats().num_waiting < 9
            and (not core.has_work or rng.random() < 0.4)
        ):
            request = random_request(rng, str(len(requests)))
            requests[request.request_id], tokens[request.request_id] = request, []
            core.add(request)
        if rng.random() < 0.02:
            cancelled |= {e.request_id for e in core.abort([rng.choice(list(requests)[-12:])])}
        for event in core.step():
            tokens[event.request_id] += event.token_ids
            assert event.finish_reason in (None, FinishReason.LENGTH)
    stats = core.stats()
    assert stats.num_free_blocks == stats.num_blocks and (stats.num_preemptions or num_blocks > 20)
    finished = [request for name, request in requests.items() if name not in cancelled]
    reference = LLM(model, device="cpu", dtype="float32", kv_cache_memory_bytes=2**24)
    outputs = reference.generate(
        [{"prompt_token_ids": request.prompt_token_ids} for request in finished],
        [request.sampling for request in finished],
        use_tqdm=False,
    )
    assert len(finished) > 50 and len(cancelled) > 3
    for request, output in zip(finished, outputs, strict=True):
        assert tokens[request.request_id] == list(output.outputs[0].token_ids)


def random_request(rng, request_id):
    prompt = [rng.randrange(301) for _ in range(rng.choice((1, 5, 40, 150)))]
    sampling = SamplingParams(temperature=0, max_tokens=rng.randint(1, 60), ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, seed=0)


def test_nothing_is_compiled_after_the_phase_that_compiles(tmp_path, monkeypatch):
    """By no step: not by the one that is profiled, nor by graphs, nor by the first request."""
    triton = pytest.importorskip("triton")
    compiled, so_far = [], {}

    def note(*, fn, **_):
        compiled.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    shape = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    llm = LLM(
        str(write_tiny_llama(tmp_path / "tiny", head_dim=128, **shape)),
        dtype="bfloat16",
        gpu_memory_utilization=0.2,
        max_model_len=512,
        on_phase=lambda name, _: so_far.setdefault(name, len(compiled)),
    )
    llm.generate(PROMPTS, [draws(index) for index in range(len(PROMPTS))], use_tqdm=False)
    assert so_far["compile kernels"] > 10
    assert compiled[so_far["compile kernels"] :] == []


def test_the_peak_stays_under_the_share_with_graphs_and_full_steps(model):
    share = 0.2
    llm = LLM(
        model, dtype="bfloat16", gpu_memory_utilization=share, max_model_len=512, max_num_seqs=64
    )
    total = torch.cuda.get_device_properties(0).total_memory
    prompts = [{"prompt_token_ids": [1] * 300} for _ in range(80)]
    llm.generate(prompts, SamplingParams(max_tokens=5, logprobs=3), use_tqdm=False)
    assert torch.cuda.max_memory_reserved() <= (share + 0.01) * total
    assert all(
        abs(line.error) < 0.05 for line in llm.engine.memory.lines if line.what == "KV cache"
    )
