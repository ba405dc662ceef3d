"""How long a step takes, learnt from recorded steps of a real machine. numpy only.

Owns the shape of a step (what its time may depend on), the model that turns a shape into seconds,
its fit and its file. The time is a sum of costs, none of them negative: for the step, for its
tokens, its sequences, its attention and its sampled rows. Tokens cost less and less, then evenly: a
small batch waits for the weights to be read, a large one for the arithmetic (the two sides of a
roofline). A sum of `min(tokens, k)` with non-negative weights is any curve of that form.
"""

import os
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from octavo.core import StepPlan
from octavo.errors import ConfigError

VERSION = 1
NUM_FOLDS = 5
TRUSTED_ERROR = 0.2  # relative; a step that is further off was disturbed

Vector = NDArray[np.float64]


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the time of a step may depend on. Counts; attention in pairs of query and key."""

    num_tokens: int
    num_seqs: int
    num_sampled: int
    decode_context: int  # keys that sequences with one token in the step look at
    prefill_attention: int  # tokens x keys of all other sequences


class TimedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step as it was: its shape, the executor's time, and the scheduler's and loop's."""

    shape: StepShape
    seconds: float
    host_s: float = 0.0


class ShapeTracker:
    """Tells the shapes of successive plans. Sole writer of what it knows of each sequence."""

    def __init__(self) -> None:
        self._num_computed: dict[str, int] = {}

    def observe(self, plan: StepPlan) -> StepShape:
        """The shape of the next step; every plan must be shown, in order."""
        for sequence_id in plan.dropped:
            self._num_computed.pop(sequence_id, None)
        for new in plan.new:
            self._num_computed[new.sequence_id] = new.num_computed_tokens
        decode_context = prefill_attention = 0
        for share in plan.scheduled:
            context_len = self._num_computed[share.sequence_id] + share.num_tokens
            self._num_computed[share.sequence_id] = context_len
            if share.num_tokens == 1:
                decode_context += context_len
            else:
                # The first query of a chunk sees all before the chunk and itself, the last all.
                prefill_attention += share.num_tokens * (2 * context_len - share.num_tokens + 1)
        return StepShape(
            num_tokens=plan.num_tokens,
            num_seqs=len(plan.scheduled),
            num_sampled=sum(share.samples for share in plan.scheduled),
            decode_context=decode_context,
            prefill_attention=prefill_attention // 2,
        )


TOKEN_KNEES = (4, 16, 64, 256)  # where the cost of one more token may fall
SAMPLED_KNEES = (4, 16)
COSTS = (
    "step",
    *(f"token up to {knee}" for knee in TOKEN_KNEES),
    "token",
    "sequence",
    "decode context",
    "prefill attention",
    *(f"sampled up to {knee}" for knee in SAMPLED_KNEES),
    "sampled",
)
HOST_COSTS = ("step", "sequence", "sampled")


def features(shape: StepShape) -> list[float]:
    """How often each of `COSTS` is due."""
    return [
        1.0,
        *(float(min(shape.num_tokens, knee)) for knee in TOKEN_KNEES),
        float(shape.num_tokens),
        float(shape.num_seqs),
        float(shape.decode_context),
        float(shape.prefill_attention),
        *(float(min(shape.num_sampled, knee)) for knee in SAMPLED_KNEES),
        float(shape.num_sampled),
    ]


def host_features(shape: StepShape) -> list[float]:
    """How often each of `HOST_COSTS` is due."""
    return [1.0, float(shape.num_seqs), float(shape.num_sampled)]


class Recorded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was recorded, and where: enough to run the same engine again."""

    model: str  # as the user named it
    dtype: str
    device: str
    machine: str  # a description for people
    num_threads: int
    versions: dict[str, str]
    vocab_size: int
    kv_token_bytes: int  # of one token over all layers
    max_num_seqs: int  # the largest batch that was recorded
    max_num_batched_tokens: int
    recorded_at: str = ""


class FitReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well the model tells steps that it was not fitted on, by cross-validation.

    Errors are |predicted - measured| / measured; `total` is that of the sum over all steps.
    """

    num_steps: int
    median: float
    p90: float
    total: float


class StepTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The step-time model of one engine on one machine: seconds for each cost, by its name."""

    octavo_steps: int  # version of the format
    recorded: Recorded
    costs: dict[str, float]
    host_costs: dict[str, float]
    fit: FitReport

    def seconds(self, shape: StepShape) -> float:
        """How long the executor takes for a step; an empty one costs it nothing."""
        if not shape.num_tokens:
            return 0.0
        return _total(self.costs, COSTS, features(shape))

    def host_seconds(self, shape: StepShape) -> float:
        """How long planning, committing and telling clients take."""
        return _total(self.host_costs, HOST_COSTS, host_features(shape))


def _total(costs: dict[str, float], names: SequenceOf[str], counts: SequenceOf[float]) -> float:
    return sum(costs[name] * count for name, count in zip(names, counts, strict=True))


def fit(steps: SequenceOf[TimedStep], recorded: Recorded) -> StepTimes:
    """Learn the costs from recorded steps.

    Raises:
        ConfigError: there are too few steps.
    """
    if len(steps) < 2 * len(COSTS):
        raise ConfigError(
            f"{len(steps)} steps are too few to learn {len(COSTS)} costs from: record more"
        )
    matrix = np.array([features(step.shape) for step in steps])
    seconds = np.array([step.seconds for step in steps])
    host_matrix = np.array([host_features(step.shape) for step in steps])
    host_s = np.array([max(step.host_s, 1e-9) for step in steps])
    return StepTimes(
        octavo_steps=VERSION,
        recorded=recorded,
        costs=dict(zip(COSTS, fit_costs(matrix, seconds).tolist(), strict=True)),
        host_costs=dict(zip(HOST_COSTS, fit_costs(host_matrix, host_s).tolist(), strict=True)),
        fit=cross_validate(matrix, seconds),
    )


def fit_costs(matrix: Vector, seconds: Vector, *, num_rounds: int = 8) -> Vector:
    """Non-negative costs x [F] with least relative error of `matrix` [N, F] @ x to `seconds` [N].

    Errors relative to what was measured would favour costs that are too low, because a step that
    happened to be slow counts for less. From the second round on they are relative to the fit, and
    one that is larger than `TRUSTED_ERROR` counts in proportion to its size and not to its square
    (Huber, 1964): another program on the same cores must not decide what a step costs.
    """
    costs = solve_non_negative(matrix / seconds[:, None], np.ones_like(seconds))
    for _ in range(num_rounds):
        scale = np.maximum(matrix @ costs, 0.1 * seconds)
        errors = np.abs(matrix @ costs - seconds) / scale
        weights = np.sqrt(np.minimum(1.0, TRUSTED_ERROR / np.maximum(errors, 1e-12))) / scale
        costs = solve_non_negative(matrix * weights[:, None], seconds * weights)
    return costs


def cross_validate(matrix: Vector, seconds: Vector) -> FitReport:
    """Predict each fifth of the steps from the other four fifths."""
    predicted = np.empty_like(seconds)
    fold = np.random.default_rng(0).permutation(len(seconds)) % NUM_FOLDS
    for held_out in range(NUM_FOLDS):
        costs = fit_costs(matrix[fold != held_out], seconds[fold != held_out])
        predicted[fold == held_out] = matrix[fold == held_out] @ costs
    errors = np.abs(predicted - seconds) / seconds
    return FitReport(
        num_steps=len(seconds),
        median=float(np.median(errors)),
        p90=float(np.quantile(errors, 0.9)),
        total=float(abs(predicted.sum() - seconds.sum()) / seconds.sum()),
    )


def solve_non_negative(matrix: Vector, target: Vector) -> Vector:
    """x >= 0 [F] that minimises |matrix [N, F] @ x - target [N]| (Lawson and Hanson, 1974, ch. 23).

    Columns are brought to one length first, so that their units do not matter.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    scaled = matrix / lengths
    num_columns = scaled.shape[1]
    x = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * np.linalg.norm(target)
    for _ in range(3 * num_columns):
        gradient = scaled.T @ (target - scaled @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[gradient.argmax()] = True
        x = _step_inside(scaled, target, x, free)
    solution: Vector = x / lengths
    return solution


def _step_inside(matrix: Vector, target: Vector, x: Vector, free: NDArray[np.bool_]) -> Vector:
    """The best x over the free columns; those that would become negative are bound to 0 again."""
    while free.any():
        best = np.zeros_like(x)
        best[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        negative = free & (best <= 0)
        if not negative.any():
            return best
        # As far towards the best as nobody becomes negative.
        share = np.min(x[negative] / (x[negative] - best[negative] + 1e-300))
        x = x + share * (best - x)
        free &= x > 1e-12
    return np.zeros_like(x)


def default_path(recorded: Recorded) -> Path:
    """Where the steps of an engine are kept: <cache>/steps/<model>-<dtype>-<device>.json."""
    model = Path(recorded.model).name
    return steps_dir() / f"{model}-{recorded.dtype}-{recorded.device}.json"


def steps_dir() -> Path:
    """OCTAVO_CACHE_DIR, else the user's XDG cache folder, and there `steps`."""
    if chosen := os.environ.get("OCTAVO_CACHE_DIR"):
        return Path(chosen) / "steps"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "steps"


def write_step_times(path: Path, times: StepTimes) -> None:
    """Write the model as JSON; raises `ConfigError` where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(times), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"the steps {path} cannot be written: {error.strerror}") from error


def read_step_times(path: Path | None) -> StepTimes:
    """Read a file of `octavo bench record`; without a path the one recorded last.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = path or _last_recorded()
    try:
        times = msgspec.json.decode(path.read_bytes(), type=StepTimes)
    except OSError as error:
        raise ConfigError(f"the steps {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} holds no recorded steps: {error}") from error
    known = times.octavo_steps == VERSION and set(times.costs) == set(COSTS)
    if not known or set(times.host_costs) != set(HOST_COSTS):
        raise ConfigError(
            f"{path} was recorded by another version of Octavo: run `octavo bench record` again"
        )
    return times


def _last_recorded() -> Path:
    paths = sorted(steps_dir().glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ConfigError(
            f"there are no recorded steps in {steps_dir()}: run `octavo bench record` first, or "
            "name a file with --steps"
        )
    return paths[-1]
