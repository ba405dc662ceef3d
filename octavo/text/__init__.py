"""Text to token ids and back. Never imports torch."""

from octavo.text.detokenizer import IncrementalDetokenizer
from octavo.text.interface import Tokenizer
from octavo.text.no_tokenizer import NoTokenizer
from octavo.text.stop_strings import StopStrings
from octavo.text.tokenizer import load_tokenizer

__all__ = [
    "IncrementalDetokenizer",
    "NoTokenizer",
    "StopStrings",
    "Tokenizer",
    "load_tokenizer",
]
