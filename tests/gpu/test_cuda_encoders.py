"""Encoders of texts and of images on an NVIDIA GPU: the kernel by itself, and whole engines."""

import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions
from octavo.engine import build_engine
from octavo.kernels import ENCODER_ATTENTION, Segments
from octavo.testing.tiny_models import write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DIMS = [16, 64, 72, 80, 88, 96, 128, 256]
LENGTHS = {
    "texts": [0, 1, 512, 64, 37, 130, 5],
    "windows": [64] * 40 + [32, 48, 16] * 4,
    "CLIP": [577] * 3,
}
PLACEHOLDER = 302
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def heads_of(lengths, dim, dtype):
    """(queries, keys, values) [T, 4, dim], which lie in one tensor."""
    torch.manual_seed(0)
    return torch.randn(sum(lengths), 3, 4, dim, device="cuda").to(dtype).unbind(1)


@pytest.fixture(scope="module")
def _compiled():
    """All kernels of the test below, side by side."""
    from octavo.kernels.triton_encoder_attention import triton_encoder_attention as attend
    from octavo.kernels.triton_launch import compile_ahead

    with compile_ahead(os.cpu_count() or 1):
        for lengths, dim, dtype in itertools.product(LENGTHS.values(), DIMS, TOLERANCE):
            for some in (lengths, lengths[-1:]):
                segments = Segments.of(some, "cuda")
                attend(*heads_of(some, dim, dtype), segments, segments, dim**-0.5)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segments_of_any_length_and_heads_of_any_size(lengths, dim, dtype):
    from octavo.kernels.triton_encoder_attention import triton_encoder_attention as attend

    segments = Segments.of(lengths, "cuda")
    args = *heads_of(lengths, dim, dtype), segments, segments, dim**-0.5
    made, expected = (
        attend(*args),
        ENCODER_ATTENTION.reference(*(a.double() for a in args[:3]), *args[3:]),
    )
    torch.testing.assert_close(
        made.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    last = slice(sum(lengths) - lengths[-1], None)
    alone = Segments.of(lengths[-1:], "cuda")
    one = attend(*(part[last] for part in args[:3]), alone, alone, args[-1])
    assert torch.equal(one, made[last]), "a segment's bits depend on nobody else"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_queries_that_read_an_image(dtype):
    from octavo.kernels.triton_encoder_attention import triton_encoder_attention as attend

    torch.manual_seed(0)
    queries, patches = Segments.of([32] * 3, "cuda"), Segments.of([257] * 3, "cuda")
    query = torch.randn(96, 12, 64, device="cuda").to(dtype)
    key, value = torch.randn(2, 771, 12, 64, device="cuda").to(dtype).unbind()
    made = attend(query, key, value, queries, patches, 0.125)
    expected = ENCODER_ATTENTION.reference(
        query.double(), key.double(), value.double(), queries, patches, 0.125
    )
    torch.testing.assert_close(
        made.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_on_the_gpu_are_those_of_the_cpu(tmp_path, name, pooling):
    write_tiny_model(tmp_path, name)
    prompts = [
        {"prompt_token_ids": [2 + (31 * i + 7 * n) % 299 for i in range(n)]}
        for n in (1, 16, 17, 100, 128)
    ]

    def vectors(device):
        llm = LLM(str(tmp_path), device=device, dtype="float32", check_integrity=True)
        outputs = llm.embed(prompts, pooling=pooling, use_tqdm=False)
        return np.stack([output.outputs.embedding for output in outputs])

    np.testing.assert_allclose(vectors("cuda"), vectors("cpu"), rtol=1e-4, atol=1e-5)


def picture(height, width):
    noise = np.random.default_rng(1000 * height + width)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(*parts):
    """Of numbers, so many words, and pictures."""
    ids, images = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [31 * i % 256 for i in range(part)]
        else:
            ids.append(PLACEHOLDER)
            images.append(part)
    return {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {})


@pytest.mark.parametrize(
    ("name", "enforce_eager"),
    [("llava", False), ("llava_next", True), ("blip2", False), ("qwen2_5_vl", False)],
)
def test_answers_about_images_on_the_gpu_are_those_of_the_cpu(tmp_path, name, enforce_eager):
    write_tiny_model(tmp_path, name)
    cat, dog = picture(30, 44), picture(61, 17)
    prompts = [prompt(5, cat, 9), prompt(33, cat, 1, dog, 2, cat, 20), prompt(20), prompt(dog, 2)]

    def answers(device, **options):
        llm = LLM(
            str(tmp_path),
            device=device,
            dtype="float32",
            kv_cache_memory_bytes=2**24,
            check_integrity=True,
            **options,
        )
        return [
            output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)
        ]

    assert answers("cuda", enforce_eager=enforce_eager) == answers("cpu")


@pytest.mark.parametrize("name", ["bert", "llava", "blip2", "qwen2_5_vl"])
def test_attention_of_an_encoder_is_no_reference(tmp_path, name):
    write_tiny_model(tmp_path, name)
    values = {"device": "cuda", "dtype": "bfloat16"}
    if name != "bert":
        values["kv_cache_memory_bytes"] = 2**24
    engine = build_engine(EngineOptions.from_flat(str(tmp_path), values))
    chosen = {r.choice.name for r in engine.kernels if r.choice.op == "encoder_attention"}
    assert chosen == {"triton"}
    assert engine.config.enforce_eager == (name == "bert")
