"""From what the user set, the checkpoint says and the device is, to one value for everything.

Each value remembers where it came from, so that `octavo explain` can say it. Nothing is written to
after this. Knows no torch: facts about the device are an argument.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from octavo.config.kv_groups import (
    LayerGroups,
    group_by_window,
    whole_contexts,
    why_not_grouped,
)
from octavo.config.lora import LoRAConfig, resolve_lora
from octavo.config.model import ModelConfig
from octavo.config.options import EngineOptions
from octavo.core import KVGroups
from octavo.errors import ConfigError

Source = Literal["user", "default", "checkpoint", "device", "rule"]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CPU_KV_CACHE_BYTES = 2**30
# Options that mean nothing where no KV is kept.
OF_KV = {
    "enable_prefix_caching",
    "free_outside_windows",
    "kv_allocator",
    "kv_cache_memory_bytes",
    "kv_offloading_disk_path",
    "kv_offloading_disk_size",
    "kv_offloading_size",
}
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a device offers, measured by whoever can see it."""

    kind: str  # "cpu" or "cuda"
    name: str
    num_threads: int
    free_memory_bytes: int
    total_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One resolved value and where it came from."""

    name: str
    value: Any
    source: Source
    why: str


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Everything decided. `kv_cache_bytes` is None where it must be measured after loading."""

    model: ModelConfig
    device: str
    dtype: str
    num_threads: int
    determinism: str
    enforce_eager: bool
    load_format: str
    count_expert_tokens: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_encoder_tokens: int
    encoder_cache_bytes: int
    block_size: int
    kv_allocator: str
    enable_prefix_caching: bool
    free_outside_windows: bool
    kv_cache_bytes: int | None
    kv_offloading_bytes: int
    kv_offloading_disk_bytes: int
    kv_offloading_disk_path: str | None
    preemption_mode: str
    gpu_memory_utilization: float
    scheduling_policy: str
    batching: str
    async_scheduling: bool
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None
    target_ttft_ms: int | None
    lora: LoRAConfig | None
    settings: tuple[Setting, ...]

    @property
    def batch_invariant(self) -> bool:
        """Whether a request's logits may not depend on what else runs."""
        return self.determinism == "batch-invariant"

    @property
    def layer_groups(self) -> LayerGroups:
        """Which layers share a block table."""
        if self.free_outside_windows:
            return group_by_window(self.model)
        return whole_contexts(self.model)

    @property
    def kv_groups(self) -> KVGroups:
        """What each of these groups keeps of a sequence."""
        return KVGroups(self.layer_groups.windows, self.max_num_batched_tokens)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block, over all layers that have a place in it."""
        num_values = self.model.num_cached_values
        if self.free_outside_windows:
            num_values = num_values // self.model.num_layers * self.layer_groups.num_places
        return num_values * DTYPE_BYTES[self.dtype] * self.block_size

    @property
    def num_cached_image_tokens(self) -> int:
        """Rows of images that are kept on the device; 0 for a model that sees none."""
        if self.model.vision is None:
            return 0
        return self.encoder_cache_bytes // (self.model.hidden_size * DTYPE_BYTES[self.dtype])

    @property
    def num_host_blocks(self) -> int:
        """KV blocks that the host memory holds."""
        return self._num_blocks_in(self.kv_offloading_bytes)

    @property
    def num_disk_blocks(self) -> int:
        """KV blocks that the disk holds."""
        return self._num_blocks_in(self.kv_offloading_disk_bytes)

    @property
    def num_device_blocks(self) -> int:
        """KV blocks that the device holds, once `kv_cache_bytes` is known."""
        return self._num_blocks_in(self.kv_cache_bytes or 0)

    def _num_blocks_in(self, num_bytes: int) -> int:
        """0 where the model keeps nothing, as encoders do."""
        return num_bytes // self.kv_block_bytes if self.kv_block_bytes else 0


class _Ledger:
    """Collects values with their sources while they are decided."""

    def __init__(self, options: EngineOptions):
        self.settings: list[Setting] = []
        self._changed = options.changed()

    def note(self, name: str, value: Any, source: Source, why: str) -> Any:
        self.settings.append(Setting(name, value, source, why))
        return value

    def as_given(self, name: str, value: Any, why: str) -> Any:
        """A value that nothing overrides: the user's, or the default."""
        source: Source = "user" if name in self._changed else "default"
        return self.note(name, value, source, "" if source == "user" else why)

    def choose(self, name: str, given: Any, source: Source, value: Any, why: str) -> Any:
        """The user's value where there is one, else `value`."""
        if given is not None and given != "auto":
            return self.note(name, given, "user", "")
        return self.note(name, value, source, why)


def resolve(options: EngineOptions, model: ModelConfig, facts: DeviceFacts) -> ResolvedConfig:
    """Decide every open question.

    Raises:
        ConfigError: what the user asked for cannot be had with this model on this device.
    """
    ledger = _Ledger(options)
    on_gpu = facts.kind == "cuda"
    ledger.choose("device", options.device.device, "device", facts.kind, facts.name)
    dtype = ledger.choose("dtype", options.loading.dtype, "checkpoint", model.dtype, "")
    load_format = _load_format(options, ledger)
    _model_impl(options, model, ledger)
    block_size = ledger.as_given("block_size", options.cache.block_size, "one folded sheet")
    max_num_seqs = ledger.choose(
        "max_num_seqs", options.scheduler.max_num_seqs, "rule", 512 if on_gpu else 128, ""
    )
    max_num_batched_tokens = ledger.choose(
        "max_num_batched_tokens",
        options.scheduler.max_num_batched_tokens,
        "rule",
        8192 if on_gpu else 1024,
        "bounds the time between two tokens while a prompt is computed",
    )
    utilization = ledger.as_given(
        "gpu_memory_utilization", options.cache.gpu_memory_utilization, "used on a GPU only"
    )
    kv_cache_bytes = _kv_cache_bytes(options, facts, ledger)
    config = ResolvedConfig(
        model=model,
        device=facts.kind,
        dtype=dtype,
        load_format=load_format,
        count_expert_tokens=ledger.as_given(
            "count_expert_tokens", options.loading.count_expert_tokens, "nobody asked for it"
        ),
        max_model_len=0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_allocator=ledger.as_given(
            "kv_allocator", options.cache.kv_allocator, "wastes less than a block a sequence"
        ),
        enable_prefix_caching=_prefix_caching(options, ledger),
        free_outside_windows=_windows(options, model, ledger),
        kv_cache_bytes=kv_cache_bytes,
        gpu_memory_utilization=utilization,
        **_encoding(options, ledger, max_num_batched_tokens),
        **_offloading(options, facts, ledger),
        **_execution(options, facts, ledger, is_bridged=model.is_bridged),
        **_queueing(options, ledger),
        lora=resolve_lora(options, model, ledger.as_given),
        settings=(),
    )
    if model.is_encoder:
        return _as_encoder(config, options, ledger)
    return _with_max_model_len(config, options, ledger)


def _as_encoder(config: ResolvedConfig, options: EngineOptions, ledger: _Ledger) -> ResolvedConfig:
    """`config` of a model that keeps nothing of a prompt, and so must run all of it in one step."""
    for name in sorted(OF_KV & options.changed()):
        raise ConfigError(
            f"{name} is about the KV cache, and this model is an encoder, which has none; leave "
            "it out"
        )
    limit, given = config.model.max_position_embeddings, options.loading.max_model_len
    if given is not None and given > limit:
        raise ConfigError(
            f"max_model_len is {given}, but the checkpoint was made for at most {limit} positions"
        )
    budget = options.scheduler.max_num_batched_tokens
    if given is not None and budget is not None and budget < given:
        raise ConfigError(
            f"an encoder computes a whole prompt in one step, so max_num_batched_tokens {budget} "
            f"must not be less than max_model_len {given}; raise the one or lower the other"
        )
    length = min(given or limit, budget or limit)
    if given is not None:
        ledger.note("max_model_len", length, "user", "")
    elif length < limit:
        ledger.note(
            "max_model_len", length, "rule", "a whole prompt must fit max_num_batched_tokens"
        )
    else:
        ledger.note("max_model_len", length, "checkpoint", "")
    if budget is None:
        budget = max(config.max_num_batched_tokens, length)
        why = "a step computes whole prompts, the longest included"
        ledger.note("max_num_batched_tokens", budget, "rule", why)
    why = "an encoder keeps nothing of a prompt"
    fields: dict[str, Any] = {"kv_allocator": "none", "enable_prefix_caching": False}
    for name, value in (fields | {"kv_cache_memory_bytes": 0}).items():
        ledger.note(name, value, "rule", why)
    ledger.note("enforce_eager", True, "rule", "attention reads lengths on the host")
    last = {setting.name: setting for setting in ledger.settings}
    fields |= {"kv_cache_bytes": 0, "enforce_eager": True, "max_model_len": length}
    fields |= {"max_num_batched_tokens": budget, "settings": tuple(last.values())}
    return dataclasses.replace(config, **fields)


def _encoding(
    options: EngineOptions, ledger: _Ledger, max_num_batched_tokens: int
) -> dict[str, Any]:
    """What images may cost, in models that see any."""
    given, why = options.scheduler.max_num_encoder_tokens, "as many as a step computes"
    name, num_bytes = "encoder_cache_memory_bytes", options.cache.encoder_cache_memory_bytes
    return {
        "max_num_encoder_tokens": ledger.choose(
            "max_num_encoder_tokens", given, "rule", max_num_batched_tokens, why
        ),
        "encoder_cache_bytes": ledger.as_given(name, num_bytes, "some images' worth"),
    }


def _load_format(options: EngineOptions, ledger: _Ledger) -> str:
    """Where weights come from; whether a tokenizer comes with them is only written down."""
    loading = options.loading
    ledger.as_given("skip_tokenizer_init", loading.skip_tokenizer_init, "text is wanted")
    return str(ledger.as_given("load_format", loading.load_format, "read the checkpoint"))


def _model_impl(options: EngineOptions, model: ModelConfig, ledger: _Ledger) -> None:
    """Whose code runs the model, which was decided when its config was read."""
    found = ("octavo", "octavo has its own code for this architecture")
    if model.is_bridged:
        found = ("transformers", "octavo has no code of its own for this architecture")
        if options.device.determinism == "batch-invariant":
            raise ConfigError(
                "determinism batch-invariant is a promise of octavo's own layers, but "
                "transformers' code runs this model; take determinism seeded"
            )
    ledger.choose("model_impl", options.loading.model_impl, "rule", *found)


def _execution(
    options: EngineOptions, facts: DeviceFacts, ledger: _Ledger, *, is_bridged: bool
) -> dict[str, Any]:
    """How steps are run."""
    device, on_gpu = options.device, facts.kind == "cuda"
    given = options.scheduler.async_scheduling
    why = "hides the host's time behind the GPU's" if on_gpu else "a step on a CPU hides nothing"
    return {
        "num_threads": ledger.choose(
            "num_threads", device.num_threads, "device", facts.num_threads, "usable cores"
        ),
        "determinism": ledger.as_given("determinism", device.determinism, "speed comes first"),
        "enforce_eager": _enforce_eager(device.enforce_eager, ledger, is_bridged=is_bridged),
        "async_scheduling": ledger.choose("async_scheduling", given, "device", on_gpu, why),
    }


def _enforce_eager(given: bool, ledger: _Ledger, *, is_bridged: bool) -> bool:
    if is_bridged and not given:
        why = "transformers' code may wait for the device, which no graph can hold"
        return bool(ledger.note("enforce_eager", True, "rule", why))
    why = "graphs save the host's time, on a GPU"
    return bool(ledger.as_given("enforce_eager", given, why))


def _queueing(options: EngineOptions, ledger: _Ledger) -> dict[str, Any]:
    """The settings of queue and batching, none of which needs deciding."""
    reasons = {
        "scheduling_policy": "in order of arrival",
        "batching": "decodes go first, prompts fill what is left",
        "max_num_queued_reqs": "bounds the waiting queue",
        "max_num_queued_tokens": "no bound by tokens",
        "target_ttft_ms": "no bound by time",
    }
    return {
        name: ledger.as_given(name, getattr(options.scheduler, name), why)
        for name, why in reasons.items()
    }


def _prefix_caching(options: EngineOptions, ledger: _Ledger) -> bool:
    """Whether blocks are shared: what lies in one run cannot be."""
    given, allocator = options.cache.enable_prefix_caching, options.cache.kv_allocator
    if allocator == "paged":
        why = "costs next to nothing"
        return bool(ledger.choose("enable_prefix_caching", given, "default", True, why))
    if given:
        raise ConfigError(
            f"enable_prefix_caching shares blocks, but kv_allocator {allocator} gives each "
            "sequence a run of its own; drop one of the two"
        )
    why = f"kv_allocator {allocator} cannot share blocks"
    return bool(ledger.choose("enable_prefix_caching", given, "rule", False, why))


def _windows(options: EngineOptions, model: ModelConfig, ledger: _Ledger) -> bool:
    """Whether layers with windows give back what they see no more."""
    given, name = options.cache.free_outside_windows, "free_outside_windows"
    context = options.loading.max_model_len or model.max_position_embeddings
    windows = [layer.attention.window or context for layer in model.layers]
    why_not = why_not_grouped(model)
    if why_not is None and min(windows) >= context:
        why_not = f"no context is longer than {context}, and so than a window"
    if why_not is None and options.cache.kv_allocator != "paged":
        why_not = f"kv_allocator {options.cache.kv_allocator} gives a sequence one run of blocks"
    if why_not is None and options.cache.kv_offloading_size:
        why_not = "with kv_offloading_size, blocks of whole contexts move between memories"
    if given and why_not is not None:
        raise ConfigError(f"{name} cannot be had: {why_not}; leave it out")
    why = why_not or "layers with a window leave the room to others"
    return bool(ledger.choose(name, given, "rule", why_not is None, why))


def _offloading(options: EngineOptions, facts: DeviceFacts, ledger: _Ledger) -> dict[str, Any]:
    """The memory below the device, and what preemption does with it."""
    cache, mode = options.cache, options.scheduler.preemption_mode
    host, disk = cache.kv_offloading_size or 0.0, cache.kv_offloading_disk_size or 0.0
    shares_blocks = cache.kv_allocator == "paged" and cache.enable_prefix_caching is not False
    if host and not shares_blocks:
        raise ConfigError("kv_offloading_size needs paged blocks and prefix caching")
    if not host and (disk or cache.kv_offloading_disk_path):
        raise ConfigError("what goes to disk passes through host memory: set kv_offloading_size")
    if not host and mode in ("swap", "auto"):
        raise ConfigError(f"preemption_mode {mode} needs host memory: set kv_offloading_size")
    if host * GIB > facts.free_memory_bytes and facts.kind == "cpu":
        raise ConfigError(
            f"kv_offloading_size is {host:g} GiB, but only {facts.free_memory_bytes // MIB} MiB "
            "of memory are free; ask for less"
        )
    ledger.as_given("kv_offloading_size", cache.kv_offloading_size, "evicted blocks are dropped")
    ledger.as_given("kv_offloading_disk_size", cache.kv_offloading_disk_size, "nothing is kept")
    why = "there is host memory for it" if host else "no host memory is set aside"
    default = "auto" if host else "recompute"
    return {
        "kv_offloading_bytes": int(host * GIB),
        "kv_offloading_disk_bytes": int(disk * GIB),
        "kv_offloading_disk_path": cache.kv_offloading_disk_path,
        "preemption_mode": ledger.choose("preemption_mode", mode, "rule", default, why),
    }


def _kv_cache_bytes(options: EngineOptions, facts: DeviceFacts, ledger: _Ledger) -> int | None:
    given = options.cache.kv_cache_memory_bytes
    if facts.kind == "cuda":
        value: int | None = ledger.choose(
            "kv_cache_memory_bytes", given, "device", None, "measured after the weights are loaded"
        )
        return value
    default = min(CPU_KV_CACHE_BYTES, facts.free_memory_bytes // 4)
    why = f"1 GiB, at most a quarter of the {facts.free_memory_bytes // MIB} MiB that are free"
    value = ledger.choose("kv_cache_memory_bytes", given, "rule", default, why)
    if given is not None and given > facts.free_memory_bytes:
        raise ConfigError(
            f"kv_cache_memory_bytes is {given // MIB} MiB, but only "
            f"{facts.free_memory_bytes // MIB} MiB of memory are free; ask for less"
        )
    return value


def _with_max_model_len(
    config: ResolvedConfig, options: EngineOptions, ledger: _Ledger
) -> ResolvedConfig:
    """The context: the user's, the checkpoint's, or what the KV pool can hold."""
    given, limit = options.loading.max_model_len, config.model.max_position_embeddings
    if given is not None and given > limit:
        raise ConfigError(
            f"max_model_len is {given}, but the checkpoint was made for at most {limit} positions"
        )
    source: Source = "checkpoint" if given is None else "user"
    max_model_len, why = given or limit, ""
    if config.kv_cache_bytes is not None:
        max_model_len, source, why = fit_max_model_len(config, max_model_len, source)
    ledger.note("max_model_len", max_model_len, source, why)
    return dataclasses.replace(config, max_model_len=max_model_len, settings=tuple(ledger.settings))


def with_eager_steps(config: ResolvedConfig, why: str) -> ResolvedConfig:
    """`config` without CUDA graphs, because of what was found after it was decided."""
    changed = Setting("enforce_eager", True, "device", why)
    settings = {setting.name: setting for setting in config.settings} | {changed.name: changed}
    return dataclasses.replace(config, enforce_eager=True, settings=tuple(settings.values()))


def with_kv_cache_bytes(config: ResolvedConfig, kv_cache_bytes: int) -> ResolvedConfig:
    """`config` with the KV memory that was measured, and a context that fits it."""
    measured = dataclasses.replace(config, kv_cache_bytes=kv_cache_bytes)
    before = {setting.name: setting for setting in config.settings}
    context = before["max_model_len"]
    max_model_len, source, why = fit_max_model_len(measured, context.value, context.source)
    changed = {
        "kv_cache_memory_bytes": Setting(
            "kv_cache_memory_bytes", kv_cache_bytes, "device", "measured after loading"
        ),
        "max_model_len": Setting("max_model_len", max_model_len, source, why or context.why),
    }
    return dataclasses.replace(
        measured, max_model_len=max_model_len, settings=tuple((before | changed).values())
    )


def fit_max_model_len(
    config: ResolvedConfig, wanted: int, source: Source
) -> tuple[int, Source, str]:
    """The context that the KV pool can hold, given the one wanted, with its source and reason.

    Raises:
        ConfigError: the user asked for more than fits, or hardly anything fits.
    """
    kv_cache_bytes = config.kv_cache_bytes or 0
    num_blocks = config.num_device_blocks
    one_run = ""
    if config.kv_allocator == "contiguous-buddy":
        # One sequence lies in one run, and the longest is the largest power of two in the pool.
        num_blocks, one_run = 1 << num_blocks.bit_length() >> 1, " in one run of a power of two"
    num_slots = config.kv_groups.longest_in(num_blocks, config.block_size, wanted)
    if num_slots >= wanted:
        return wanted, source, ""
    have = f"{kv_cache_bytes // MIB} MiB of KV cache hold {num_slots} tokens{one_run}"
    if source == "user" or num_slots < 2 * config.block_size:
        raise ConfigError(
            f"a context of {wanted} tokens is wanted, but {have}; raise kv_cache_memory_bytes or "
            "lower max_model_len"
        )
    return num_slots, "rule", f"{have}, less than the checkpoint's {wanted}"
