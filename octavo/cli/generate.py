"""`octavo generate`: complete one prompt, or a file of them."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from octavo.cli.adapters import add_adapter_flag, chosen_adapter
from octavo.cli.flags import (
    SAMPLING_NAMES,
    add_engine_flags,
    add_sampling_flags,
    engine_values,
    sampling_params,
    sampling_values,
)
from octavo.core import SamplingParams
from octavo.errors import ConfigError, RequestError

HELP = "complete a prompt, or every prompt of a JSON-lines file"
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the text to go on from")
    source.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines, each with 'prompt', 'messages' or 'prompt_token_ids', and sampling "
        "options that replace the flags'",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON lines, one for each of the input's"
    )
    add_sampling_flags(parser, several=True, max_tokens=256)
    add_adapter_flag(parser)
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Complete and print or write."""
    if (arguments.input is None) != (arguments.output is None):
        raise ConfigError("--input and --output go together; for one prompt use --prompt")
    if arguments.input is not None:
        return _run_file(arguments)
    sampling, adapter = sampling_params(arguments), chosen_adapter(arguments)
    llm = _load(arguments)
    if sampling.n > 1:
        [output] = llm.generate(arguments.prompt, sampling, use_tqdm=False, lora_request=adapter)
        for answer in output.outputs:
            print(f"[{answer.index}]{answer.text}")
        return 0
    for delta in llm.stream(arguments.prompt, sampling, lora_request=adapter):
        print(delta.text, end="", flush=True)
    print()
    return 0


def _run_file(arguments: argparse.Namespace) -> int:
    lines = read_lines(arguments.input)
    sampling = [_line_sampling(line, number, arguments) for number, line in lines]
    adapter = chosen_adapter(arguments)
    llm = _load(arguments)
    prompts = [_as_prompt(llm, line, number) for number, line in lines]
    outputs = llm.generate(prompts, sampling, lora_request=adapter)
    with arguments.output.open("w", encoding="utf-8") as file:
        for (_, line), output in zip(lines, outputs, strict=True):
            for answer in output.outputs:
                result = {
                    "text": answer.text,
                    "token_ids": answer.token_ids,
                    "finish_reason": answer.finish_reason,
                    "num_prompt_tokens": len(output.prompt_token_ids),
                }
                if len(output.outputs) > 1:
                    result["index"] = answer.index
                file.write(json.dumps(line | result, ensure_ascii=False) + "\n")
    print(f"{len(outputs)} answers written to {arguments.output}", file=sys.stderr)
    return 0


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over.

    Raises:
        ConfigError: the file cannot be read, or a line is not an object with one kind of prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    lines = []
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(line, dict) or sum(key in line for key in PROMPT_KEYS) != 1:
            raise ConfigError(
                f"{path}, line {number}: each line must be an object with one of "
                + ", ".join(PROMPT_KEYS)
            )
        lines.append((number, line))
    if not lines:
        raise ConfigError(f"{path} holds no prompts")
    return lines


def _line_sampling(
    line: dict[str, Any], number: int, arguments: argparse.Namespace
) -> SamplingParams:
    own = {name: line[name] for name in SAMPLING_NAMES if name in line}
    try:
        return SamplingParams(**(sampling_values(arguments) | own))
    except RequestError as error:
        raise ConfigError(f"line {number}: {error}") from error


def _as_prompt(llm: Any, line: dict[str, Any], number: int) -> dict[str, list[int]]:
    try:
        if "prompt_token_ids" in line:
            return {"prompt_token_ids": line["prompt_token_ids"]}
        tokenizer = llm.get_tokenizer()
        if "messages" in line:
            return {"prompt_token_ids": tokenizer.encode_chat(line["messages"])}
        return {"prompt_token_ids": tokenizer.encode(line["prompt"])}
    except (RequestError, TypeError) as error:
        raise ConfigError(f"line {number}: {error}") from error


def _load(arguments: argparse.Namespace) -> Any:
    from octavo.engine import LLM

    return LLM(arguments.model, **engine_values(arguments))
