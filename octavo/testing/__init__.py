"""Fakes and helpers that tests, simulations and readers share. Ships with the package."""

from octavo.testing.byte_tokenizer import ByteTokenizer
from octavo.testing.fake_engine import FakeEngine, FakeScript

__all__ = ["ByteTokenizer", "FakeEngine", "FakeScript"]
