"""What the suites that hold models to transformers share: prompts, engines and comparisons."""

import contextlib

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.config import DeviceFacts, EngineOptions
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.engine import build_engine
from octavo.engine.memory_report import TOLERANCE, measure_largest_step
from octavo.kernels import native, reference_only
from octavo.testing.tiny_models import reference_logits

WORDS = 301  # tokens of the tiny models' vocabularies
LOGPROB_TOLERANCE = 1e-4  # fp32

needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no compiled kernels: {native.unavailable()}"
)


def prompts_of(*lengths):
    """A prompt of each length, none the beginning of another."""
    return [
        {"prompt_token_ids": [(31 * i + 7 * length) % WORDS for i in range(length)]}
        for length in lengths
    ]


def greedy(num_tokens, **options):
    """The likeliest tokens, and no end before so many of them."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **options)


def create_llm(model, **options):
    """An engine that recounts its books after every step."""
    return LLM(str(model), **({"kv_cache_memory_bytes": 2**24} | options), check_integrity=True)


def answers_of(llm, prompts, sampling):
    """To all prompts together."""
    return [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]


def ids_of(llm, prompts, sampling):
    """The ids of these answers."""
    return [answer.token_ids for answer in answers_of(llm, prompts, sampling)]


def load_reference(model):
    """transformers' model of a checkpoint, in fp32, with its own attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )


@torch.inference_mode()
def check_answers(reference, prompts, answers, *, min_distinct=4):
    """Each token is transformers' likeliest; where its likelihood is told, it is as likely.

    A model that repeats itself would prove little, so an answer has some tokens that differ.
    """
    for prompt, answer in zip(prompts, answers, strict=True):
        num_tokens = len(answer.token_ids)
        ids = torch.tensor([prompt["prompt_token_ids"] + answer.token_ids])
        logits = reference_logits(reference, ids)[0, -num_tokens - 1 : -1].float()
        assert logits.argmax(-1).tolist() == answer.token_ids
        assert len(set(answer.token_ids)) >= min_distinct
        if answer.logprobs is not None:
            found = torch.tensor([step.logprob for step in answer.logprobs])
            expected = logits.log_softmax(-1).max(-1).values
            torch.testing.assert_close(
                found, expected, rtol=LOGPROB_TOLERANCE, atol=LOGPROB_TOLERANCE
            )


def check_planned_memory(model, *, moment=None, compiled=True, **options):
    """Activations, and what else an engine on a CPU measured of itself, are as planned.

    moment: when the largest step is at its peak. Returns the engine.
    """
    flat = {"device": "cpu", "kv_cache_memory_bytes": 2**24, "max_num_batched_tokens": 512}
    with contextlib.nullcontext() if compiled else reference_only():
        engine = build_engine(EngineOptions.from_flat(str(model), flat | options))
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    plan = plan_memory(engine.config, budget, compiled=None if compiled else frozenset())
    assert moment in (None, plan.peak.name)
    measured = measure_largest_step(engine.core, engine.config)
    assert plan.activation_bytes == pytest.approx(measured, rel=TOLERANCE)
    for line in engine.memory.lines if compiled else ():
        if line.measured_bytes is not None:
            assert line.planned_bytes == pytest.approx(line.measured_bytes, rel=TOLERANCE), line
    return engine
