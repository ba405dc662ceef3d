"""An engine process whose executor answers at once: the front end alone is left to be measured.

`environment` makes the engine process below `octavo serve` run `plant` before anything else. All
else is real: the command, both processes, the socket between them, the scheduler.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

STEP_MS = "OCTAVO_BENCH_STEP_MS"
TOKEN_ID = 64  # a letter, in the tiny model's vocabulary of bytes


def environment(directory: Path, *, step_ms: float = 0.0) -> dict[str, str]:
    """For a server whose steps take `step_ms`; `directory` is ours to write to."""
    code = (
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        "import instant_engine\ninstant_engine.plant()\n"
    )
    (directory / "sitecustomize.py").write_text(code)
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), STEP_MS: str(step_ms)}


def plant() -> None:
    """In an engine process, put the executor that answers at once in the place of the model's."""
    if "octavo.engine.process" not in sys.orig_argv:
        return
    from octavo.core import SampledTokens, StepPlan, StepResult
    from octavo.engine.core import EngineCore

    build, step_s = EngineCore.__init__, float(os.environ[STEP_MS]) / 1e3

    class Instant:
        def execute(self, plan: StepPlan) -> StepResult:
            if step_s:
                time.sleep(step_s)
            drawn = (TOKEN_ID,)
            sampled = [SampledTokens(s.sequence_id, drawn) for s in plan.scheduled if s.samples]
            return StepResult(plan.step, tuple(sampled))

    def build_instant(core: EngineCore, scheduler: Any, executor: Any, **options: Any) -> None:
        build(core, scheduler, Instant(), check_integrity=options.get("check_integrity", False))

    EngineCore.__init__ = build_instant  # type: ignore[method-assign, assignment]
