"""Words that must not be generated, as the ids that would spell them."""

from collections.abc import Sequence

from octavo.text.interface import Tokenizer


def banned_sequences(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The ways in which a model would write these words: within a text, and behind a space.

    As vLLM's `bad_words`: what is banned is the last token of a sequence, where those before it
    were generated just now. A word may still come about from other tokens.
    """
    sequences = {
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for word in words
        for text in (word.lstrip(), f" {word.lstrip()}")
        if word.strip()
    }
    return tuple(sorted(sequence for sequence in sequences if sequence))
