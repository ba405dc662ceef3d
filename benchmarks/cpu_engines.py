"""One engine on the CPU workloads, in a process of its own: prints JSON lines for `cpu.py`.

python benchmarks/cpu_engines.py octavo|transformers bfloat16|float32
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator

import torch
from workload import Work, batch, prefill, random_ids, single

from octavo.config import DEFAULT_MODEL

# (answer tokens of each request, seconds until the first token, seconds until the last)
Timing = tuple[list[list[int]], float, float]
Run = Callable[[Work], Timing]


def octavo(model: str, dtype: str, threads: int) -> Run:
    """Octavo's engine core, in process."""
    from octavo.config import EngineOptions
    from octavo.core import Request, SamplingParams
    from octavo.engine import build_engine

    options = {
        "dtype": dtype,
        "num_threads": threads,
        "device": "cpu",
        "enable_prefix_caching": False,  # as with the peers; prompts are new each time anyway
    }
    core = build_engine(EngineOptions.from_flat(model, options)).core

    def run(work: Work) -> Timing:
        answers: dict[str, list[int]] = {}
        start, first = time.perf_counter(), 0.0
        for i, (prompt, num_tokens) in enumerate(work):
            sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            answers[str(i)] = []
            core.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, seed=0))
        while core.has_work:
            for event in core.step():
                first = first or time.perf_counter() - start
                answers[event.request_id] += event.token_ids
        return list(answers.values()), first, time.perf_counter() - start

    return run


def transformers(directory: str, dtype: str, threads: int) -> Run:
    """transformers' `generate`: one static batch, padded on the left, to the longest output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    times: list[float] = []

    class Clock:
        """A streamer that notes when each token came; the first one put is the prompt."""

        def put(self, value: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(work: Work) -> Timing:
        width = max(len(prompt) for prompt, _ in work)
        longest = max(num_tokens for _, num_tokens in work)
        ids = torch.zeros(len(work), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, _) in enumerate(work):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        times.clear()
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=longest,
                min_new_tokens=longest,
                streamer=Clock() if len(work) == 1 else None,
            )
        total = time.perf_counter() - start
        answers = [
            row[width : width + num_tokens].tolist()
            for row, (_, num_tokens) in zip(out, work, strict=True)
        ]
        return answers, times[1] - start if len(work) == 1 else total, total

    return run


def checked(run: Run, work: Work) -> Timing:
    """Run, and make sure that every token that was asked for came."""
    answers, first, total = run(work)
    lengths = [len(answer) for answer in answers]
    if lengths != [num_tokens for _, num_tokens in work]:
        raise SystemExit(f"tokens are missing: {lengths}")
    return answers, first, total


def measure(run: Run, repeats: int) -> Iterator[tuple[str, float]]:
    for repeat in range(repeats):
        _, first, total = checked(run, single(repeat))
        yield "single decode", 127 / (total - first)
        _, _, total = checked(run, prefill(repeat))
        yield "prefill 1024", 1024 / total
        work = batch(repeat)
        _, _, total = checked(run, work)
        yield "batch of 32", sum(num_tokens for _, num_tokens in work) / total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("octavo", "transformers"))
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    create = {"octavo": octavo, "transformers": transformers}[arguments.engine]
    run = create(arguments.model, arguments.dtype, arguments.threads)
    print(json.dumps({"metric": "ready"}), flush=True)
    checked(run, [(random_ids(64, 0), 8)])
    for metric, value in measure(run, arguments.repeats):
        print(json.dumps({"metric": metric, "value": value}), flush=True)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"metric": "peak memory", "value": peak_mib}), flush=True)


if __name__ == "__main__":
    main()
