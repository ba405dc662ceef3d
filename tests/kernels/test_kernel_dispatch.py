"""Which implementation an op gives, and what it says about those it did not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import octavo.kernels
from octavo.kernels import LINEAR, RMS_NORM, Case, Op, reference_only

CASE = Case("cpu", torch.float32, {"head_dim": 64})


def make_op() -> Op[str]:
    op: Op[str] = Op("thing", "plain")
    op.register(
        "fast", "fast function", lambda case: "needs cuda" if case.device == "cpu" else None
    )
    op.register(
        "even", "even function", lambda case: None if case.sizes["head_dim"] % 2 == 0 else "odd"
    )
    return op


def test_the_first_that_can_is_chosen_and_the_rest_explained():
    choice = make_op().select(CASE)
    assert (choice.op, choice.name, choice.function) == ("thing", "even", "even function")
    assert choice.passed_over == (("fast", "needs cuda"),)
    assert str(choice) == "thing: even (not fast: needs cuda)"


def test_the_reference_is_last_and_takes_everything():
    op = make_op()
    choice = op.select(Case("cpu", torch.float32, {"head_dim": 3}))
    assert (choice.name, choice.function) == ("reference", "plain")
    assert choice.passed_over == (("fast", "needs cuda"), ("even", "odd"))
    assert op.names() == ("fast", "even", "reference")


def test_nothing_passed_over_is_a_short_report():
    assert str(make_op().select(Case("cuda", torch.float32))) == "thing: fast"


def test_reference_only_holds_within_its_block():
    op = make_op()
    with reference_only():
        with reference_only():
            assert op.select(CASE).name == "reference"
        choice = op.select(CASE)
        assert choice.name == "reference"
        assert "only references" in str(choice)
    assert op.select(CASE).name == "even"


def test_a_module_is_imported_when_its_version_is_chosen():
    op: Op = Op("root", None)
    op.register_module("absent", "no_such_module:root", lambda case: "not here")
    op.register_module("there", "cmath:sqrt", lambda case: None)
    assert op.select(CASE).function(-1) == 1j
    assert op.names() == ("absent", "there", "reference")


def test_kernels_need_no_triton():
    """None in sys.modules makes an import fail, as if it were not installed."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from octavo.kernels import PAGED_ATTENTION, Case
print(PAGED_ATTENTION.select(Case("cuda", torch.bfloat16, {"head_dim": 64})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "reference" in done.stdout, done.stderr
    assert "triton is not installed; `pip install triton`" in done.stdout


@pytest.mark.parametrize("name", ["fast", "reference"])
def test_a_name_is_given_once(name):
    with pytest.raises(ValueError, match=name):
        make_op().register(name, "again", lambda case: None)


def test_a_case_reads_well():
    assert str(CASE) == "cpu float32 head_dim=64"


def test_every_op_has_a_reference_for_every_device_and_dtype():
    for name in octavo.kernels.__all__:
        op = getattr(octavo.kernels, name)
        if isinstance(op, Op):
            for device in ("cpu", "cuda"):
                choice = op.select(Case(device, torch.float16, {"head_dim": 72}))
                assert choice.name == "reference" or choice.passed_over is not None


def test_reports_of_real_ops():
    assert "made for cpu, not cuda" in str(RMS_NORM.select(Case("cuda", torch.bfloat16)))
    assert "made for bfloat16 and float32" in str(LINEAR.select(Case("cpu", torch.float16)))
