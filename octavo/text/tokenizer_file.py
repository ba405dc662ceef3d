"""`tokenizer.json` to a tokenizer of the `tokenizers` library, which trusts its files.

Owns what the library leaves to chance: it panics on some damage, and a chain of replacements may
make a short text endless. Knows nothing of special tokens and templates.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from octavo.config import excerpt
from octavo.errors import CheckpointError

MAX_TOKENIZER_BYTES = 128 * 2**20  # the largest real ones have 35 MiB
# How much longer a text may get on its way to the tokens. Real chains of replacements keep the
# length, or write a word for a character.
MAX_GROWTH = 256
NORMALIZER = re.compile(r'"normalizer"\s*:\s*\{')
ESCAPED_ASCII = re.compile(r"\\u00[2-7]")
MAX_TEMPLATE_PIECES = 64  # of what is put around a text


def read_tokenizer_file(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a `tokenizer.json`, without the truncation and padding of its training.

    Raises:
        CheckpointError: it is no tokenizer, or one that no sound checkpoint has.
    """
    try:
        num_bytes = file.stat().st_size
        if num_bytes > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{file} is larger than {MAX_TOKENIZER_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        for part in _normalizers(text):
            _check_growth(part, file)
        library = tokenizers.Tokenizer.from_str(text)
        library.no_truncation()
        library.no_padding()
        for other in (library.decoder, library.post_processor):
            if other is not None:
                _check_growth(json.loads(other.__getstate__()), file)
    except BaseException as error:
        if isinstance(error, CheckpointError) or not is_failure(error):
            raise
        raise CheckpointError(f"{file} is no tokenizer: {excerpt(error)}") from error
    return library


def is_failure(error: BaseException) -> bool:
    """Whether the library failed, by an error or by a panic, which is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _normalizers(text: str) -> Iterator[dict[str, Any]]:
    """What stands in the file as its normalizer: the library runs it while it loads the file.

    The file is not parsed for it, which would take longer than all the rest of loading.
    """
    if ESCAPED_ASCII.search(text):  # which nobody writes, but to hide a key
        text = json.dumps(json.loads(text))
    for match in NORMALIZER.finditer(text):
        part, _ = json.JSONDecoder().raw_decode(text, match.end() - 1)
        yield part


def _check_growth(part: dict[str, Any], file: Path) -> None:
    growth = 1
    for step in _steps(part):
        pattern = step.get("pattern")
        written = len(str(step.get("content") or step.get("prepend") or ""))
        if isinstance(pattern, dict):
            # What a regular expression finds may be empty: then it is written at every character.
            found = len(pattern.get("String") or "")
            growth *= max(1, -(-written // found)) if found else written + 1
        elif step.get("type") == "Prepend":
            growth *= max(1, written)
        if growth > MAX_GROWTH:
            raise CheckpointError(f"{file} makes every text more than {MAX_GROWTH} times longer")
        for template in (step.get("single"), step.get("pair")):
            if isinstance(template, list) and len(template) > MAX_TEMPLATE_PIECES:
                raise CheckpointError(
                    f"{file} puts {len(template)} pieces around a text; at most "
                    f"{MAX_TEMPLATE_PIECES} are read"
                )


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, taken apart into what it does one after the other."""
    inner = [part[key] for key in ("normalizers", "decoders", "processors") if key in part]
    if not inner:
        yield part
    for steps in inner:
        for step in steps:
            yield from _steps(step)
