"""Beam search against transformers' on tiny Llamas, against enumeration, and by hand."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core import FinishReason
from octavo.errors import IntegrityError
from octavo.scheduler.beam import BeamSearch, Continuation
from octavo.testing.tiny_llama import write_tiny_llama

VOCAB_SIZE = 40  # so small that a few stop ids are often among the likeliest
MAX_TOKENS = 9
LENGTH_PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")
ENDS = (FinishReason.STOP, FinishReason.LENGTH)


def prompts_of(num_tokens):
    return [[(31 * i + 7 * n) % VOCAB_SIZE for i in range(num_tokens)] for n in range(3)]


class Model:
    """A tiny Llama: transformers' beam search of it, and what our beams would report."""

    def __init__(self, directory, seed):
        from transformers import AutoModelForCausalLM

        checkpoint = write_tiny_llama(
            directory, seed=seed, vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=1
        )
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        self._logprobs = {}
        for prompt in prompts_of(5):
            search_model(self, prompt, beam_width=4, stop_ids=())
        seconds = Counter(
            token_id for _, ids in self._logprobs.values() for token_id in ids[1:4].tolist()
        )
        # Often likely, seldom the likeliest: as stop ids they end some beams, early and late.
        self.stop_ids = [token_id for token_id, _ in seconds.most_common(4)]

    @torch.inference_mode()
    def generate(self, prompts, *, beam_width, stop_ids, max_tokens=MAX_TOKENS, **options):
        """transformers' hypotheses for each prompt: (token ids, score), best first."""
        ids = torch.tensor(prompts)
        pad = -1  # no token: what follows a hypothesis that ended early
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beam_width,
            num_return_sequences=beam_width,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad,
            output_scores=True,
            return_dict_in_generate=True,
            # By name, because one beam would be greedy search, which has no scores.
            custom_generate=type(self._model)._beam_search,
            **options,
        )
        sequences = [
            tuple(itertools.takewhile(lambda token_id: token_id != pad, row))
            for row in output.sequences[:, ids.shape[1] :].tolist()
        ]
        found = list(zip(sequences, output.sequences_scores.tolist(), strict=True))
        return [found[i : i + beam_width] for i in range(0, len(found), beam_width)]

    @torch.inference_mode()
    def likeliest(self, token_ids, num_tokens):
        """(token id, log-probability) of the likeliest next tokens, by a full forward pass."""
        key = tuple(token_ids)
        if key not in self._logprobs:
            logits = self._model(torch.tensor([token_ids])).logits[0, -1]
            self._logprobs[key] = logits.log_softmax(-1).sort(descending=True)
        logprobs, ids = self._logprobs[key]
        top = slice(num_tokens)
        return list(zip(ids[top].tolist(), logprobs[top].tolist(), strict=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Handing such small matrices to a second thread costs far more than it saves."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module", params=(1, 2), ids=lambda seed: f"seed {seed}")
def model(request, tmp_path_factory):
    return Model(tmp_path_factory.mktemp("models") / "tiny", request.param)


def run(search, report):
    """Drive a search to its end: its hypotheses, and how many beams were live in each step.

    `report(token_ids, num_candidates)` plays the model. Tokens are followed from parent to child
    out here too, as an engine's sequences would.
    """
    beams, num_live = [()], []
    while beams:
        num_live.append(len(beams))
        step = search.advance([report(beam, search.num_candidates) for beam in beams])
        assert all(0 <= parent < len(beams) for parent, _ in step)
        beams = [(*beams[parent], token_id) for parent, token_id in step]
        assert len(set(beams)) == len(beams)
    return search.hypotheses, num_live


def search_model(model, prompt, *, stop_ids, max_tokens=MAX_TOKENS, **options):
    search = BeamSearch(stop_ids=frozenset(stop_ids), max_tokens=max_tokens, **options)
    return run(search, lambda beam, num_tokens: model.likeliest([*prompt, *beam], num_tokens))[0]


def assert_same(ours, theirs):
    assert [found.token_ids for found in ours] == [token_ids for token_ids, _ in theirs]
    assert [found.score for found in ours] == pytest.approx([s for _, s in theirs], rel=1e-5)


@pytest.mark.parametrize("num_stop_ids", [0, 1, 4])
@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("beam_width", range(1, 7))
def test_hypotheses_are_those_of_transformers(model, beam_width, early_stopping, num_stop_ids):
    prompts = prompts_of(5)
    for length_penalty in LENGTH_PENALTIES:
        options = {
            "beam_width": beam_width,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "stop_ids": model.stop_ids[:num_stop_ids],
        }
        expected = model.generate(prompts, **options)
        for prompt, theirs in zip(prompts, expected, strict=True):
            assert_same(search_model(model, prompt, **options), theirs)


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 33])
@pytest.mark.parametrize("max_tokens", [1, 2, 30])
def test_neither_the_prompt_nor_the_limit_changes_that(model, num_prompt_tokens, max_tokens):
    for prompt in prompts_of(num_prompt_tokens):
        for early_stopping in EARLY_STOPPING:
            options = {
                "beam_width": 4,
                "stop_ids": model.stop_ids[:1],
                "early_stopping": early_stopping,
                "max_tokens": max_tokens,
            }
            ours = search_model(model, prompt, **options)
            assert_same(ours, model.generate([prompt], **options)[0])


def test_the_cases_held_to_transformers_are_worth_it(model):
    """Hypotheses end early and late, for both reasons, and every option changes some answer."""
    answers, found = {}, []
    for length_penalty, early_stopping in itertools.product(LENGTH_PENALTIES, EARLY_STOPPING):
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        of_each_prompt = [
            search_model(model, prompt, beam_width=4, stop_ids=model.stop_ids, **options)
            for prompt in prompts_of(5)
        ]
        found += itertools.chain(*of_each_prompt)
        answers[length_penalty, early_stopping] = tuple(of_each_prompt)
    assert len({len(hypothesis.token_ids) for hypothesis in found}) > MAX_TOKENS // 2
    assert {hypothesis.finish_reason for hypothesis in found} == set(ENDS)
    token_ids = {
        options: tuple(h.token_ids for found in answer for h in found)
        for options, answer in answers.items()
    }
    assert len({token_ids[1.0, early_stopping] for early_stopping in EARLY_STOPPING}) == 3
    assert len({token_ids[penalty, False] for penalty in LENGTH_PENALTIES}) > 2


def test_a_search_by_hand():
    """Two beams, "." (0) ends. Chances as in the table; scores are mean log-probabilities."""
    log = math.log
    search = BeamSearch(beam_width=2, max_tokens=3, stop_ids=frozenset({0}))
    assert search.num_candidates == 3

    # a 0.5, b 0.3, "." 0.2: the stop id is third, so that hypothesis is dropped.
    step = search.advance([[(1, log(0.5)), (2, log(0.3)), (0, log(0.2))]])
    assert step == [Continuation(0, 1), Continuation(0, 2)]
    assert search.hypotheses == ()

    # a: "." 0.6, b 0.3, a 0.1    -> a. 0.30, ab 0.15, aa 0.05
    # b: a 0.8, b 0.15, "." 0.05  -> ba 0.24, bb 0.045, b. 0.015
    step = search.advance(
        [
            [(0, log(0.6)), (2, log(0.3)), (1, log(0.1))],
            [(1, log(0.8)), (2, log(0.15)), (0, log(0.05))],
        ]
    )
    assert step == [Continuation(1, 1), Continuation(0, 2)]
    [first] = search.hypotheses
    assert first.token_ids == (1, 0)
    assert first.score == pytest.approx(log(0.3) / 2)

    # ba: a 0.9, "." 0.1 -> baa 0.216; ab: "." 0.9, a 0.1 -> ab. 0.135. The third token is the last.
    step = search.advance([[(1, log(0.9)), (0, log(0.1))], [(0, log(0.9)), (1, log(0.1))]])
    assert step == []
    best, second = search.hypotheses
    assert (best.token_ids, best.finish_reason) == ((2, 1, 1), FinishReason.LENGTH)
    assert best.score == pytest.approx(log(0.216) / 3)
    assert (second.token_ids, second.finish_reason) == ((1, 0), FinishReason.STOP)


@pytest.mark.parametrize(
    "early_stopping, length_penalty, num_steps",
    [(True, 1.0, 2), (False, 1.0, 3), ("never", 1.0, 7), ("never", 0.0, 3), ("never", -1.0, 3)],
)
def test_when_a_search_is_over(early_stopping, length_penalty, num_steps):
    """Two beams. "." has 0.5, "a." has 0.12, "ac" has 0.18, and each further c costs 0.2.

    After the second step there are two hypotheses, and True ends the search. "ac" is better than
    "a." at the same length; "acc" is worse, log(0.036) / 3 < log(0.12) / 2, and False ends it.
    "never" asks whether it could be better at eight tokens, until log(5.76e-5) / 8 is worse too;
    where length is no help, it ends as soon as False does.
    """
    log = math.log
    reports = {
        (): [(0, log(0.5)), (1, log(0.3)), (2, log(0.15))],
        (1,): [(3, log(0.6)), (0, log(0.4))],
    }
    search = BeamSearch(
        beam_width=2,
        max_tokens=8,
        stop_ids=frozenset({0}),
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    found, num_live = run(search, lambda beam, _: reports.get(beam, [(3, log(0.2)), (4, log(0.1))]))
    assert len(num_live) == num_steps
    assert [hypothesis.token_ids for hypothesis in found] == [(0,), (1, 0)]


def complete_sequences(logprobs, length_penalty, max_tokens):
    """(score, token ids) of all answers there are, by enumeration; token 0 ends one."""
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(3), repeat=length):
            if 0 in tokens[:-1] or (length < max_tokens and tokens[-1] != 0):
                continue
            total = sum(logprobs[tokens[:i]][token] for i, token in enumerate(tokens))
            yield total / length**length_penalty, tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LENGTH_PENALTIES), st.integers(12, 15))
def test_a_search_wide_enough_finds_the_best_of_all_answers(seed, length_penalty, beam_width):
    """Three tokens, three steps: 12 candidates in the last step at most, and 15 answers in all."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = {
        prefix: torch.randn(3, generator=generator).mul(3).log_softmax(-1).tolist()
        for length in range(3)
        for prefix in itertools.product((1, 2), repeat=length)
    }
    search = BeamSearch(
        beam_width=beam_width,
        max_tokens=3,
        stop_ids=frozenset({0}),
        length_penalty=length_penalty,
        early_stopping="never",
    )
    found, _ = run(search, lambda beam, _: sorted(enumerate(logprobs[beam]), key=lambda c: -c[1]))
    best = sorted(complete_sequences(logprobs, length_penalty, 3), reverse=True)[:beam_width]
    assert [h.token_ids for h in found] == [tokens for _, tokens in best]
    assert [h.score for h in found] == pytest.approx([score for score, _ in best])


def report_random(seed, vocab_size):
    """A model without a network: log-probabilities that depend on the seed and the beam alone."""

    def report(beam, num_tokens):
        generator = torch.Generator().manual_seed(hash((seed, beam)) % 2**63)
        # Rounded, so that there are ties.
        logprobs = torch.randn(vocab_size, generator=generator).log_softmax(-1).mul(8).round() / 8
        top, ids = logprobs.sort(descending=True, stable=True)
        return list(zip(ids.tolist(), top.tolist(), strict=True))[:num_tokens]

    return report


searches = st.fixed_dictionaries(
    {
        "beam_width": st.integers(1, 6),
        "max_tokens": st.integers(1, 6),
        "stop_ids": st.frozensets(st.integers(0, 19), max_size=4),
        "length_penalty": st.sampled_from(LENGTH_PENALTIES),
        "early_stopping": st.sampled_from(EARLY_STOPPING),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), searches)
def test_every_search_ends_with_all_its_hypotheses_best_first(seed, options):
    found, num_live = run(BeamSearch(**options), report_random(seed, 20))
    assert num_live == [1] + [options["beam_width"]] * (len(num_live) - 1)
    assert len(num_live) <= options["max_tokens"]
    assert len(found) == len({h.token_ids for h in found}) == options["beam_width"]
    scores = [h.score for h in found]
    assert scores == sorted(scores, reverse=True)
    for hypothesis in found:
        stops = [token_id in options["stop_ids"] for token_id in hypothesis.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (hypothesis.finish_reason is FinishReason.STOP)
        assert stops[-1] or len(stops) == options["max_tokens"]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), searches)
def test_more_candidates_than_asked_for_change_nothing(seed, options):
    report = report_random(seed, 20)
    asked = run(BeamSearch(**options), report)
    assert run(BeamSearch(**options), lambda beam, _: report(beam, 20)) == asked


def test_ties_go_to_the_older_hypothesis_the_better_parent_and_the_token_reported_first():
    search = BeamSearch(beam_width=2, max_tokens=9, stop_ids=frozenset({0}), length_penalty=0.0)
    assert search.advance([[(5, -1.0), (3, -1.0), (0, -1.5)]]) == [(0, 5), (0, 3)]
    step = search.advance([[(7, -1.0), (0, -1.0), (8, -2.0)], [(9, -1.0), (0, -2.0), (7, -3.0)]])
    assert step == [(0, 7), (1, 9)]
    step = search.advance([[(6, 0.0), (0, 0.0), (1, -9.0)], [(0, 0.0), (6, -1.0), (1, -9.0)]])
    assert [h.token_ids for h in search.hypotheses] == [(5, 0), (5, 7, 0)]
    assert step == []


def test_fewer_ways_to_go_on_than_beams_leave_fewer_beams():
    masked = -math.inf
    search = BeamSearch(beam_width=3, max_tokens=9, stop_ids=frozenset({0}))
    step = search.advance([[(1, -0.1), (2, -2.0), (0, masked), (3, masked)]])
    assert step == [(0, 1), (0, 2)]
    step = search.advance([[(0, -1.0), (1, masked)], [(0, -0.5), (1, masked)]])
    assert step == []
    assert [h.token_ids for h in search.hypotheses] == [(1, 0), (2, 0)]


def test_a_beam_that_did_not_report_is_a_fault_and_so_is_a_step_after_the_end():
    search = BeamSearch(beam_width=2, max_tokens=2, stop_ids=frozenset())
    with pytest.raises(IntegrityError, match="2 beams reported, but 1 are live"):
        search.advance([[(1, -1.0), (2, -2.0)]] * 2)
    run(search, lambda beam, _: [(1, -1.0), (2, -2.0)])
    with pytest.raises(IntegrityError, match="0 are live"):
        search.advance([])
