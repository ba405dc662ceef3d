"""`--lora NAME`: an adapter answers in the terminal as it does in Python."""

import json

import pytest

from octavo import LLM, LoRARequest, SamplingParams
from octavo.cli import main
from octavo.testing.tiny_adapters import matrices_of, write_adapter
from octavo.testing.tiny_models import write_tiny_model

FLAGS = ["--kv-cache-memory-bytes", str(2**23), "--device", "cpu", "--num-threads", "1"]
FLAGS += ["--dtype", "float32", "--skip-tokenizer-init"]
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the base's directory, the adapter's)"""
    folder = tmp_path_factory.mktemp("world")
    base = write_tiny_model(folder / "base", "llama")
    return str(folder / "base"), str(write_adapter(folder / "sql", matrices_of(base)))


def test_the_one_that_is_named_answers(world, tmp_path):
    base, adapter = world
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt_token_ids": IDS, "ignore_eos": True}))
    file = ["--input", str(source), "--output", str(target), "--max-tokens", "16"]
    modules = ["--enable-lora", "--lora-modules", f"sql={adapter}"]
    answers = {}
    for name, chosen in ((None, []), ("sql", ["--lora", "sql"])):
        flags = [*file, "--temperature", "0", *chosen, *FLAGS, *modules]
        assert main(["generate", base, *flags]) == 0
        answers[name] = json.loads(target.read_text())["token_ids"]
    llm = LLM(
        base,
        device="cpu",
        dtype="float32",
        num_threads=1,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=2**23,
        enable_lora=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    for name, request in ((None, None), ("sql", LoRARequest("sql", 1, adapter))):
        pieces = llm.stream({"prompt_token_ids": IDS}, greedy, lora_request=request)
        assert [i for piece in pieces for i in piece.token_ids] == answers[name]
    assert answers[None] != answers["sql"]


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"]], ids=lambda c: c[0])
def test_an_unknown_name_is_refused_before_anything_is_loaded(world, command, capsys):
    base, adapter = world
    modules = ["--enable-lora", "--lora-modules", f"sql={adapter}"]
    name, *rest = command
    assert main([name, base, *rest, "--lora", "poems", *FLAGS, *modules]) == 1
    error = capsys.readouterr().err
    assert "poems" in error and "sql" in error and "Traceback" not in error
