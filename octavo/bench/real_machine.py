"""A real model on a real clock, as a machine that traces are replayed on.

Owns the model, loaded once, and gives every replay a KV memory of its own. Knows no traces.
"""

import dataclasses
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import torch

from octavo import __version__
from octavo.config import EngineOptions, locate, read_model_config, resolve
from octavo.core import Executor, Launch, StepPlan, StepResult, SystemClock
from octavo.engine.build import create_runner, create_storage, load_model
from octavo.errors import ConfigError
from octavo.layers import finish_layers
from octavo.runner import device_facts
from octavo.sim.replay import ReplaySetup, StepExecutor
from octavo.sim.step_time import Recorded, ShapeTracker, TimedStep


class TimedExecutor:
    """Runs plans on another executor and times them. Sole writer of its steps."""

    def __init__(self, executor: Executor, *, device: str):
        self.steps: list[TimedStep] = []
        self._executor = executor
        self._tracker = ShapeTracker()
        self._on_gpu = device == "cuda"

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the step; on a GPU its time is over when the device is done."""
        shape = self._tracker.observe(plan)
        start = time.perf_counter()
        result = self._executor.execute(plan)
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.steps.append(TimedStep(shape=shape, seconds=seconds))
        return result


class RealMachine:
    """A loaded model. `options` are an engine's, as `LLM` takes them.

    Raises:
        ModelError, ConfigError: the model cannot be loaded, or not with these options.
    """

    def __init__(self, model: str, **options: object):
        self.clock = SystemClock()
        self.model = model
        engine_options = EngineOptions.from_flat(model, options)
        checkpoint = locate(model, weights=engine_options.loading.reads_weights)
        facts = device_facts(engine_options.device.device)
        model_config = read_model_config(checkpoint, engine_options.loading.model_impl)
        self.config = resolve(engine_options, model_config, facts)
        self.vocab_size = self.config.model.vocab_size
        self._device_name = facts.name
        torch.set_num_threads(self.config.num_threads)
        self._model = load_model(checkpoint, self.config)
        finish_layers(self._model)

    def start(self, setup: ReplaySetup) -> tuple[StepExecutor, Launch | None]:
        """A runner with an empty KV memory. Launched steps run in a thread."""
        if setup.block_size != self.config.block_size:
            raise ConfigError(
                f"the model was loaded for KV blocks of {self.config.block_size} tokens, and the "
                f"replay wants {setup.block_size}"
            )
        config = dataclasses.replace(
            self.config,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
        )
        runner = create_runner(
            self._model, config, create_storage(self._model, config, setup.num_blocks)
        )
        executor = TimedExecutor(runner, device=config.device)
        if not setup.async_scheduling:
            return executor, None
        thread = ThreadPoolExecutor(1)
        return executor, lambda plan: thread.submit(executor.execute, plan)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def describe(self, setup: ReplaySetup) -> Recorded:
        """What steps recorded with this setup are steps of."""
        config = self.config
        return Recorded(
            model=self.model,
            dtype=config.dtype,
            device=config.device,
            machine=f"{self._device_name} ({processor_name()})",
            num_threads=config.num_threads,
            versions={
                "octavo": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            vocab_size=self.vocab_size,
            kv_token_bytes=config.kv_block_bytes // config.block_size,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def processor_name() -> str:
    """What the processor calls itself; the architecture where it does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
