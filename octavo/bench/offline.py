"""Runs work on an engine in this process, with a clock in hand: throughput and decoding speed.

Every run makes sure that every token that was asked for came. Knows no flags and no files.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.bench.draws import TEMPERATURE, Draws, Work, uniform_work
from octavo.config import option
from octavo.core import SamplingParams
from octavo.errors import ConfigError, OctavoError

if TYPE_CHECKING:  # it brings torch in, and a command's flags must not wait for that
    from octavo.engine import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSetup:
    """What goes through the engine all at once. Its fields are flags."""

    dataset_name: str = option(
        "random",
        "random: all requests have the lengths given; uniform: nano-vllm's workload, lengths of "
        "prompts and outputs uniform from 100 to 1024",
        ("random", "uniform"),
    )
    input_len: int = option(1024, "tokens of each prompt (random)")
    output_len: int = option(128, "tokens of each output (random)")
    num_prompts: int | None = option(None, "requests; default: 512, with uniform lengths 256")
    seed: int = option(0, "the same seed draws the same requests")
    num_iters: int = option(1, "runs of the same requests, of which the median counts")

    def __post_init__(self) -> None:
        check_positive(self, "input_len", "output_len", "num_prompts", "num_iters")

    @property
    def num_requests(self) -> int:
        """`num_prompts`, or the default of the dataset."""
        return self.num_prompts or (256 if self.dataset_name == "uniform" else 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySetup:
    """One batch, timed twice: up to its first tokens, and to its last. Its fields are flags."""

    input_len: int = option(32, "tokens of each prompt")
    output_len: int = option(128, "tokens decoded after the first one")
    batch_size: int = option(8, "requests that run together")
    temperature: float = option(TEMPERATURE, "0 takes the likeliest token")
    num_iters_warmup: int = option(1, "runs before the first that counts")
    num_iters: int = option(3, "runs that count, each with prompts of its own")
    seed: int = option(0, "the same seed draws the same requests")

    def __post_init__(self) -> None:
        check_positive(self, "input_len", "output_len", "batch_size", "num_iters")
        if self.num_iters_warmup < 0:
            raise ConfigError("num_iters_warmup must not be negative")


@dataclass(frozen=True, slots=True)
class Throughput:
    """Medians over the runs, and what each run took."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Decoding:
    """One batch: until its first tokens, between two tokens, and over all."""

    ttft_ms: float
    tbt_ms: float
    step_ms: float  # wall time of the longer run by its engine steps, prompts' steps included
    latency_s: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians over the runs, and the runs themselves."""

    ttft_ms: float
    tbt_ms: float
    step_ms: float
    latency_s: float
    output_tokens_per_s: float  # while decoding, over the whole batch
    runs: list[Decoding]


def check_positive(setup: object, *names: str) -> None:
    """Raise `ConfigError` where one of these fields is less than 1; None is a default."""
    for name in names:
        value = getattr(setup, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value}")


def run_work(llm: "LLM", work: Work) -> float:
    """Seconds from handing the requests over until the last token.

    Raises:
        OctavoError: a request ended with another number of tokens than it asked for.
    """
    sampling = [
        SamplingParams(
            temperature=work.temperature, ignore_eos=True, max_tokens=num_tokens, detokenize=False
        )
        for num_tokens in work.num_output_tokens
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    if counts != work.num_output_tokens:
        raise OctavoError(
            f"{work.sum_output_tokens} output tokens were asked for, {sum(counts)} came"
        )
    return seconds


def measure_decoding(llm: "LLM", work: Work, num_tokens: int) -> Decoding:
    """Time a batch up to its first tokens, then the same with `num_tokens` more for each."""
    first_s = run_work(llm, work.with_output(1))
    num_steps = llm.stats().num_steps
    total_s = run_work(llm, work.with_output(num_tokens + 1))
    num_steps = llm.stats().num_steps - num_steps
    return Decoding(
        ttft_ms=1e3 * first_s,
        tbt_ms=1e3 * (total_s - first_s) / num_tokens,
        step_ms=1e3 * total_s / num_steps,
        latency_s=total_s,
    )


def vocab_size_of(llm: "LLM") -> int:
    """The rows of the model's embedding: an id below this is valid."""
    return llm.engine.config.model.vocab_size


def measure_throughput(llm: "LLM", setup: ThroughputSetup) -> Throughput:
    """Warm up, then run all requests at once, `num_iters` times."""
    draws = Draws(vocab_size_of(llm), seed=setup.seed)
    run_work(llm, draws.warm_up())
    if setup.dataset_name == "uniform":
        work = uniform_work(vocab_size_of(llm), num_requests=setup.num_requests, seed=setup.seed)
    else:
        work = draws.work(setup.num_requests, setup.input_len, setup.output_len)
    seconds = [run_work(llm, work) for _ in range(setup.num_iters)]
    middle = statistics.median(seconds)
    return Throughput(
        num_requests=len(work.prompts),
        num_prompt_tokens=work.sum_prompt_tokens,
        num_output_tokens=work.sum_output_tokens,
        requests_per_s=len(work.prompts) / middle,
        prompt_tokens_per_s=work.sum_prompt_tokens / middle,
        output_tokens_per_s=work.sum_output_tokens / middle,
        total_tokens_per_s=(work.sum_prompt_tokens + work.sum_output_tokens) / middle,
        seconds=seconds,
    )


def measure_latency(llm: "LLM", setup: LatencySetup) -> Latency:
    """Warm up, then time a batch `num_iters` times."""
    draws = Draws(vocab_size_of(llm), seed=setup.seed)
    run_work(llm, draws.warm_up())
    runs = []
    for _ in range(setup.num_iters_warmup + setup.num_iters):
        work = draws.work(setup.batch_size, setup.input_len, 1, temperature=setup.temperature)
        runs.append(measure_decoding(llm, work, setup.output_len))
    runs = runs[setup.num_iters_warmup :]
    middle = {
        field.name: statistics.median(getattr(run, field.name) for run in runs)
        for field in dataclasses.fields(Decoding)
    }
    return Latency(
        **middle, output_tokens_per_s=1e3 * setup.batch_size / middle["tbt_ms"], runs=runs
    )
