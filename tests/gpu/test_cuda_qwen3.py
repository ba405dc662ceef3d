"""Qwen3 through the whole engine on an NVIDIA GPU."""

import json

import pytest
import torch
from helpers import create_request, run_to_end, tokens_of

from octavo import LLM, SamplingParams
from octavo.config import EngineOptions
from octavo.engine import build_engine
from octavo.testing.tiny_qwen3 import TINY_QWEN3_CONFIG, write_tiny_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [
    {"prompt_token_ids": [(31 * i + n) % 301 for i in range(n)]} for n in (1, 7, 16, 17, 150)
]


def test_fp32_tokens_on_the_gpu_are_those_of_the_cpu(tmp_path):
    model = str(write_tiny_qwen3(tmp_path / "tiny"))

    def answers(device):
        llm = LLM(model, device=device, kv_cache_memory_bytes=2**24, check_integrity=True)
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert answers("cuda") == answers("cpu")


def test_random_weights_in_bf16_run_and_no_small_op_is_a_reference(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_QWEN3_CONFIG))
    values = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy"}
    engine = build_engine(
        EngineOptions.from_flat(str(tmp_path), values | {"kv_cache_memory_bytes": 2**24})
    )
    for report in engine.kernels:
        assert report.choice.op == "linear" or report.choice.name != "reference", str(report)
    engine.core.add(create_request(20, 5, request_id="one"))
    assert len(tokens_of(run_to_end(engine.core), "one")) == 5
