"""Granite for Octavo: what the entry point in `pyproject.toml` names. Needs no torch."""

from octavo.config import Architecture

from octavo_granite.config import read_granite

ARCHITECTURE = Architecture(
    "granite",
    "GraniteForCausalLM",
    "granite",
    read_granite,
    "octavo_granite.model:Granite",
)
