"""The reference page of all commands and flags, made from the parser: `make docs` writes it."""

import argparse

from octavo.cli import build_parser

HEADER = """\
# Commands and flags

Made by `make docs` from the same dataclasses that the flags and `LLM(...)` keywords come from.
"""


def reference_page() -> str:
    """The page in Markdown."""
    return "\n".join([HEADER, *_tables("octavo", build_parser())])


def _tables(title: str, parser: argparse.ArgumentParser) -> list[str]:
    """A command's own table, and those of the commands below it."""
    tables = [_table(title, parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                tables += _tables(f"{title} {name}", command)
    return tables


def _table(title: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## {title}\n", f"{parser.description}\n", "| flag | meaning |", "|---|---|"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = action.option_strings or [str(action.metavar)]
        flags = ", ".join(f"`{name}`" for name in names)
        values = f" {', '.join(map(str, action.choices))}:" if action.choices else ""
        meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
        lines.append(f"| {flags} |{values} {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference_page(), end="")
