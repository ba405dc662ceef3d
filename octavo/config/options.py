"""What a user may set about an engine: small frozen dataclasses, one for each concern.

Flags, `LLM(...)` keywords and the reference page all come from these fields. None means "decide for
me"; `resolve` decides and remembers why. Knows neither files nor devices.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the sentence that `--help` and the reference page show."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the model is read."""

    dtype: str = option(
        "auto",
        "number format of weights and activations; auto takes the checkpoint's (GGUF: bfloat16)",
        ("auto", "bfloat16", "float16", "float32"),
    )
    load_format: str = option(
        "auto", "auto reads the checkpoint; dummy draws random weights", ("auto", "dummy")
    )
    model_impl: str = option(
        "auto",
        "whose code runs the model: octavo's, or transformers' with octavo's attention in it; auto "
        "takes transformers' where octavo has none of its own",
        ("auto", "octavo", "transformers"),
    )
    skip_tokenizer_init: bool = option(
        False, "load no tokenizer: prompts are token ids, answers are ids with an empty text"
    )
    count_expert_tokens: bool = option(
        False,
        "count the tokens that each expert of a mixture gets, which costs a kernel a layer; "
        "llm.expert_tokens(), GET /debug/experts and /metrics tell",
    )
    max_model_len: int | None = option(
        None, "longest prompt and output together, in tokens; default: what the checkpoint allows"
    )

    @property
    def reads_weights(self) -> bool:
        """Whether the checkpoint's own are wanted, and not random ones in their place."""
        return self.load_format != "dummy"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Where the model runs."""

    device: str = option("auto", "auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    num_threads: int | None = option(
        None, "CPU threads of the model; default: one for each core that the process may use"
    )
    determinism: str = option(
        "seeded",
        "seeded: the same seed draws the same from the same logits; batch-invariant: the logits "
        "have the same bits, too, whatever else runs, which costs speed on a GPU",
        ("seeded", "batch-invariant"),
    )
    enforce_eager: bool = option(
        False, "launch every kernel of a step by itself instead of replaying a CUDA graph"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How much KV memory there is and how it is cut."""

    block_size: int = option(16, "tokens in a KV block")
    kv_allocator: str = option(
        "paged",
        "how sequences get KV memory: one run for the longest context, one run for the request's "
        "own maximum in the buddy system, or blocks as they are needed",
        ("contiguous", "contiguous-buddy", "paged"),
    )
    enable_prefix_caching: bool | None = option(
        None,
        "reuse the KV of prompts' common beginnings, found by their full blocks; default: yes, "
        "where blocks are paged",
    )
    free_outside_windows: bool | None = option(
        None,
        "layers with a sliding window give back the blocks that they see no more; default: yes, "
        "where blocks are paged and stay on the device",
    )
    kv_cache_memory_bytes: int | None = option(
        None, "bytes for the KV cache; default: 1 GiB on a CPU, what is left on a GPU"
    )
    kv_offloading_size: float | None = option(
        None, "GiB of host memory that take evicted prefixes and preempted requests; default: none"
    )
    kv_offloading_disk_size: float | None = option(
        None, "GiB of disk that take what the host memory evicts, and keep it over a restart"
    )
    kv_offloading_disk_path: str | None = option(
        None, "file for them; default: one for each model under ~/.cache/octavo/kv"
    )
    encoder_cache_memory_bytes: int = option(
        2**28, "bytes for the rows that an encoder made of images; the least recently used go first"
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory that weights, activations and KV cache may fill together"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """What one step may hold."""

    max_num_seqs: int | None = option(
        None, "sequences that run at once; default: 128, on a GPU 512"
    )
    max_num_batched_tokens: int | None = option(
        None, "tokens that one step computes; default: 1024, on a GPU 8192"
    )
    max_num_encoder_tokens: int | None = option(
        None,
        "image tokens that encoders make in one step, though always those of one image; default: "
        "max_num_batched_tokens",
    )
    scheduling_policy: str = option(
        "fcfs",
        "who goes first: in order of arrival, by priority, fairly between tenants, or by deadline",
        ("fcfs", "priority", "fair", "deadline"),
    )
    preemption_mode: str | None = option(
        None,
        "what becomes of a preempted request's KV: computed again, swapped to host memory, or "
        "whichever costs less; default: auto where there is host memory for it, else recompute",
        ("recompute", "swap", "auto"),
    )
    batching: str = option(
        "chunked",
        "how a step is filled: the ladder from request-level batches to mixed steps",
        ("static", "dynamic", "continuous", "chunked"),
    )
    async_scheduling: bool | None = option(
        None,
        "plan the next step while the last one runs; the answers are the same; default: on a GPU",
    )
    max_num_queued_reqs: int = option(
        1024, "requests that may wait; further ones are refused with Retry-After"
    )
    max_num_queued_tokens: int | None = option(
        None, "prompt tokens that may wait; a good value is target TTFT times prefill speed"
    )
    target_ttft_ms: int | None = option(
        None,
        "refuse a request whose first token would come later, by the prompt tokens that are served "
        "before it and the measured prefill speed; a request's own deadline_ms replaces it",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAOptions:
    """Adapters of the model that requests may name instead of it."""

    enable_lora: bool = option(False, "serve LoRA adapters beside the model (docs/lora.md)")
    lora_modules: tuple[str, ...] = option(
        (), "adapters that are there at the start: name=directory, as PEFT saves it"
    )
    max_loras: int = option(1, "adapters that one step may hold: slots in the device's memory")
    max_lora_rank: int = option(16, "largest rank of an adapter; all slots have room for it")
    max_cpu_loras: int = option(32, "adapters that may be loaded: copies in host memory")
    lora_dir: str | None = option(
        None,
        "directory below which POST /v1/load_lora_adapter may name adapters; default: it may not",
    )


GROUPS: dict[str, type] = {
    "loading": ModelOptions,
    "device": DeviceOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "lora": LoRAOptions,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """All that an engine is started with."""

    model: str
    loading: ModelOptions = field(default_factory=ModelOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)

    @classmethod
    def from_flat(cls, model: str, values: Mapping[str, Any]) -> "EngineOptions":
        """Options from plain names, as keywords and flags give them.

        Raises:
            ConfigError: a name is unknown or a value is out of range.
        """
        owners = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
        grouped: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in values.items():
            if name not in owners:
                raise ConfigError(_unknown(name, list(owners)))
            grouped[owners[name]][name] = value
        options = cls(model=model, **{g: kind(**grouped[g]) for g, kind in GROUPS.items()})
        _check(options)
        return options

    def changed(self) -> frozenset[str]:
        """Names of the options that differ from their defaults."""
        return frozenset(
            f.name
            for group in GROUPS
            for f in dataclasses.fields(getattr(self, group))
            if getattr(getattr(self, group), f.name) != f.default
        )


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known))}"
    return f"unknown option {name!r}{hint}"


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_words(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(word, str) for word in value)


def _check(options: EngineOptions) -> None:
    for group in GROUPS:
        values = getattr(options, group)
        for f in dataclasses.fields(values):
            value, choices = getattr(values, f.name), f.metadata["choices"]
            if choices and value not in choices and not (value is None and f.default is None):
                raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            is_count = f.type in (int, int | None) and value is not None
            if is_count and (not isinstance(value, int) or value is True or value < 1):
                raise ConfigError(f"{f.name} must be a positive integer, got {value!r}")
            if f.type == float | None and value is not None and not (_is_real(value) and value > 0):
                raise ConfigError(f"{f.name} must be greater than 0, got {value!r}")
            if isinstance(f.default, tuple) and not _is_words(value):
                raise ConfigError(f"{f.name} must be made of words, got {value!r}")
            is_switch = f.type is bool or (f.type == bool | None and value is not None)
            if is_switch and not isinstance(value, bool):
                raise ConfigError(f"{f.name} must be true or false, got {value!r}")
    if not 0.0 < options.cache.gpu_memory_utilization <= 1.0:
        raise ConfigError(
            "gpu_memory_utilization must be greater than 0 and at most 1, "
            f"got {options.cache.gpu_memory_utilization!r}"
        )
