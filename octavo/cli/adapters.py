"""`--lora NAME`: which of `--lora-modules` answers in commands that run the engine themselves."""

import argparse
from typing import TYPE_CHECKING

from octavo.cli.flags import engine_options
from octavo.config.lora import parse_modules
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine import LoRARequest


def add_adapter_flag(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument(
        "--lora",
        metavar="NAME",
        help="the adapter that answers, one of --lora-modules; default: the model itself",
    )


def chosen_adapter(arguments: argparse.Namespace) -> "LoRARequest | None":
    """What `LLM` takes as `lora_request`.

    Raises:
        ConfigError: there is no adapter of that name.
    """
    if arguments.lora is None:
        return None
    from octavo.engine import LoRARequest

    modules = parse_modules(engine_options(arguments).lora.lora_modules)
    for number, (name, path) in enumerate(modules, start=1):
        if name == arguments.lora:
            return LoRARequest(name, number, path)
    names = ", ".join(name for name, _ in modules) or "none"
    raise ConfigError(
        f"--lora {arguments.lora}: no such adapter; --lora-modules name=directory has {names}"
    )
