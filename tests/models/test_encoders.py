"""Encoders as transformers has them: vectors and scores of tiny ones, and of a real model."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from octavo import LLM
from octavo.config import (
    DeviceFacts,
    EngineOptions,
    architectures,
    locate,
    model_config_from_hf,
)
from octavo.config.memory_plan import plan_memory
from octavo.config.planned_devices import device_budget
from octavo.core import SCORE
from octavo.engine import build_engine
from octavo.engine.memory_report import TOLERANCE, measure_largest_step
from octavo.errors import ConfigError, RequestError, UnsupportedModelError
from octavo.kernels import native
from octavo.testing.tiny_models import TINY_ENCODERS, write_tiny_model
from octavo.text import load_tokenizer

LENGTHS = (1, 16, 17, 100, 128)
PROMPTS = [{"prompt_token_ids": [2 + (31 * i + 7 * n) % 299 for i in range(n)]} for n in LENGTHS]
EMBEDDERS = sorted(name for name in TINY_ENCODERS if "classifier" not in name)
CLASSIFIERS = sorted(TINY_ENCODERS.keys() - set(EMBEDDERS))


def create_llm(model, **options):
    defaults = {"dtype": "float32", "num_threads": 1}
    return LLM(str(model), **(defaults | options), check_integrity=True)


def vectors(llm, prompts=PROMPTS, **how):
    outputs = llm.embed(prompts, **how, use_tqdm=False)
    return np.stack([output.outputs.embedding for output in outputs])


@torch.inference_mode()
def hidden_states(reference, prompts=PROMPTS):
    """Of the last block: [n, hidden_size] for each prompt."""
    base = getattr(reference, reference.base_model_prefix, reference)
    ids = (torch.tensor([prompt["prompt_token_ids"]]) for prompt in prompts)
    return [base(each).last_hidden_state[0].numpy() for each in ids]


def test_every_encoder_has_a_tiny_config():
    here = {name for name, one in architectures().items() if one.parity.endswith("_encoders.py")}
    assert here == set(TINY_ENCODERS)


@pytest.fixture(scope="module", params=EMBEDDERS)
def tiny(request, tmp_path_factory):
    """(directory of the checkpoint, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / request.param
    return directory, write_tiny_model(directory, request.param)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 128, "max_num_seqs": 3, "async_scheduling": True},
        {"scheduling_policy": "priority", "batching": "continuous"},
    ],
    ids=str,
)
def test_vectors_are_those_of_transformers(tiny, options):
    directory, reference = tiny
    llm = create_llm(directory, **options)
    states = hidden_states(reference)
    expected = {
        "cls": [of_one[0] for of_one in states],
        "last": [of_one[-1] for of_one in states],
        "mean": [of_one.mean(0) for of_one in states],
    }
    for pooling, each in expected.items():
        found = vectors(llm, pooling=pooling, normalize=False)
        np.testing.assert_allclose(found, np.stack(each), rtol=1e-4, atol=1e-4)
    assert llm.stats().num_blocks == 0


def test_by_default_it_is_the_first_token_normalised(tiny):
    directory, reference = tiny
    states = np.stack([of_one[0] for of_one in hidden_states(reference)])
    expected = states / np.linalg.norm(states, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(create_llm(directory)), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near(tiny):
    wide, narrow = (vectors(create_llm(tiny[0], dtype=d)) for d in ("float32", "bfloat16"))
    assert (1 - (wide * narrow).sum(1)).max() < 1e-3


@pytest.mark.skipif(native.unavailable() is not None, reason="no compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_as_planned(tiny, dtype):
    options = {"device": "cpu", "dtype": dtype, "num_threads": 1}
    options |= {"max_num_seqs": 32, "max_num_batched_tokens": 512}
    engine = build_engine(EngineOptions.from_flat(str(tiny[0]), options))
    budget = device_budget(DeviceFacts("cpu", "a CPU", 1, 2**40, 2**40), major=0, utilization=1.0)
    plan = plan_memory(engine.config, budget)
    measured = measure_largest_step(engine.core, engine.config)
    assert plan.activation_bytes == pytest.approx(measured, rel=TOLERANCE)
    for line in engine.memory.lines:
        if line.measured_bytes is not None:
            assert line.planned_bytes == pytest.approx(line.measured_bytes, rel=TOLERANCE), line


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_those_of_transformers(tmp_path, name):
    reference = write_tiny_model(tmp_path, name)
    num_types, vocab_size = reference.config.type_vocab_size, reference.config.vocab_size
    llm = create_llm(tmp_path)
    typed, expected = [], []
    for prompt in PROMPTS:
        ids = prompt["prompt_token_ids"]
        types = [int(num_types > 1 and 2 * i > len(ids)) for i in range(len(ids))]
        typed.append([token + kind * vocab_size for token, kind in zip(ids, types, strict=True)])
        with torch.inference_mode():
            logits = reference(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        expected.append(logits.sigmoid()[0] if logits.shape[1] == 1 else logits[0])
    found = llm._pool(typed, llm._prompts.encode, SCORE, use_tqdm=False)
    for one, scores in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.outputs.embedding, scores.numpy(), rtol=1e-4, atol=1e-4)


def test_a_prompt_runs_whole_or_is_refused(tiny):
    llm = create_llm(tiny[0])
    assert llm.engine.config.max_num_batched_tokens >= llm.engine.config.max_model_len
    too_long = {"prompt_token_ids": [5] * (llm.engine.config.max_model_len + 1)}
    with pytest.raises(RequestError, match="maximum context length"):
        vectors(llm, [too_long])
    short = create_llm(tiny[0], max_num_batched_tokens=40)
    assert short.engine.config.max_model_len == 40


def test_what_an_encoder_cannot_do_is_refused(tiny, tmp_path):
    llm = create_llm(tiny[0])
    with pytest.raises(RequestError, match="encoder: it makes embeddings"):
        llm.generate(PROMPTS[:1], use_tqdm=False)
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes"):
        create_llm(tiny[0], kv_cache_memory_bytes=2**22)
    with pytest.raises(ConfigError, match="must not be less than max_model_len 100"):
        create_llm(tiny[0], max_model_len=100, max_num_batched_tokens=50)
    write_tiny_model(tmp_path, "bert_classifier")
    with pytest.raises(RequestError, match="made to score"):
        create_llm(tmp_path).embed(PROMPTS[:1], use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "mish"),
        ("sbert_ce_default_activation_function", "torch.nn.modules.activation.ReLU"),
    ],
)
def test_options_that_would_change_the_arithmetic_are_refused(name, value):
    config = {"architectures": ["BertForSequenceClassification"], **TINY_ENCODERS["bert"]}
    with pytest.raises(UnsupportedModelError):
        model_config_from_hf(config | {name: value})


def write_modules(directory, pooling, *kinds):
    """sentence-transformers' files, of a pooling and further steps."""
    folders = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": folders.get(kind, f"2_{kind}")}
        for kind in ("Transformer", "Pooling", *kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 50}')


def test_sentence_transformers_files_say_how_vectors_are_made(tmp_path):
    reference = write_tiny_model(tmp_path, "bert")
    states = hidden_states(reference, PROMPTS[:3])
    for mode, pick in {
        "pooling_mode_mean_tokens": lambda rows: rows.mean(0),
        "pooling_mode_lasttoken": lambda rows: rows[-1],
    }.items():
        write_modules(tmp_path, {mode: True, "pooling_mode_cls_token": False})
        llm = create_llm(tmp_path)
        expected = np.stack([pick(rows) for rows in states])
        np.testing.assert_allclose(vectors(llm, PROMPTS[:3]), expected, rtol=1e-4, atol=1e-4)
        assert llm.engine.config.max_model_len == 50
    write_modules(tmp_path, {"pooling_mode": "mean"}, "Normalize")
    lengths = np.linalg.norm(vectors(create_llm(tmp_path), PROMPTS[:3]), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    write_modules(tmp_path, {"pooling_mode_max_tokens": True})
    with pytest.raises(UnsupportedModelError, match="pooling_mode_max_tokens"):
        create_llm(tmp_path)
    write_modules(tmp_path, {"pooling_mode": "mean"}, "Dense")
    with pytest.raises(UnsupportedModelError, match="Dense"):
        create_llm(tmp_path)


TEXTS = [f"Text {n}: " + "The quick brown fox, naïve & 東京, jumps. " * n for n in range(15)]
TEXTS += ["hello world", "[SEP", "", "Üñïçødé", "a" * 90, "1 + 1 = 2", "dog", "puppy"] + [
    f"{word} is a word of {len(word)} letters" for word in ("one", "three", "eleven", "x", "yes!")
]
TEXTS += ["market", "What is the capital of France?"]


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 1e-3)])
def test_a_real_model_gives_the_vectors_of_transformers(dtype, most):
    llm = create_llm("all-minilm-l6-v2", dtype=dtype, max_num_seqs=7)
    path = str(llm.engine.checkpoint.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    reference = transformers.AutoModel.from_pretrained(path).eval()
    assert len(TEXTS) == 30
    for text, output in zip(TEXTS, llm.embed(TEXTS, use_tqdm=False), strict=True):
        batch = tokenizer(text, return_tensors="pt")
        assert output.prompt_token_ids == batch.input_ids[0].tolist()
        with torch.inference_mode():
            mean = reference(**batch).last_hidden_state[0].mean(0).numpy()
        assert 1 - output.outputs.embedding @ mean / np.linalg.norm(mean) < most
    near, far = (one.outputs.score for one in llm.score("dog", ["puppy", "market"], use_tqdm=False))
    assert near > far
    with pytest.raises(RequestError, match="maximum context length is 256"):
        llm.embed("word " * 300, use_tqdm=False)


def test_word_pieces_become_text_again():
    tokenizer = load_tokenizer(locate("all-minilm-l6-v2"))
    assert tokenizer.decode(tokenizer.encode("unaffable octavos are here")) == (
        "unaffable octavos are here"
    )
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("octavos")]
    assert pieces[0] == b"[CLS]" and b"".join(pieces[1:-1]) == b" octavos"


def test_pairs_are_encoded_and_cut_as_the_tokenizers_library_does():
    tokenizer = load_tokenizer(locate("all-minilm-l6-v2"))
    library = tokenizers.Tokenizer.from_file(str(locate("all-minilm-l6-v2").tokenizer_file()))
    library.no_padding()
    for first, second in (("a b c", "d e f g h i"), ("a " * 9, "b"), ("a " * 9, "b " * 9)):
        pair = tokenizer.encode_pair(first, second)
        for limit in (4, 5, 8, 13, 100):
            library.enable_truncation(limit)
            expected = library.encode(first, second)
            cut = pair.cut_to(limit)
            assert (list(cut.token_ids), list(cut.type_ids)) == (expected.ids, expected.type_ids)
