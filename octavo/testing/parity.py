"""Whether a model says what transformers' class of it says, in every way that an engine runs it.

For tests of architectures in packages of their own: `write_checkpoint` makes a tiny random model by
transformers, and each of `CHECKS` takes a `Parity` of it and raises `AssertionError` where Octavo
answers differently. Ours are tested the same way in `tests/models/test_every_architecture.py`.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.config import DeviceFacts, EngineOptions
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.core import SamplingParams
from octavo.engine import LLM, CompletionOutput, build_engine
from octavo.engine.memory_report import TOLERANCE, measure_largest_step
from octavo.kernels import native
from octavo.testing.tiny_llama import byte_tokenizer
from octavo.testing.tiny_models import randomize

NUM_TOKENS = 24
MIN_DISTINCT = 4  # tokens in an answer: a model that repeats itself would prove little
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
LENGTHS = (1, 16, 17, 100)  # of the prompts: around the edges of blocks, and longer than a chunk
LOGPROB_TOLERANCE = 1e-4  # fp32


def write_checkpoint(
    directory: Path,
    model_type: str,
    fields: Mapping[str, Any],
    *,
    hf_name: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Write config, random fp32 weights and a byte-level tokenizer; return transformers' model.

    Args:
        directory: where to; it is made.
        model_type: of transformers, whose class makes the weights and is the reference.
        fields: of its config. A `vocab_size` of 301 or more has room for the tokenizer.
        hf_name: what the config calls the model in place of that class, for a package whose
            models have a name of their own.
        seed: of the weights.
    """
    import transformers

    library: Any = transformers  # untyped
    config = library.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    library.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    if hf_name is not None:
        path = directory / "config.json"
        written = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [hf_name]}
        path.write_text(json.dumps(written), encoding="utf-8")
    reference: nn.Module = model
    return reference


class Parity:
    """A checkpoint in `directory`, and transformers' model of the same weights in fp32."""

    def __init__(self, directory: Path, reference: nn.Module):
        self.directory = directory
        self.reference = reference
        self.vocab_size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
        self.prompts = [self.prompt(length, length) for length in LENGTHS]

    def prompt(self, length: int, seed: int) -> dict[str, list[int]]:
        """A prompt of any tokens."""
        ids = [(31 * i + 7 * seed) % self.vocab_size for i in range(length)]
        return {"prompt_token_ids": ids}

    def llm(self, **options: Any) -> LLM:
        """An engine in fp32 that recounts its books after every step."""
        # Nothing here is large enough for two threads.
        defaults: dict[str, Any] = {"kv_cache_memory_bytes": 2**22, "dtype": "float32"}
        defaults["num_threads"] = 1
        return LLM(str(self.directory), **(defaults | options), check_integrity=True)

    def answers(
        self, llm: LLM, prompts: list[dict[str, list[int]]] | None = None
    ) -> list[CompletionOutput]:
        """To all prompts together."""
        outputs = llm.generate(prompts or self.prompts, GREEDY, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def tokens(
        self, llm: LLM, prompts: list[dict[str, list[int]]] | None = None
    ) -> list[list[int]]:
        """The ids of these answers."""
        return [answer.token_ids for answer in self.answers(llm, prompts)]

    @cached_property
    def plain(self) -> list[CompletionOutput]:
        """Of an engine as it is by default: all prompts together, none of them cut."""
        return self.answers(self.llm())

    @property
    def expected(self) -> list[list[int]]:
        """What every way of running it must answer; `check_tokens_and_likelihoods` vouches."""
        return [answer.token_ids for answer in self.plain]


@torch.inference_mode()
def check_tokens_and_likelihoods(parity: Parity) -> None:
    """Prefill and decode: each token is transformers' likeliest, and as likely."""
    for prompt, answer in zip(parity.prompts, parity.plain, strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + answer.token_ids])
        logits = parity.reference(ids).logits[0, -NUM_TOKENS - 1 : -1].float()
        _same("tokens", answer.token_ids, logits.argmax(-1).tolist())
        if len(set(answer.token_ids)) < MIN_DISTINCT:
            raise AssertionError(
                f"the answer repeats itself and proves little, take another seed or other "
                f"fields: {answer.token_ids}"
            )
        found = torch.tensor([step.logprob for step in answer.logprobs or ()])
        likelihoods = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(
            found, likelihoods, rtol=LOGPROB_TOLERANCE, atol=LOGPROB_TOLERANCE
        )


def check_one_at_a_time(parity: Parity) -> None:
    """No batch."""
    _same("tokens", parity.tokens(parity.llm(max_num_seqs=1)), parity.expected)


def check_chunks(parity: Parity) -> None:
    """Prompts in small pieces, with steps planned before the last one is read."""
    options = {"max_num_batched_tokens": 13, "max_num_seqs": 3, "async_scheduling": True}
    _same("tokens", parity.tokens(parity.llm(**options)), parity.expected)


def check_small_blocks(parity: Parity) -> None:
    """Blocks of four tokens."""
    llm = parity.llm(block_size=4, max_num_batched_tokens=50)
    _same("tokens", parity.tokens(llm), parity.expected)


def check_prefix_hit(parity: Parity) -> None:
    """The second time, the prompts' full blocks are not computed."""
    llm = parity.llm()
    parity.tokens(llm)
    outputs = llm.generate(parity.prompts, GREEDY, use_tqdm=False)
    _same("tokens", [output.outputs[0].token_ids for output in outputs], parity.expected)
    _same("cached tokens", outputs[-1].num_cached_tokens, (LENGTHS[-1] - 1) // 16 * 16)


def check_preemption(parity: Parity) -> None:
    """All of a crowd start, in a block each, and there is no room for all of them to end."""
    crowd = [parity.prompt(15, seed) for seed in range(1, 9)]
    roomy = parity.llm()
    tight_bytes = 12 * roomy.engine.config.kv_block_bytes
    tight = parity.llm(kv_cache_memory_bytes=tight_bytes, max_model_len=64)
    _same("tokens", parity.tokens(tight, crowd), parity.tokens(roomy, crowd))
    if tight.stats().num_preemptions <= roomy.stats().num_preemptions:
        raise AssertionError("nothing was preempted")


def check_bfloat16(parity: Parity) -> None:
    """It loads and runs; what it says, fp32 is held to."""
    answers = parity.tokens(parity.llm(dtype="bfloat16"))
    _same("lengths of answers", [len(answer) for answer in answers], [NUM_TOKENS] * len(LENGTHS))


def check_memory(parity: Parity) -> None:
    """`octavo plan` says what the weights and the largest step take. Needs the native kernels."""
    options = {"device": "cpu", "kv_cache_memory_bytes": 2**24, "dtype": "float32"}
    options |= {"max_num_seqs": 32, "max_num_batched_tokens": 512, "num_threads": 1}
    engine = build_engine(EngineOptions.from_flat(str(parity.directory), options))
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    planned = plan_memory(engine.config, budget).activation_bytes
    measured = measure_largest_step(engine.core, engine.config)
    lines = [("activations", planned, measured)]
    lines += [
        (line.what, line.planned_bytes, line.measured_bytes)
        for line in engine.memory.lines
        if line.measured_bytes is not None
    ]
    for what, expected, found in lines:
        if abs(found - expected) > TOLERANCE * found:
            raise AssertionError(f"{what}: planned {expected:,} bytes, measured {found:,}")


CHECKS: tuple[Callable[[Parity], None], ...] = (
    check_tokens_and_likelihoods,
    check_one_at_a_time,
    check_chunks,
    check_small_blocks,
    check_prefix_hit,
    check_preemption,
    check_bfloat16,
    *((check_memory,) if native.unavailable() is None else ()),
)


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found}, but transformers, or the plain engine: {expected}")
