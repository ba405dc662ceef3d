"""Grammars that nobody has asked for cost nothing: no library and no vocabulary is read."""

from functools import cached_property, partial
from typing import TYPE_CHECKING

from octavo.config import Checkpoint, ResolvedConfig
from octavo.core import Matcher, StructuredOutputsParams
from octavo.text import load_tokenizer

if TYPE_CHECKING:
    from octavo.text.grammar import TokenGrammars


class LazyGrammars:
    """`TokenGrammars` of a checkpoint, made when the first grammar is wanted."""

    def __init__(self, checkpoint: Checkpoint, config: ResolvedConfig):
        self._checkpoint = checkpoint
        self._model = config.model

    def is_ready(self, params: StructuredOutputsParams) -> bool:
        """As Grammars."""
        return self._grammars.is_ready(params)

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """As Grammars."""
        return self._grammars.matcher(params)

    def close(self) -> None:
        """End the threads, if there are any."""
        if "_grammars" in self.__dict__:
            self._grammars.close()

    @cached_property
    def _grammars(self) -> "TokenGrammars":
        from octavo.text.grammar import TokenGrammars

        return TokenGrammars(
            partial(load_tokenizer, self._checkpoint),
            eos_token_ids=self._model.eos_token_ids,
            vocab_size=self._model.vocab_size,
        )
