"""Packages with architectures of their own, really installed: the example, and what
`octavo new-model` writes. Their own tests run, and the server takes their models as any other.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch

import octavo
from octavo.cli import main
from octavo.testing.parity import (
    CHECKS,
    Parity,
    check_tokens_and_likelihoods,
    write_checkpoint,
)
from octavo.testing.tiny_models import TINY_MODELS

pytestmark = pytest.mark.server

ROOT = Path(octavo.__file__).parents[1]
EXAMPLE = ROOT / "examples" / "octavo-granite"
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
NUM_TOKENS = 12


def run(*command, site, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=environment(site),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def environment(site):
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [site, ROOT]))}


def install(source, site):
    """By pip, without a network."""
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = run("pip", "install", *flags, "--target", site, source, site=site)
    assert done.returncode == 0, done.stderr


def pytest_of(package, site, *flags):
    quiet = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    done = run("pytest", *quiet, *flags, site=site, cwd=package)
    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(a copy of the example's sources, the directory that it is installed in)"""
    folder = tmp_path_factory.mktemp("example")
    for path in EXAMPLE.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".toml", ".md"):
            target = folder / "source" / path.relative_to(EXAMPLE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    install(folder / "source", folder / "site")
    return folder / "source", folder / "site"


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """(a checkpoint of Granite's, transformers' model)"""
    directory = tmp_path_factory.mktemp("models") / "granite"
    return directory, write_checkpoint(directory, "granite", TINY_MODELS["llama"] | MULTIPLIERS)


def test_the_examples_own_tests_pass(example):
    source, site = example
    assert pytest_of(source, site) > 20


@torch.inference_mode()
def test_the_server_takes_an_examples_model(example, granite):
    model, reference = granite
    prompt = [(31 * i + 5) % 301 for i in range(40)]
    flags = ["--port", "0", "--kv-cache-memory-bytes", str(2**22), "--model-impl", "octavo"]
    server = subprocess.Popen(
        [sys.executable, "-m", "octavo.cli", "serve", str(model), *flags],
        env=environment(example[1]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(server.stdout.readline, "")
        found = (re.search(r"Listening on (http://127\.0\.0\.1:\d+)", line) for line in lines)
        url = next(match[1] for match in found if match)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="granite",
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            answer = [i for chunk in stream for choice in chunk.choices for i in choice.token_ids]
        logits = reference(torch.tensor([prompt + answer])).logits[0, -NUM_TOKENS - 1 : -1]
        assert answer == logits.argmax(-1).tolist() and len(set(answer)) > 3
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.stdout.close()


def test_inspect_names_the_package(example, granite):
    shown = run("octavo.cli", "inspect", granite[0], site=example[1])
    assert shown.returncode == 0, shown.stderr
    assert "run by octavo_granite.model:Granite of the package octavo-granite" in shown.stdout


def test_without_the_package_the_model_is_refused(granite, capsys):
    assert main(["plan", str(granite[0]), "--model-impl", "octavo", "--device", "cpu-64gib"]) == 1
    assert "'GraniteForCausalLM' is not supported" in capsys.readouterr().err


def test_what_new_model_writes_passes_its_own_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", "mine"]) == 0
    assert "pip install --no-deps -e octavo-mine" in capsys.readouterr().out
    tests = ["octavo-mine/tests"]
    families = ["gemma2", "gpt2", "phi3"]
    for like in families:
        assert main(["new-model", f"my_{like}", "--like", like, "--out", like]) == 0
        file = f"{like}/tests/test_parity.py"
        tests.append(f"{file}::test_it_is_installed")
        tests.append(
            f"{file}::test_it_answers_as_transformers_does[plain-check_tokens_and_likelihoods]"
        )
    for folder in ("octavo-mine", *families):
        install(tmp_path / folder, tmp_path / "site")
    # Of the first all checks, and that it is installed.
    num_tests = len(CHECKS) + 1 + 2 * len(families)
    assert pytest_of(tmp_path, tmp_path / "site", "--import-mode=importlib", *tests) == num_tests


def test_a_model_that_computes_something_else_fails_these_checks(tmp_path):
    parity = Parity(tmp_path, write_checkpoint(tmp_path, "llama", TINY_MODELS["llama"]))
    check_tokens_and_likelihoods(parity)
    with torch.no_grad():
        parity.reference.lm_head.weight.mul_(1.001)
    with pytest.raises(AssertionError, match="not close"):
        check_tokens_and_likelihoods(parity)
    with torch.no_grad():
        parity.reference.lm_head.weight.mul_(-1)
    with pytest.raises(AssertionError, match="tokens: .* but transformers"):
        check_tokens_and_likelihoods(parity)
