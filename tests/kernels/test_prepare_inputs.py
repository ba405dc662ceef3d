"""Input preparation against a plain loop over sequences, in both implementations."""

import random

import pytest
import torch

from octavo.kernels import (
    KNOWN_TO_THE_DEVICE,
    NO_SUCH_ID,
    NOT_FINITE,
    PREPARE_INPUTS,
    DeviceRows,
    PreparedInputs,
    StepShares,
)
from octavo.kernels.prepare_inputs import numpy_prepare_inputs
from octavo.kernels.record_draws import RECORD_DRAWS, numpy_record_draws
from octavo.kernels.triton_prepare_inputs import triton_prepare_inputs
from octavo.kernels.triton_record_draws import triton_record_draws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PADDING_SLOT = 9_999


def random_step(rng, *, block_size, num_fillers, num_spare_tokens):
    """Shares with fillers and tokens of nobody, rows, and what must come of them.

    The tables are those of one group of layers among several, all of them in one line a row.
    """
    num_rows, width, num_groups = 9, 40, rng.choice((1, 2, 3))
    group = slice(width * rng.randrange(num_groups), None)
    all_tables = torch.randint(0, 600, (num_rows, num_groups * width), dtype=torch.int32)
    tables = all_tables[:, group][:, :width]
    last_ids = torch.randint(0, 5000, (num_rows,))
    num_sequences = rng.randint(0, num_rows - 1)
    row_indices = rng.sample(range(num_rows - 1), num_sequences)
    starts, query_starts, given, expected = [], [0], [], []
    for row in row_indices:
        start = rng.randint(0, width * block_size - 1)
        num_tokens = min(rng.choice((1, 1, 2, 30, 700)), width * block_size - start)
        ids = [rng.randrange(5000) for _ in range(num_tokens)]
        if rng.random() < 0.5:
            ids[-1] = KNOWN_TO_THE_DEVICE
        for i, token_id in enumerate(ids):
            position = start + i
            slot = int(tables[row, position // block_size]) * block_size + position % block_size
            known = int(last_ids[row]) if token_id < 0 else token_id
            expected.append((known, position, slot))
        starts.append(start)
        given += ids
        query_starts.append(len(given))
    lengths = [s + b - a for s, a, b in zip(starts, query_starts, query_starts[1:], strict=False)]
    row_indices += [num_rows - 1] * num_fillers
    starts += [0] * num_fillers
    query_starts += [len(given)] * num_fillers
    expected += [(0, 0, PADDING_SLOT)] * num_spare_tokens
    given += [123] * num_spare_tokens  # what an earlier step left there
    shares = StepShares(
        *(
            torch.tensor(values, dtype=torch.int32, device=DEVICE)
            for values in (row_indices, starts, query_starts, given)
        )
    )
    rows = DeviceRows(all_tables.to(DEVICE)[:, group][:, :width], last_ids.to(DEVICE))
    return shares, rows, expected, lengths + [0] * num_fillers


IMPLEMENTATIONS = ["reference", "triton"] + ["numpy"] * (DEVICE == "cpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(25))
def test_every_token_gets_its_id_position_and_slot(seed, implementation):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size = rng.choice((1, 4, 16))
    shares, rows, expected, lengths = random_step(
        rng,
        block_size=block_size,
        num_fillers=rng.choice((0, 3)),
        num_spare_tokens=rng.choice((0, 5, 600)),
    )
    out = PreparedInputs(
        *torch.full((3, len(expected)), -7, device=DEVICE),
        torch.full((len(lengths),), -7, dtype=torch.int32, device=DEVICE),
        torch.full((len(lengths), 40), -7, dtype=torch.int32, device=DEVICE),
    )
    prepare = {
        "reference": PREPARE_INPUTS.reference,
        "triton": triton_prepare_inputs,
        "numpy": numpy_prepare_inputs,
    }
    prepare[implementation](shares, rows, out, block_size=block_size, padding_slot=PADDING_SLOT)
    columns = (out.token_ids.tolist(), out.positions.tolist(), out.slots.tolist())
    assert list(zip(*columns, strict=True)) == expected
    assert out.context_lens.tolist() == lengths
    for b, length in enumerate(lengths):
        width = -(-length // block_size)
        row = int(shares.rows[b])
        assert torch.equal(out.block_tables[b, :width], rows.block_tables[row, :width])


RECORDERS = {"reference": RECORD_DRAWS.reference, "triton": triton_record_draws}
if DEVICE == "cpu":
    RECORDERS["numpy"] = numpy_record_draws


@pytest.mark.parametrize("implementation", RECORDERS)
@pytest.mark.parametrize("num_draws", [0, 1, 7, 300])
def test_a_draw_is_remembered_and_a_failed_one_is_marked(num_draws, implementation):
    token_ids = torch.randint(0, 5000, (num_draws,), device=DEVICE)
    is_finite = torch.rand(num_draws, device=DEVICE) < 0.7
    rows = torch.randperm(400, device=DEVICE)[:num_draws].int()
    last = torch.full((400,), 77, device=DEVICE)
    seen = token_ids.clone()
    RECORDERS[implementation](seen, is_finite, rows, last, vocab_size=5000)
    assert torch.equal(seen, torch.where(is_finite, token_ids, NOT_FINITE))
    expected = torch.full((400,), 77, device=DEVICE)
    expected[rows.long()] = token_ids
    assert torch.equal(last, expected)


@pytest.mark.parametrize("implementation", RECORDERS)
def test_F45_an_id_beyond_the_vocabulary_is_marked_and_never_fed_back(implementation):
    drawn = torch.tensor([99, 100, 2**40, -1, 0, 100], device=DEVICE)
    is_finite = torch.tensor([True] * 5 + [False], device=DEVICE)
    rows = torch.tensor([4, 3, 2, 1, 0, 5], device=DEVICE, dtype=torch.int32)
    last = torch.full((6,), 77, device=DEVICE)
    RECORDERS[implementation](drawn, is_finite, rows, last, vocab_size=100)
    assert drawn.tolist() == [99, NO_SUCH_ID, NO_SUCH_ID, NO_SUCH_ID, 0, NOT_FINITE]
    assert last.tolist() == [0, 0, 0, 0, 99, 0]
