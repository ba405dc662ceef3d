"""What is made from the code: the page of commands and flags, and the README's table of models.

`make docs` writes both.
"""

import argparse
import sys
from pathlib import Path

from octavo.cli import build_parser
from octavo.config import architectures
from octavo.config.plugins import OURS

HEADER = """\
# Commands and flags

Made by `make docs` from the same dataclasses that the flags and `LLM(...)` keywords come from.
"""

TABLE_START = "<!-- models: made by make docs -->\n"
TABLE_END = "<!-- end of models -->\n"


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
        meaning = ((action.help or "") % vars(action)).replace("|", "\\|")
        lines.append(f"| {flags} |{values} {meaning} |")
    return "\n".join(lines) + "\n"


def model_table() -> str:
    """A row in Markdown for each architecture that Octavo has a file for, by the family's name."""
    rows = [
        "| models | class | beyond Llama 2 | GGUF | held to transformers by |",
        "|---|---|---|---|---|",
    ]
    ours = [one for one in architectures().values() if one.package == OURS and one.family]
    for one in sorted(ours, key=lambda one: one.family.casefold()):
        gguf, test = "yes" if one.gguf_names else "no", Path(one.parity).name
        link = f"[`{test}`]({one.parity})"
        rows.append(f"| {one.family} | `{one.hf_name}` | {one.features} | {gguf} | {link} |")
    return "\n".join(rows) + "\n"


def with_model_table(readme: str) -> str:
    """The README with the table of today."""
    before, rest = readme.split(TABLE_START)
    _, after = rest.split(TABLE_END)
    return "".join([before, TABLE_START, model_table(), TABLE_END, after])


def main(arguments: list[str]) -> None:
    """Print the reference page; with `--models FILE`, write the table of models into the file."""
    parser = argparse.ArgumentParser(prog="python -m octavo.cli.reference")
    parser.add_argument("--models", type=Path, metavar="FILE")
    readme: Path | None = parser.parse_args(arguments).models
    if readme is None:
        print(reference_page(), end="")
    else:
        readme.write_text(with_model_table(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
