"""The command `octavo`: reads flags, calls the library, prints. Nothing here computes."""

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from octavo import __version__
from octavo.cli import (
    bench,
    chat,
    explain,
    generate,
    inspect,
    keys,
    new_model,
    plan,
    run_batch,
    serve,
    sim,
    trace,
    tune,
    why,
)
from octavo.errors import OctavoError

COMMANDS: dict[str, ModuleType] = {
    "serve": serve,
    "keys": keys,
    "chat": chat,
    "generate": generate,
    "run-batch": run_batch,
    "explain": explain,
    "inspect": inspect,
    "new-model": new_model,
    "plan": plan,
    "why": why,
    "trace": trace,
    "sim": sim,
    "bench": bench,
    "tune": tune,
}


class _Parser(argparse.ArgumentParser):
    """Takes flags by their whole names; one that is unknown is refused with those like it."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Also of a command, which would leave what it does not know to the parser above it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            ours = self._option_string_actions
            flags = [one.split("=")[0] for one in unknown if one.startswith("-")]
            near = (get_close_matches(one, ours, cutoff=0.7) for one in flags)
            alike = dict.fromkeys(name for names in near for name in names)
            hint = f"; like it: {', '.join(alike)}" if alike else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="octavo", description="LLM inference and serving that you can read.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_flags(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Errors of ours are one line, without a traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = COMMANDS[arguments.command].run(arguments)
        return status
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _let_go_of_output()


def _let_go_of_output() -> None:
    """Where nobody reads any more, drop what is left: Python would end with 120 because of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
