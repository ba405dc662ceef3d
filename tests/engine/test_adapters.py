"""LoRA adapters through the whole engine, held to transformers with the adapter merged."""

from functools import partial

import pytest
import torch
from helpers import run_to_end, tokens_of

from octavo import LLM, LoRARequest, SamplingParams
from octavo.config import DeviceFacts, EngineOptions
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.core import Adapter, Request, RequestOptions
from octavo.engine import build_engine, memory_report
from octavo.engine.memory_report import TOLERANCE, reachable_bytes
from octavo.errors import ConfigError, RequestError, UnknownModelError
from octavo.kernels import native, reference_only
from octavo.testing.tiny_adapters import ALL, matrices_of, merged, write_adapter
from octavo.testing.tiny_models import write_tiny_model

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
LENGTHS = (1, 16, 40, 100)
RANKS = {"a": 3, "b": 8, "c": 16}
# What each changes, besides its rank: all, attention alone, the MLP alone.
MODULES = {"a": ALL, "b": ("q_proj", "o_proj"), "c": ("gate_proj", "up_proj", "down_proj")}
DECODERS = [
    *("llama", "qwen2", "qwen3", "smollm3", "mistral", "gemma2", "gemma3", "phi3"),
    *("gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe"),
]


def prompt(length, seed=0):
    return {"prompt_token_ids": [(31 * i + 7 * seed + length) % 301 for i in range(length)]}


PROMPTS = [prompt(length) for length in LENGTHS]


class World:
    """A tiny base, three adapters of it, and transformers' models with each of them merged."""

    def __init__(self, directory):
        self.base = directory / "base"
        model = write_tiny_model(self.base, "llama")
        self.models = {None: model}
        self.requests = {None: None}
        for number, (name, rank) in enumerate(RANKS.items(), 1):
            path = directory / name
            shapes = matrices_of(model)
            rslora = name == "b"
            write_adapter(
                path, shapes, rank=rank, modules=MODULES[name], seed=number, use_rslora=rslora
            )
            self.models[name] = merged(model, path)
            self.requests[name] = LoRARequest(name, number, str(path))

    def llm(self, **options):
        defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2**22, "num_threads": 1}
        defaults |= {"enable_lora": True, "max_loras": 3}
        return LLM(str(self.base), **(defaults | options), check_integrity=True)

    def answers(self, llm, names, prompts=None):
        prompts = prompts or PROMPTS[: len(names)]
        requests = [self.requests[name] for name in names]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=requests)
        return [output.outputs[0] for output in outputs]

    @torch.inference_mode()
    def check(self, names, prompts, answers):
        """Each answer is what the merged model finds likeliest, and as likely."""
        for name, one, answer in zip(names, prompts, answers, strict=True):
            ids = torch.tensor([one["prompt_token_ids"] + answer.token_ids])
            logits = self.models[name](ids).logits[0, -NUM_TOKENS - 1 : -1].float()
            assert answer.token_ids == logits.argmax(-1).tolist(), name
            found = torch.tensor([step.logprob for step in answer.logprobs])
            likelihoods = logits.log_softmax(-1).max(-1).values
            torch.testing.assert_close(found, likelihoods, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("adapters"))


WAYS = {
    "as it is": {},
    "in plain torch": {},
    "one at a time": {"max_num_seqs": 1},
    "in chunks, ahead": {
        "max_num_batched_tokens": 13,
        "max_num_seqs": 3,
        "async_scheduling": True,
    },
    "more adapters than slots": {"max_loras": 1},
    "small blocks": {"block_size": 4, "max_num_batched_tokens": 50},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_the_base_and_three_adapters_is_four_models(world, way):
    names = ["a", None, "b", "c"]
    if way == "in plain torch":
        with reference_only():
            answers = world.answers(world.llm(), names)
    else:
        answers = world.answers(world.llm(**WAYS[way]), names)
    world.check(names, PROMPTS, answers)
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


@pytest.mark.parametrize("architecture", DECODERS)
@torch.inference_mode()
def test_every_decoder_takes_adapters(tmp_path, architecture):
    base = write_tiny_model(tmp_path / "base", architecture)
    shapes = {
        name: shape
        for name, shape in matrices_of(base).items()
        if not name.endswith((".gate", ".router")) and "head" not in name and "embed" not in name
    }
    path = write_adapter(tmp_path / "a", shapes, rank=5, modules=("",))
    llm = LLM(
        str(tmp_path / "base"),
        dtype="float32",
        kv_cache_memory_bytes=2**22,
        enable_lora=True,
        max_lora_rank=8,
    )
    requests = [LoRARequest("a", 1, str(path)), None]
    ids = prompt(40)["prompt_token_ids"]
    outputs = llm.generate([prompt(40), prompt(40)], GREEDY, use_tqdm=False, lora_request=requests)
    for output, model in zip(outputs, (merged(base, path), base), strict=True):
        answer = output.outputs[0]
        logits = model(torch.tensor([ids + answer.token_ids])).logits[0, -NUM_TOKENS - 1 : -1]
        assert answer.token_ids == logits.argmax(-1).tolist()
        found = torch.tensor([step.logprob for step in answer.logprobs])
        best = logits.float().log_softmax(-1).max(-1).values
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def test_prefixes_are_not_shared_between_adapters(world):
    llm = world.llm()
    long = [prompt(100, seed=5)]
    for name in ("a", None, "b"):
        first = world.answers(llm, [name], long)
        world.check([name], long, first)
        requests = [world.requests[name]]
        [again] = llm.generate(long, GREEDY, use_tqdm=False, lora_request=requests)
        assert again.num_cached_tokens == 96  # its own
        assert again.outputs[0].token_ids == first[0].token_ids
    assert llm.stats().num_prefix_hits == 3 * 96


def test_after_preemption_the_adapter_is_still_theirs(world):
    crowd = [prompt(15, seed) for seed in range(8)]
    names = ["a", "b", None, "c"] * 2
    roomy = world.llm(block_size=4)
    expected = world.answers(roomy, names, crowd)
    tight_bytes = 40 * roomy.engine.config.kv_block_bytes  # all can start, and few can end
    tight = world.llm(kv_cache_memory_bytes=tight_bytes, max_model_len=64, block_size=4)
    answers = world.answers(tight, names, crowd)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert tight.stats().num_preemptions > 0
    world.check(names, crowd, answers)


@pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_answer_has_the_same_bits_whatever_runs_beside_it(world, dtype):
    llm = world.llm(dtype=dtype, enable_prefix_caching=False)
    [alone] = world.answers(llm, ["b"], [PROMPTS[2]])
    together = world.answers(llm, ["a", None, "b", "b"], [*PROMPTS[:2], PROMPTS[2], PROMPTS[3]])
    found = [step.logprob for step in together[2].logprobs]
    assert found == [step.logprob for step in alone.logprobs]
    assert together[2].token_ids == alone.token_ids


def test_the_same_name_with_other_contents_is_another_version(world, tmp_path):
    shapes = matrices_of(world.models[None])
    llm = world.llm(max_loras=1)
    long, texts = [prompt(100, seed=9)], []
    for number, seed in ((1, 50), (2, 51), (3, 50)):
        path = write_adapter(tmp_path / "x", shapes, seed=seed)
        request = LoRARequest("x", number, str(path))
        [output] = llm.generate(long, GREEDY, use_tqdm=False, lora_request=request)
        texts.append(output.outputs[0].token_ids)
        # The third has the contents of the first, so what that computed is good for it.
        assert output.num_cached_tokens == (96 if number == 3 else 0)
    assert texts[0] == texts[2] != texts[1]


def test_both_levels_of_sleep(world):
    for level in (1, 2):
        llm = world.llm()
        names = ["a", None, "b", "c"]
        before = [answer.token_ids for answer in world.answers(llm, names)]
        llm.sleep(level)
        llm.wake_up()
        assert [answer.token_ids for answer in world.answers(llm, names)] == before


def adapter_request(name, adapter, *, max_tokens=NUM_TOKENS):
    return Request(
        request_id=name,
        prompt_token_ids=PROMPTS[2]["prompt_token_ids"],
        sampling=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
        seed=0,
        options=RequestOptions(adapter=adapter),
    )


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_of_an_unloaded_adapter_finish_and_then_it_is_gone(world, ahead):
    engine = world.llm(async_scheduling=ahead, max_loras=1).engine
    core, paths = engine.core, {n: r.lora_path for n, r in world.requests.items() if r}
    first = core.adapters.load("x", paths["a"])
    core.add(adapter_request("old", first), adapter_request("waits", first))
    core.step()
    core.adapters.unload("x")
    with pytest.raises(UnknownModelError, match="unloaded"):
        core.add(adapter_request("late", first))
    second = core.adapters.load("x", paths["c"])
    core.add(adapter_request("new", first))  # whoever sent it has not heard of the second
    core.add(adapter_request("base", None))
    events = run_to_end(core)
    [of_a], [of_c] = (world.answers(world.llm(), [name], [PROMPTS[2]]) for name in ("a", "c"))
    assert tokens_of(events, "waits") == of_a.token_ids
    assert tokens_of(events, "new") == of_c.token_ids
    assert core.adapters.loaded == (second,)
    core.add(adapter_request("again", second))
    run_to_end(core)
    registry = core.adapters
    assert registry.copy_of(second.digest) is not None
    with pytest.raises(KeyError):
        registry.copy_of(first.digest)


def test_host_memory_has_room_for_so_many(world):
    core = world.llm(max_cpu_loras=2, max_loras=1).engine.core
    paths = {name: request.lora_path for name, request in world.requests.items() if request}
    core.adapters.load("a", paths["a"])
    core.adapters.load("b", paths["b"])
    with pytest.raises(RequestError, match="loaded already"):
        core.adapters.load("b", paths["c"])
    with pytest.raises(RequestError, match="max_cpu_loras"):
        core.adapters.load("c", paths["c"])
    core.adapters.load("b", paths["c"], replace=True)
    core.adapters.unload("a")
    core.adapters.load("c", paths["a"])
    with pytest.raises(UnknownModelError):
        core.adapters.unload("a")
    # An `LLM` lets go of what it used longest ago.
    llm = world.llm(max_cpu_loras=1, max_loras=1)
    for name in ("a", "b", "a"):
        world.check([name], PROMPTS[:1], world.answers(llm, [name]))


def test_what_is_no_adapter_request_is_refused(world):
    llm, a = world.llm(), world.requests["a"]
    with pytest.raises(RequestError, match="2 prompts but 1"):
        llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False, lora_request=[a])
    twins = [a, LoRARequest("a", 2, a.lora_path)]
    with pytest.raises(RequestError, match="same name"):
        llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False, lora_request=twins)
    with pytest.raises(RequestError, match="positive"):
        LoRARequest("a", 0, a.lora_path)
    for name in ("", "x" * 257, "a\nb"):
        with pytest.raises(RequestError, match="printable"):
            LoRARequest(name, 1, a.lora_path)
    with pytest.raises(RequestError, match="cannot be read"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False, lora_request=LoRARequest("x", 1, "/no"))
    off = LLM(str(world.base), kv_cache_memory_bytes=2**22)
    with pytest.raises(RequestError, match="enable_lora"):
        off.generate(PROMPTS[0], GREEDY, use_tqdm=False, lora_request=a)
    unknown = adapter_request("x", Adapter("nobody", "0"))
    with pytest.raises(UnknownModelError):
        llm.engine.core.add(unknown)


@pytest.mark.parametrize("architecture", ["bert", "llava", "deepseek_v2"])
def test_models_that_take_none_are_refused_by_name(tmp_path, architecture):
    write_tiny_model(tmp_path, architecture)
    with pytest.raises(ConfigError, match="enable_lora is for decoders"):
        LLM(str(tmp_path), enable_lora=True)


def test_an_adapter_of_the_options_that_does_not_fit_ends_the_start(world, tmp_path):
    path = write_adapter(tmp_path, matrices_of(world.models[None]), rank=32)
    with pytest.raises(ConfigError, match=r"lora_modules: x=.*r=32.*at most 16"):
        world.llm(lora_modules=(f"x={path}",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_are_in_the_memory_plan(world, dtype):
    """Planned as they are, empty or full; the whole model around them is planned elsewhere."""
    options = {"device": "cpu", "dtype": dtype, "num_threads": 1, "kv_cache_memory_bytes": 2**22}
    options |= {"enable_lora": True, "max_loras": 5, "max_lora_rank": 24}
    engine = build_engine(EngineOptions.from_flat(str(world.base), options))
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    plan = plan_memory(engine.config, budget)
    [slots] = [group for group in plan.weights if group.kind == "slots of adapters"]
    without = sum(group.num_bytes for group in plan.weights if group is not slots)
    assert slots.num_bytes > without / 2
    [weights] = [line for line in engine.memory.lines if line.what == "weights"]
    assert abs(weights.measured_bytes - plan.weight_bytes) < TOLERANCE * weights.measured_bytes
    [kv] = [line for line in engine.memory.lines if line.what == "KV cache"]
    assert abs(kv.error) < TOLERANCE
    runner = engine.core._executor
    before = reachable_bytes(runner._model)
    core = engine.core
    core.add(adapter_request("x", core.adapters.load("a", world.requests["a"].lora_path)))
    run_to_end(core)
    assert abs(reachable_bytes(runner._model) - before) < 1000  # the tokens of its last step


@pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")
def test_the_largest_step_of_adapters_is_in_the_memory_plan(world, monkeypatch):
    options = {"device": "cpu", "dtype": "float32", "num_threads": 1, "enable_lora": True}
    options |= {"kv_cache_memory_bytes": 2**24, "max_num_seqs": 32, "max_num_batched_tokens": 512}
    engine = build_engine(EngineOptions.from_flat(str(world.base), options))
    core = engine.core
    adapter = core.adapters.load("a", world.requests["a"].lora_path)
    core.add(adapter_request("places the adapter", adapter))
    run_to_end(core)
    monkeypatch.setattr(
        memory_report, "Request", partial(Request, options=RequestOptions(adapter=adapter))
    )
    measured = memory_report.measure_largest_step(core, engine.config)
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    planned = plan_memory(engine.config, budget)
    assert planned.peak.name == "adapters"
    assert abs(planned.activation_bytes - measured) < TOLERANCE * measured
