"""One tiny model for all, and one server for the faults that a server must survive."""

import inspect
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from faults import plant
from faults.aftermath import golden, is_watched, play_until_it_adds_nothing, unharmed
from faults.processes import PROMPT, Server, serving
from faults.refused import CHAT, COMPLETIONS, REFUSED, ask, field
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from octavo.testing.tiny_llama import write_tiny_llama

__all__ = ["golden"]

NUM_GOLDEN_TOKENS = 8  # that `Server.complete` asks for
LONG_NAME = "tiny" * 2**11  # in every frame of who asks for it: so no buffer holds a whole stream
HEADERS = {"authorization": "Bearer the-key"}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Play a fault again where it left more memory than it may: a leak adds to every bout."""
    given = pyfuncitem.funcargs
    server, fault = given.get("server"), given.get("fault")
    if not is_watched(server):
        return None
    arguments = {name: given[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    def play() -> None:
        pyfuncitem.obj(**arguments)
        if isinstance(fault, Path):
            fault.unlink(missing_ok=True)

    play_until_it_adds_nothing(server, play)
    return True


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def expected(model: Path) -> list[int]:
    """What the model says to the known prompt, as transformers computes it."""
    reference = LlamaForCausalLM.from_pretrained(model)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROMPT).ids
    num_prompt_tokens = len(ids)
    with torch.inference_mode():
        for _ in range(NUM_GOLDEN_TOKENS):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[num_prompt_tokens:]


@pytest.fixture(scope="session")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written there happens to the survivor's processes, see `plant`."""
    return tmp_path_factory.mktemp("planted") / "fault"


@pytest.fixture(scope="session")
def survivor(model: Path, fault: Path) -> Iterator[Server]:
    """A server with a watchdog that only tells; in short supply of everything."""
    flags = ["--watchdog-timeout-s", "4", "--watchdog-action", "log", "--api-key", "the-key"]
    flags += ["--max-num-seqs", "4", "--max-num-queued-reqs", "4", "--tool-call-parser", "hermes"]
    flags += ["--read-timeout-s", "1", "--write-timeout-s", "1"]
    flags += ["--served-model-name", LONG_NAME]
    # Blocks are in RAM from their first use on: few enough for the warm-up to use them all.
    flags += ["--kv-cache-memory-bytes", str(2**21)]
    environment = plant.environment(fault.parent, fault)
    with serving(model, *flags, environment=environment, headers=HEADERS) as server:
        warm_up(server)
        yield server


def warm_up(server: Server) -> None:
    """All that is imported, compiled or started when it is first used; memory is flat after it."""
    for _ in range(2):
        for row in REFUSED.values():
            ask(server, row)
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    shapes = [field(structured_outputs={"regex": f"[ab]{{1,{i}}}"}) for i in range(1, 20)]
    long = [field(prompt=[i] * 16, n=4, max_tokens=490, ignore_eos=True) for i in range(4)]
    bodies = [(COMPLETIONS, body) for body in shapes + long]
    bodies += [(CHAT, json.dumps(chat).encode())] * 20 + [(COMPLETIONS, field(n=4))] * 40
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda body: ask(server, (*body, 0, None, None)), bodies))


@pytest.fixture
def server(survivor: Server, fault: Path, expected: list[int]) -> Iterator[Server]:
    """The survivor; after the test it must be what it was before."""
    with unharmed(survivor, expected):
        yield survivor
        fault.unlink(missing_ok=True)
