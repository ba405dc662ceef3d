"""The ordinary run of the fuzzer, and whether it would notice anything."""

import os
import sys

import pytest
from fuzz import play as play_module
from fuzz.bases import bases
from fuzz.cases import Case, draw_case
from fuzz.play import BrokenPromise, play
from fuzz.pool import fuzz, replay

from octavo.errors import CheckpointError

FIRST = int(os.environ.get("OCTAVO_FUZZ_FIRST", "0"))
NUM_CASES = int(os.environ.get("OCTAVO_FUZZ_CASES", "1500"))


@pytest.mark.server  # processes of its own
def test_damaged_checkpoints_work_or_are_refused():
    report = fuzz(FIRST, FIRST + NUM_CASES, num_workers=2)
    failures = [f"{what}\nreplay: {replay(seed)}" for seed, what in report.failures.items()]
    assert not failures, f"{len(failures)} of {report.num_cases} cases:\n" + "\n".join(failures)
    assert report.num_cases == NUM_CASES
    # Most damage must be seen, and some must pass: else the dice reach one kind of case only.
    assert report.outcomes["CheckpointError"] > NUM_CASES / 4
    assert report.outcomes["worked"] > NUM_CASES / 20


def test_a_seed_is_a_case():
    assert draw_case(7) == draw_case(7)
    assert len({draw_case(seed).note for seed in range(200)}) > 150


@pytest.mark.parametrize("base", sorted(bases()))
def test_sound_checkpoints_work(base, tmp_path):
    assert play(Case(base, base, {}), tmp_path / "case") == "worked"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ValueError("x"), "ValueError escaped"),
        (RecursionError(), "RecursionError escaped"),
        (MemoryError(), "MemoryError escaped"),
        (CheckpointError("the weights are damaged"), "names no file"),
        (CheckpointError("{folder}: " + "x" * 10_000), r"has 10\d\d\d characters"),
    ],
)
def test_broken_promises_are_seen(raised, message, tmp_path, monkeypatch):
    def fail(*_):
        if raised.args:
            raise type(raised)(raised.args[0].format(folder=tmp_path / "case"))
        raise raised

    monkeypatch.setattr(play_module, "load_model", fail)
    with pytest.raises(BrokenPromise, match=message):
        play(Case("planted", "directory", {}), tmp_path / "case")


def test_a_case_can_be_played_again():
    assert replay(12) == f"PYTHONPATH=tests {os.path.basename(sys.executable)} -m fuzz --seed 12"
