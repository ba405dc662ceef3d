"""The sampling steps against plain re-statements of their papers, and the promise about seeds."""

import numpy as np
import pytest
import torch

from octavo.core import NewSequence, SamplingParams
from octavo.kernels import NOT_FINITE, SAMPLE_TOKENS, DrawOptions, sampling
from octavo.runner.rows import OptionColumns, Row
from octavo.runner.sampler import sample

VOCAB_SIZE = 5003


def row(output_ids=(), prompt_ids=(1, 2, 3), *, seed=0, stop_ids=(), **params):
    return Row(
        NewSequence(
            sequence_id="s",
            token_ids=(*prompt_ids, *output_ids),
            num_prompt_tokens=len(prompt_ids),
            num_computed_tokens=0,
            block_ids=(),
            sampling=SamplingParams(**params),
            seed=seed,
            stop_ids=frozenset(stop_ids),
            num_logprobs=params.get("logprobs"),
        )
    )


def random_logits(num_rows, seed=0):
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits, rows):
    """As the runner draws: all columns of options, and the op."""
    columns = OptionColumns(len(rows))
    for index, one in enumerate(rows):
        columns.set(index, one)
    options = DrawOptions(
        temperature=torch.from_numpy(columns.temperature),
        top_k=torch.from_numpy(columns.top_k),
        top_p=torch.from_numpy(columns.top_p),
        min_p=torch.from_numpy(columns.min_p),
        seeds=torch.from_numpy(columns.seeds),
        positions=torch.tensor([one.num_tokens for one in rows]),
        truncates=bool(columns.truncates.any()),
    )

    def draw(logits):
        token_ids, is_finite = SAMPLE_TOKENS.reference(logits, options)
        return token_ids.masked_fill(~is_finite, NOT_FINITE)

    return sample(logits.clone(), rows, draw)


def tokens(logits, rows):
    return draws(logits, rows).token_ids


def test_greedy_takes_the_likeliest():
    logits = random_logits(4)
    assert tokens(logits, [row(temperature=0)] * 4) == logits.argmax(-1).tolist()


def test_a_draw_depends_on_seed_position_and_logits_and_on_nothing_else():
    logits = random_logits(6)
    rows = [row(seed=i // 2, temperature=0.8, top_p=0.95) for i in range(5)]
    rows.append(row(temperature=0))
    together = tokens(logits, rows)
    for i, single in enumerate(rows):
        assert tokens(logits[i : i + 1], [single]) == together[i : i + 1]
    same_logits = logits[:1].repeat(40, 1)
    later = [row(output_ids=range(n), temperature=1.0) for n in range(40)]
    assert len(set(tokens(same_logits, later))) > 10  # the position matters
    seeds = [row(seed=n, temperature=1.0) for n in range(40)]
    assert len(set(tokens(same_logits, seeds))) > 10  # the seed matters


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    rows = [row(seed=s, temperature=2.0) for s in range(20_000)]
    counts = np.bincount(tokens(logits.repeat(len(rows), 1), rows), minlength=4)
    expected = (logits[0] / 2.0).softmax(0).numpy() * len(rows)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom: one in a thousand, and the seeds are fixed


def test_philox_gives_the_published_answers():
    """Random123's known-answer test vectors for philox4x32-10 with zero and all-ones input."""
    zeros = sampling.philox_uniform(np.array([0]), np.array([0]))
    assert zeros[0] == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53


@pytest.mark.parametrize("top_k", [1, 2, 50, VOCAB_SIZE, 10 * VOCAB_SIZE, 0])
def test_top_k_keeps_exactly_the_k_likeliest(top_k):
    logits = random_logits(3)
    kept = sampling.mask_top_k(logits, torch.full((3,), top_k)).isfinite()
    expected = top_k if 0 < top_k < VOCAB_SIZE else VOCAB_SIZE
    assert kept.sum(-1).tolist() == [expected] * 3
    for r in range(3 if expected < VOCAB_SIZE else 0):
        assert logits[r][kept[r]].min() > logits[r][~kept[r]].max()


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.9, 0.9999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(scale, top_p):
    logits = random_logits(2) * scale
    kept = sampling.mask_top_p(logits, torch.full((2,), top_p)).isfinite()
    for r in range(2):
        probabilities = logits[r].double().softmax(0)
        ordered = probabilities.sort(descending=True).values
        smallest = int((ordered.cumsum(0) < top_p - 1e-6).sum()) + 1
        assert abs(int(kept[r].sum()) - smallest) <= 1 + smallest // 200  # fp32 sums at the edge
        assert probabilities[kept[r]].sum() >= top_p - 1e-5
        if bool((~kept[r]).any()):
            assert probabilities[kept[r]].min() >= probabilities[~kept[r]].max()


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = sampling.mask_min_p(logits, torch.tensor([0.29])).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


def test_rows_without_a_filter_are_untouched_by_their_neighbours_filter():
    logits = random_logits(2)
    masked = sampling.mask_top_k(logits, torch.tensor([3, 0]))
    assert torch.equal(masked[1], logits[1])
    masked = sampling.mask_min_p(logits, torch.tensor([0.5, 0.0]))
    assert torch.equal(masked[1], logits[1])


def test_penalties_follow_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.0, 0.0]])
    one = row(
        prompt_ids=(0,),
        output_ids=(1, 2, 2),
        temperature=0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=2.0,
        logprobs=0,
    )
    changed = logits.clone()
    sample(changed, [one], lambda logits: logits.argmax(-1))
    expected = [2.0 / 2, -2.0 * 2 - 0.75, 1.0 / 2 - 0.5 - 0.5, 1.0, 0.0]
    assert changed[0].tolist() == pytest.approx(expected)


def test_bias_allowed_ids_and_min_tokens():
    logits = random_logits(3)
    best = logits.argmax(-1).tolist()
    rows = [
        row(temperature=0, logit_bias={best[0]: -100.0}),
        row(temperature=0, allowed_token_ids=[17, 23]),
        row(temperature=0, min_tokens=2, max_tokens=9, stop_ids=(best[2],), output_ids=(5,)),
    ]
    got = tokens(logits, rows)
    assert got[0] == logits[0].topk(2).indices[1]
    assert got[1] == max((17, 23), key=lambda i: float(logits[1, i]))
    assert got[2] == logits[2].topk(2).indices[1]
    enough = row(temperature=0, min_tokens=2, max_tokens=9, stop_ids=(best[2],), output_ids=(5, 6))
    assert tokens(logits[2:], [enough]) == [best[2]]


def test_logprobs_are_of_the_models_own_distribution():
    logits = random_logits(2)
    rows = [row(temperature=0, logprobs=3, logit_bias={7: 100.0}), row(temperature=0)]
    drawn = draws(logits, rows)
    first, second = drawn.logprobs
    expected = logits[0].log_softmax(0)
    assert drawn.token_ids[0] == 7
    assert first.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert first.rank == int((expected > expected[7]).sum()) + 1
    assert [t for t, _ in first.top] == expected.topk(3).indices.tolist()
    assert second is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_that_is_not_finite_fails_alone(poison, temperature):
    clean = random_logits(3)
    poisoned = clean.clone()
    poisoned[1, 100] = poison
    rows = [row(seed=i, temperature=temperature) for i in range(3)]
    result = tokens(poisoned, rows)
    assert result[1] == NOT_FINITE
    assert [result[0], result[2]] == tokens(clean[[0, 2]], [rows[0], rows[2]])
