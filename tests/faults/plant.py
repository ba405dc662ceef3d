"""Faults inside a real engine process, planted from outside: what the file that we are told says.

    raise TEXT   a step fails with this text
    sleep S      a step takes so many seconds more
    hang         a step does not return, until the file is gone
    starve       no block is free for anybody
    oom          one layer, once, finds no memory
    nan          one layer, once, makes the last row of a step not finite
    draw         one draw, once, gives the last row of a step an id beyond the vocabulary
    yesterday    the wall clock has jumped back

`environment` makes every Python process below ours run `plant` before anything else.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "PLANTED_FAULT"


def environment(directory: Path, fault: Path) -> dict[str, str]:
    """Of a server whose engine reads the file `fault`; `directory` is ours to write to."""
    tests = Path(__file__).parents[1]
    code = f"import sys\nsys.path.append({str(tests)!r})\nfrom faults import plant\nplant.plant()\n"
    (directory / "sitecustomize.py").write_text(code)
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(fault)}


def plant() -> None:
    """Put the faults where the engine will meet them."""
    from octavo.engine.core import EngineCore
    from octavo.scheduler.constraints import Blocks

    file = Path(os.environ[VARIABLE])
    build, allow = EngineCore.__init__, Blocks.allow

    def build_faulty(core: EngineCore, scheduler: Any, executor: Any, **options: Any) -> None:
        launch = options.pop("launch", None)
        if launch is not None:
            options["launch"] = lambda plan: _fails(file) or launch(plan)
        execute = executor.execute
        executor.execute = lambda plan: _fails(file) or execute(plan)
        build(core, scheduler, executor, **options)

    def allow_none(self: Blocks, sequence: Any, num_tokens: int) -> int:
        return 0 if _read(file) == "starve" else allow(self, sequence, num_tokens)

    wall_s = time.time
    time.time = lambda: wall_s() - (86_400.0 if _read(file) == "yesterday" else 0.0)
    if "octavo.engine.process" in sys.orig_argv:
        _plant_in_layers(file)
    EngineCore.__init__ = build_faulty  # type: ignore[method-assign, assignment]
    Blocks.allow = allow_none  # type: ignore[method-assign]


def _plant_in_layers(file: Path) -> None:
    import torch

    from octavo.layers import GatedMLP
    from octavo.runner.stages import Stages

    forward, build = GatedMLP.forward, Stages.__init__

    def compute(self: GatedMLP, x: torch.Tensor) -> torch.Tensor:
        kind = _read(file)
        if kind in ("oom", "nan"):
            file.unlink()
        if kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if kind == "nan":
            x = x.index_fill(0, torch.tensor([len(x) - 1]), float("nan"))
        return forward(self, x)

    def build_faulty(self: Stages, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        kernel = self._draw

        def draw(logits: torch.Tensor, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            token_ids, is_finite = kernel(logits, options)
            if _read(file) == "draw":
                file.unlink()
                token_ids[-1] = logits.shape[1]
            return token_ids, is_finite

        self._draw = draw

    GatedMLP.forward = compute  # type: ignore[method-assign]
    Stages.__init__ = build_faulty  # type: ignore[method-assign]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _fails(file: Path) -> None:
    kind, _, rest = _read(file).partition(" ")
    if kind == "raise":
        raise RuntimeError(rest)
    if kind == "sleep":
        time.sleep(float(rest))
    while _read(file) == "hang":
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit("to be planted, not to be run")
