"""A copy between tiers that fails: whatever was made of it is lost, and nothing else."""

import pytest

from octavo.core import StepPlan, Tier, Transfer
from octavo.scheduler.failed_transfers import spoilt_places
from octavo.sim.swarm import quiet_engine, run_seed

DEVICE, HOST, DISK = Tier


def plan(*transfers):
    return StepPlan(1, (), (), (), tuple(Transfer(*transfer) for transfer in transfers))


@pytest.mark.parametrize(
    "transfers, failed, expected",
    [
        ([(DISK, 1, DEVICE, 5)], [0], {(DISK, 1), (DEVICE, 5)}),
        ([(DEVICE, 1, HOST, 5)], [0], {(HOST, 5)}),
        ([(HOST, 1, DEVICE, 5), (HOST, 2, DEVICE, 6)], [1], {(HOST, 2), (DEVICE, 6)}),
        (  # shared and copied on write before anybody knew
            [(HOST, 1, DEVICE, 5), (DEVICE, 5, DEVICE, 6), (DEVICE, 6, DEVICE, 7)],
            [0],
            {(HOST, 1), (DEVICE, 5), (DEVICE, 6), (DEVICE, 7)},
        ),
        (  # evicted on to the disk
            [(DEVICE, 1, HOST, 0), (HOST, 0, DISK, 9), (DEVICE, 2, HOST, 0)],
            [0],
            {(DISK, 9)},
        ),
        ([(DEVICE, 1, HOST, 0), (HOST, 0, DISK, 9)], [1], {(HOST, 0), (DISK, 9)}),
    ],
)
def test_what_was_copied_on_is_lost_and_what_was_overwritten_is_not(transfers, failed, expected):
    assert spoilt_places(failed, [plan(*transfers)]) == expected


def test_plans_made_before_the_failure_was_known_are_followed():
    first = plan((HOST, 1, DEVICE, 5))
    second = plan((DEVICE, 5, HOST, 3), (HOST, 2, DEVICE, 5))
    assert spoilt_places([0], [first, second]) == {(HOST, 1), (HOST, 3)}


@pytest.mark.parametrize("seed", [52479, 70482, 77153, 90007, 96584])
def test_seeds_that_once_read_lost_blocks(seed):
    with quiet_engine():
        run_seed(seed)
