"""One case, played as a user would: from `locate` to weights in a model, and to text in and out.

Owns the promises. A damaged checkpoint either works or is refused by an error of ours, which names
the file, fits into a line or two and was cheap to come by. What kills or stops the process is for
`pool` to see.
"""

import re
import resource
import shutil
import traceback
from pathlib import Path

from fuzz.bases import GGUF_FILE
from fuzz.cases import Case

from octavo.config import (
    CacheOptions,
    Checkpoint,
    DeviceFacts,
    DeviceOptions,
    EngineOptions,
    locate,
    read_model_config,
    resolve,
)
from octavo.engine.build import load_model
from octavo.errors import ConfigError, ModelError, RequestError
from octavo.text import load_tokenizer

MAX_MESSAGE_CHARS = 1000
MAX_GROWTH_BYTES = 1280 * 2**20  # most of it by the tokenizers library, for the longest text
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
TEXTS = (
    "hello world",
    " a  b\n12 <|im_end|> é🙂",
    "",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!" * 3,
    "\0\ufdd0",
)
MESSAGES = (
    {"role": "system", "content": "be <|im_end|> kind"},
    {"role": "user", "content": "hello"},
)
FACTS = DeviceFacts("cpu", "CPU", 1, 2**33, 2**34)


class BrokenPromise(Exception):
    """What a case did and should not have done."""


def play(case: Case, folder: Path) -> str:
    """Write the case's files into `folder`, use them, and say how it ended in a few words.

    Raises:
        BrokenPromise: not as it should have.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = case.files
    for name, data in files.items():
        (folder / name).write_bytes(data)
    before = peak_bytes()
    try:
        outcome = _use(folder / GGUF_FILE if GGUF_FILE in files else folder, case.stages)
    except ModelError as error:
        outcome = _refusal(error, folder)
    except ConfigError as error:
        outcome = _short_enough(error)
    except BrokenPromise:
        raise
    # PyO3's panics are no Exceptions.
    except BaseException as error:
        lines = "".join(traceback.format_exception(error, limit=-6))[-4000:]
        raise BrokenPromise(f"{type(error).__name__} escaped\n{lines}") from error
    growth = peak_bytes() - before
    if growth > MAX_GROWTH_BYTES:
        raise BrokenPromise(f"took {growth // 2**20} MiB")
    return outcome


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _use(path: Path, stages: tuple[str, ...]) -> str:
    checkpoint = locate(str(path))
    if "load" in stages:
        options = EngineOptions(
            model=str(path),
            cache=CacheOptions(kv_cache_memory_bytes=2**22),
            device=DeviceOptions(device="cpu"),
        )
        config = resolve(options, read_model_config(checkpoint), FACTS)
        load_model(checkpoint, config)
    return _talk(checkpoint, path) if "text" in stages else "loaded"


def _talk(checkpoint: Checkpoint, path: Path) -> str:
    tokenizer = load_tokenizer(checkpoint)
    refused = set()
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids[:100])
        except RequestError as error:
            refused.add(_refused_request(error, path))
    try:
        tokenizer.encode_chat(MESSAGES)
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    except RequestError as error:
        refused.add(_refused_request(error, path))
    return f"worked, but {sorted(refused)[0]}" if refused else "worked"


def _refusal(error: ModelError, folder: Path) -> str:
    if str(folder) not in str(error):
        raise BrokenPromise(f"the error names no file: {error}")
    return _short_enough(error)


def _refused_request(error: RequestError, path: Path) -> str:
    """Clients see these: nothing of the machine may be in them."""
    if str(path) in str(error) or ADDRESS.search(str(error)):
        raise BrokenPromise(f"the error tells a client too much: {error}")
    return _short_enough(error)


def _short_enough(error: Exception) -> str:
    text = str(error)
    if len(text) > MAX_MESSAGE_CHARS or "Traceback" in text:
        raise BrokenPromise(f"the error has {len(text)} characters: {text[:500]}...")
    return f"{type(error).__name__}: {text}"
