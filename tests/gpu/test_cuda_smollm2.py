"""SmolLM2's real weights on an NVIDIA GPU: each greedy token is that of fp32 on the CPU, or nearly.

tests/model holds that reference to transformers. All 20 x 64 choices are compared, each made after
the reference's own tokens: an answer that leaves the reference's is begun again behind that place.

How near a tie must be where bf16 takes another token: bf16 has 8 bits, so a logit x is known to
|x| * 2**-8. The greatest logits of this model lie between 32 and 64, where that is up to 0.125 for
each of two tokens, 0.25 for the gap between them. Rounding inside the model moves gaps by more than
that: transformers' bf16 on a CPU, against its own fp32, moves those from the likeliest token to the
next five by up to 0.41 in 99% of these choices. Both together are less than three times 0.25.

So wide a bound alone would let much pass; hence such choices must be few, too: transformers' bf16
makes 19 to 22 of them by its way of attention, Octavo's on a CPU 22, with gaps of up to 0.51.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from prompts import PROMPTS

from octavo import LLM, SamplingParams
from octavo.config import DEFAULT_MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

NUM_TOKENS = 64
NUM_CHOICES = len(PROMPTS) * NUM_TOKENS
BF16_TIE = 3 * 0.25
FP32_TIE = 1e-4
MAX_BF16_TIES = NUM_CHOICES * 3 // 100


@dataclass(frozen=True)
class Difference:
    """A choice that is not the reference's. gap: by how much the reference's logits prefer its."""

    prompt: int
    place: int
    gap: float


def create_llm(dtype, device="cuda"):
    return LLM(
        DEFAULT_MODEL,
        device=device,
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=32,
        kv_cache_memory_bytes=2**29,
    )


def answers(llm, prompts, nums_tokens, logprobs=None):
    """The greedy answer to each prompt, all in one batch."""
    sampling = [
        SamplingParams(temperature=0, max_tokens=num, ignore_eos=True, logprobs=logprobs)
        for num in nums_tokens
    ]
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    return [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]


def differences(llm, prompts, reference):
    """All choices that differ, each after the reference's own tokens."""
    found = []
    begins = dict.fromkeys(range(len(prompts)), 0)  # of what is not compared yet, by prompt
    while begins:
        given = [prompts[i] + reference[i].token_ids[:begin] for i, begin in begins.items()]
        tried = answers(llm, given, [NUM_TOKENS - begin for begin in begins.values()])
        left = {}
        for (i, begin), answer in zip(begins.items(), tried, strict=True):
            expected = reference[i].token_ids[begin:]
            pairs = zip(answer.token_ids, expected, strict=True)
            offset = next((k for k, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
            if offset is None:
                continue
            report = reference[i].logprobs[begin + offset]
            logprob = dict(report.top).get(answer.token_ids[offset], -math.inf)
            found.append(Difference(i, begin + offset, report.logprob - logprob))
            if begin + offset + 1 < NUM_TOKENS:
                left[i] = begin + offset + 1
        begins = left
    return found


@pytest.fixture(scope="module")
def on_cpu():
    """The prompts' ids, and the reference's answers with the logprobs of its likeliest tokens."""
    llm = create_llm("float32", "cpu")
    prompts = [llm.get_tokenizer().encode(text) for text in PROMPTS]
    assert max(map(len, prompts)) > 1000
    reference = answers(llm, prompts, [NUM_TOKENS] * len(prompts), logprobs=20)
    llm.close()
    return prompts, reference


def differences_on_the_gpu(dtype, on_cpu):
    """In the loop that is the default: CUDA graphs, launched ahead of their results."""
    llm = create_llm(dtype)
    assert llm.engine.config.async_scheduling and not llm.engine.config.enforce_eager
    found = differences(llm, *on_cpu)
    llm.close()
    return found


def test_fp32_takes_every_token_of_the_cpu(on_cpu):
    found = differences_on_the_gpu("float32", on_cpu)
    assert [difference for difference in found if difference.gap >= FP32_TIE] == []


def test_bf16_takes_another_token_in_near_ties_only(on_cpu):
    found = differences_on_the_gpu("bfloat16", on_cpu)
    assert [difference for difference in found if difference.gap >= BF16_TIE] == []
    assert len(found) <= MAX_BF16_TIES
