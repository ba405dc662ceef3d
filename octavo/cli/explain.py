"""`octavo explain`: every resolved value and where it came from, without loading weights."""

import argparse

from octavo.cli.flags import add_engine_flags, engine_options
from octavo.config import ModelConfig, Setting, locate, resolve

HELP = "print every setting of an engine, its value, and where the value comes from"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from octavo.runner import device_facts  # imports torch, which only sees the devices here

    options = engine_options(arguments)
    checkpoint = locate(options.model)
    facts = device_facts(options.device.device)
    config = resolve(options, ModelConfig.from_checkpoint(checkpoint), facts)
    print(f"{checkpoint.name} on {facts.name}\n")
    print(as_table(config.settings))
    return 0


def as_table(settings: tuple[Setting, ...]) -> str:
    """Aligned columns: name, value, source, reason."""
    rows = [("setting", "value", "source", "why")]
    rows += [(s.name, str(s.value), s.source, s.why) for s in settings]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
        ).rstrip()
        for row in rows
    )
