"""The step-time model: it finds costs that are known, and is not led astray by disturbed steps."""

import msgspec
import numpy as np
import pytest
from helpers import create_recorded

from octavo.core import NewSequence, SamplingParams, ScheduledTokens, StepPlan
from octavo.errors import ConfigError
from octavo.sim import step_time
from octavo.sim.step_time import (
    COSTS,
    HOST_COSTS,
    ShapeTracker,
    StepShape,
    TimedStep,
    features,
    fit,
    read_step_times,
    solve_non_negative,
    write_step_times,
)

RECORDED = create_recorded()
TRUE_COSTS = dict.fromkeys(COSTS, 0.0) | {
    "step": 0.010,
    "token": 0.0003,
    "token up to 16": 0.0001,
    "decode context": 1e-6,
    "prefill attention": 2e-7,
}


def random_shapes(count, seed=0):
    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        num_decodes, num_chunk = (
            int(rng.integers(0, 65)),
            int(rng.integers(0, 2) * rng.integers(513)),
        )
        if num_decodes + num_chunk == 0:
            continue
        shapes.append(
            StepShape(
                num_tokens=num_decodes + num_chunk,
                num_seqs=num_decodes + (num_chunk > 0),
                num_sampled=num_decodes + int(rng.integers(0, 2)) * (num_chunk > 0),
                decode_context=num_decodes * int(rng.integers(1, 2000)),
                prefill_attention=num_chunk * int(rng.integers(1, 2000)),
            )
        )
    return shapes


def true_seconds(shape):
    return sum(TRUE_COSTS[name] * n for name, n in zip(COSTS, features(shape), strict=True))


def timed(shapes, factors=None):
    factors = np.ones(len(shapes)) if factors is None else factors
    return [
        TimedStep(shape=s, seconds=true_seconds(s) * f, host_s=1e-4 + 2e-6 * s.num_seqs)
        for s, f in zip(shapes, factors, strict=True)
    ]


def test_a_known_ground_truth_is_recovered():
    times = fit(timed(random_shapes(400)), RECORDED)
    assert times.costs == pytest.approx(TRUE_COSTS, rel=1e-3, abs=1e-8)
    assert times.fit.median < 1e-6
    assert times.fit.total < 1e-6
    for shape in random_shapes(50, seed=9):
        assert times.seconds(shape) == pytest.approx(true_seconds(shape), rel=1e-4)
        assert times.host_seconds(shape) == pytest.approx(1e-4 + 2e-6 * shape.num_seqs, rel=1e-3)


def test_noise_is_averaged_and_what_disturbed_the_machine_is_not():
    shapes = random_shapes(600)
    rng = np.random.default_rng(1)
    noise = rng.uniform(0.9, 1.1, len(shapes))
    noise[rng.random(len(shapes)) < 0.05] *= 20.0  # another program ran
    times = fit(timed(shapes, noise), RECORDED)
    predicted = sum(times.seconds(shape) for shape in shapes)
    assert predicted == pytest.approx(sum(map(true_seconds, shapes)), rel=0.03)
    assert 0.01 < times.fit.median < 0.1  # an honest report of the noise


def test_no_cost_is_ever_negative():
    rng = np.random.default_rng(2)
    steps = [
        TimedStep(shape=shape, seconds=float(rng.uniform(0.001, 1.0)))
        for shape in random_shapes(100)
    ]
    times = fit(steps, RECORDED)
    assert min(times.costs.values()) >= 0.0
    assert min(times.host_costs.values()) >= 0.0


def test_the_solver_finds_the_best_non_negative_solution():
    """Against a search over all sets of free columns, which is exact for few columns."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        # Columns that are much alike: a later one makes an earlier one give way.
        matrix = rng.uniform(size=(12, 1)) + 0.3 * rng.normal(size=(12, 5))
        target = rng.uniform(size=12)
        best = np.linalg.norm(target)
        for chosen in range(1, 2**5):
            columns = [i for i in range(5) if chosen >> i & 1]
            x = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, np.linalg.norm(matrix[:, columns] @ x - target))
        found = solve_non_negative(matrix, target)
        assert (found >= 0).all()
        assert np.linalg.norm(matrix @ found - target) == pytest.approx(best, rel=1e-9)


def test_too_few_steps_are_refused():
    with pytest.raises(ConfigError, match="too few"):
        fit(timed(random_shapes(5)), RECORDED)


def test_an_empty_step_costs_the_executor_nothing():
    times = fit(timed(random_shapes(100)), RECORDED)
    empty = StepShape(
        num_tokens=0, num_seqs=0, num_sampled=0, decode_context=0, prefill_attention=0
    )
    assert times.seconds(empty) == 0.0
    assert times.host_seconds(empty) > 0.0


def new_sequence(name, num_tokens, num_computed_tokens=0):
    return NewSequence(
        sequence_id=name,
        token_ids=(0,) * num_tokens,
        num_prompt_tokens=num_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=(),
        sampling=SamplingParams(),
        seed=0,
        stop_ids=frozenset(),
    )


def share(name, num_tokens, samples):
    return ScheduledTokens(name, num_tokens, 0, (), samples)


def test_shapes_follow_a_sequence_through_chunks_decodes_and_preemption():
    tracker = ShapeTracker()
    first = tracker.observe(StepPlan(1, (new_sequence("a", 10),), (share("a", 4, False),), ()))
    assert first == StepShape(
        num_tokens=4, num_seqs=1, num_sampled=0, decode_context=0, prefill_attention=1 + 2 + 3 + 4
    )
    plan = StepPlan(2, (new_sequence("b", 7, 5),), (share("a", 6, True), share("b", 2, True)), ())
    pairs_of_a, pairs_of_b = 5 + 6 + 7 + 8 + 9 + 10, 6 + 7
    assert tracker.observe(plan) == StepShape(
        num_tokens=8,
        num_seqs=2,
        num_sampled=2,
        decode_context=0,
        prefill_attention=pairs_of_a + pairs_of_b,
    )
    decode = tracker.observe(StepPlan(3, (), (share("a", 1, True), share("b", 1, True)), ()))
    assert (decode.num_tokens, decode.decode_context, decode.prefill_attention) == (2, 11 + 8, 0)
    again = StepPlan(4, (new_sequence("a", 12),), (share("a", 12, True),), ("a", "b"))
    assert tracker.observe(again).prefill_attention == 12 * 13 // 2


def test_a_file_holds_all_and_the_last_recorded_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="octavo bench record"):
        read_step_times(None)
    times = fit(timed(random_shapes(100)), RECORDED)
    path = step_time.default_path(RECORDED)
    assert path == tmp_path / "steps" / "tiny-float32-cpu.json"
    write_step_times(path, times)
    assert read_step_times(None) == read_step_times(path) == times


def test_files_of_another_kind_or_version_are_refused(tmp_path):
    times = fit(timed(random_shapes(100)), RECORDED)
    path = tmp_path / "steps.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no recorded steps"):
        read_step_times(path)
    costs = {name: 0.0 for name in COSTS[1:]}
    for other in (
        msgspec.structs.replace(times, octavo_steps=2),
        msgspec.structs.replace(times, costs=costs),
        msgspec.structs.replace(times, host_costs=dict.fromkeys(HOST_COSTS[1:], 0.0)),
    ):
        write_step_times(path, other)
        with pytest.raises(ConfigError, match="another version"):
            read_step_times(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_step_times(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_step_times(path / "steps.json", times)
