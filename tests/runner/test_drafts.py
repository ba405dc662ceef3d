"""Drafts in the real runner: right, wrong or half right, they never change the text."""

import itertools

import pytest
from msgspec import structs

from octavo import LLM, SamplingParams
from octavo.testing.tiny_llama import write_tiny_llama

PROMPTS = [[(31 * i + 7 * n) % 301 for i in range(n)] for n in (3, 16, 40, 90)]


class Guessing:
    """Adds guesses to another executor's results: the known answers, some of them spoilt."""

    def __init__(self, executor, answers, *, num_drafts, every):
        self._executor = executor
        self._answers = answers
        self._num_drafts = num_drafts
        self._every = every  # each so manieth guess is wrong
        self._rows = {}
        self._count = itertools.count(1)
        self.num_steps = 0

    def execute(self, plan):
        self.num_steps += 1
        for new in plan.new:
            self._rows[new.sequence_id] = list(new.token_ids)
        result = self._executor.execute(plan)
        return structs.replace(result, sampled=tuple(map(self._guess, result.sampled)))

    def _guess(self, sampled):
        row = self._rows[sampled.sequence_id]
        row += sampled.token_ids
        whole = next(a for a in self._answers if a[: len(row)] == row)
        guesses = whole[len(row) : len(row) + self._num_drafts]
        spoilt = [g if next(self._count) % self._every else (g + 1) % 301 for g in guesses]
        return structs.replace(sampled, draft_ids=tuple(spoilt))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def answers_of(llm, sampling):
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [2, 3, 1000])
def test_drafts_save_steps_and_never_change_the_text(model, options, every):
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False, **options)
    plain = LLM(str(model), kv_cache_memory_bytes=2**24, check_integrity=True)
    expected = answers_of(plain, sampling)
    llm = LLM(str(model), kv_cache_memory_bytes=2**24, check_integrity=True)
    core = llm.engine.core
    known = [p + a.token_ids for p, a in zip(PROMPTS, expected, strict=True)]
    guessing = Guessing(core._executor, known, num_drafts=3, every=every)
    core._executor = guessing
    found = answers_of(llm, sampling)
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    if "logprobs" in options:
        for one, other in zip(found, expected, strict=True):
            assert [p.top for p in one.logprobs] == [p.top for p in other.logprobs]
    assert guessing.num_steps < plain.stats().num_steps * (0.4 if every == 1000 else 1.0)
