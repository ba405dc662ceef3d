"""LoRA adapters through the whole engine on an NVIDIA GPU, and their products at real sizes."""

import pytest
import torch

from octavo import LLM, LoRARequest, SamplingParams
from octavo.kernels import LORA, Case, LoRAShape
from octavo.testing.tiny_adapters import ALL, matrices_of, write_adapter
from octavo.testing.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 7, 16, 17, 150)
]
NAMES = ["a", None, "b", "c", "a"]


@pytest.fixture
def world(tmp_path):
    """(the base's directory, requests by name): three adapters of different ranks and modules."""
    base = write_tiny_model(tmp_path / "base", "llama")
    requests = {None: None}
    for number, (name, rank, modules) in enumerate(
        (("a", 3, ALL), ("b", 16, ("q_proj", "o_proj")), ("c", 8, ("up_proj", "down_proj"))), 1
    ):
        path = write_adapter(
            tmp_path / name, matrices_of(base), rank=rank, modules=modules, seed=number
        )
        requests[name] = LoRARequest(name, number, str(path))
    return tmp_path / "base", requests


def create(world, **options):
    defaults = {"dtype": "float32", "kv_cache_memory_bytes": 2**24, "check_integrity": True}
    return LLM(str(world[0]), **defaults | {"enable_lora": True, "max_loras": 3} | options)


def answers(llm, world, names=NAMES, prompts=PROMPTS):
    requests = [world[1][name] for name in names]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=requests)
    return [output.outputs[0] for output in outputs]


def tokens(llm, world):
    return [answer.token_ids for answer in answers(llm, world)]


WAYS = {
    "in graphs": {},
    "eager": {"enforce_eager": True},
    "in chunks": {"max_num_batched_tokens": 32, "max_num_seqs": 4},
    "one slot": {"max_loras": 1},
    "one step after the other": {"async_scheduling": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_fp32_tokens_on_the_gpu_are_those_of_the_cpu(world, way):
    on_gpu = create(world, device="cuda", **WAYS[way])
    [report] = [report for report in on_gpu.engine.kernels if report.choice.op == LORA.name]
    assert report.choice.name == "triton", str(report)
    assert on_gpu.engine.config.enforce_eager == (way == "eager")
    expected = tokens(create(world, device="cpu"), world)
    for _ in range(2):  # the second time from the prefix cache, and decodes from the graphs
        assert tokens(on_gpu, world) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_both_levels_of_sleep(world, level):
    llm = create(world, device="cuda")
    before = tokens(llm, world)
    llm.sleep(level)
    llm.wake_up()
    assert tokens(llm, world) == before


def test_bits_do_not_depend_on_the_batch_where_that_is_promised(world):
    llm = create(
        world,
        device="cuda",
        dtype="bfloat16",
        determinism="batch-invariant",
        enable_prefix_caching=False,
    )
    together = answers(llm, world)
    for place, name in enumerate(NAMES):
        [alone] = answers(llm, world, [name], [PROMPTS[place]])
        assert alone.token_ids == together[place].token_ids
        assert [step.logprob for step in alone.logprobs] == [
            step.logprob for step in together[place].logprobs
        ]


def test_slots_are_in_the_memory_plan(world):
    llm = create(world, device="cuda", max_loras=20, max_lora_rank=64)
    for line in llm.engine.memory.lines:
        if line.what == "weights":
            assert line.planned_bytes == pytest.approx(line.measured_bytes, rel=0.05)


SHAPES = {
    "qkv": LoRAShape(8, 16, (4096, 1024, 1024), 4096),
    "o": LoRAShape(8, 16, (4096,), 4096),
    "gate and up": LoRAShape(4, 64, (14336, 14336), 4096),
    "down": LoRAShape(4, 64, (4096,), 14336),
}


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1025, 4096])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_at_real_sizes_inside_a_graph(shape, num_tokens):
    from octavo.kernels.triton_lora import TRITON_LORA

    torch.manual_seed(0)
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    slots = TRITON_LORA.allocate(shape, Case("cuda", torch.bfloat16))
    plain = LORA.reference.allocate(shape, Case("cuda", torch.float32))
    for slot in range(shape.num_slots):
        a = torch.randn(len(shape.parts), shape.rank, shape.in_features, **bf16)
        b = torch.randn(shape.out_features, shape.rank, **bf16) * shape.rank**-0.5
        a *= shape.in_features**-0.5
        TRITON_LORA.place(slots, slot, a, b)
        LORA.reference.place(plain, slot, a, b)
    x = torch.randn(num_tokens, shape.in_features, **bf16)
    base = torch.randn(num_tokens, shape.out_features, **bf16)
    adapters = torch.zeros(num_tokens, dtype=torch.int32, device="cuda")
    y = base.clone()

    def work():
        y.copy_(base)
        TRITON_LORA.add(y, x, slots, TRITON_LORA.group(adapters, shape.num_slots))

    work()  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for low in (-1, shape.num_slots - 1):
        # Other adapters than those that were captured, in the same memory.
        adapters.copy_(torch.randint(low, shape.num_slots, (num_tokens,)))
        graph.replay()
        first = y.clone()
        graph.replay()
        assert torch.equal(y, first)
        expected = base.float()
        groups = LORA.reference.group(adapters, shape.num_slots)
        LORA.reference.add(expected, x.float(), plain, groups)
        torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=3e-2)
