"""What callers of `LLM` write as prompts, and what the engine takes of it. Knows no scheduling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.core import NO_IMAGES, RequestOptions, SeenImages
from octavo.engine.interface import DEFAULT_OPTIONS
from octavo.errors import InvalidImageError, RequestError
from octavo.text import Tokenizer
from octavo.text.content_parts import shows_plain_text
from octavo.vision.parts import pictures_of
from octavo.vision.prompts import ImageReader, images_of

# Text, token ids, or a mapping with "prompt" or "prompt_token_ids", and perhaps "cache_salt" and
# "multi_modal_data".
Prompt = str | Sequence[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the engine takes it, and the text where the user gave one."""

    token_ids: list[int]
    text: str | None = None
    options: RequestOptions = DEFAULT_OPTIONS
    images: SeenImages = NO_IMAGES


class PromptEncoder:
    """Encodes prompts and conversations for one model. `reader` is that of images, if it sees."""

    def __init__(self, tokenizer: Tokenizer, reader: ImageReader | None = None):
        self._tokenizer = tokenizer
        self._reader = reader

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """A text, token ids, or a mapping that says more."""
        if isinstance(prompt, str):
            return EncodedPrompt(self._tokenizer.encode(prompt), prompt)
        if not isinstance(prompt, Mapping):
            return EncodedPrompt(list(prompt))
        options = RequestOptions(cache_salt=prompt.get("cache_salt"))
        images = images_of(prompt.get("multi_modal_data") or {})
        text = None
        if "prompt_token_ids" in prompt:
            token_ids = list(prompt["prompt_token_ids"])
        elif "prompt" in prompt:
            text = str(prompt["prompt"])
            token_ids = self._with_placeholders(text) if images else self._tokenizer.encode(text)
        else:
            raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'", param="prompt")
        return self._with_images(token_ids, images, text=text, options=options)

    def encode_chat(self, messages: Conversation) -> EncodedPrompt:
        """A conversation, whose messages may have images among their parts."""
        if self._reader is None:
            return EncodedPrompt(self._tokenizer.encode_chat(messages))
        as_parts = not shows_plain_text(self._tokenizer)
        turns, images = pictures_of(messages, self._reader, as_parts=as_parts)
        return self._with_images(self._tokenizer.encode_chat(turns), images)

    def _with_images(
        self,
        token_ids: list[int],
        images: Sequence[Any],
        *,
        text: str | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> EncodedPrompt:
        if not images:
            return EncodedPrompt(token_ids, text, options)
        expanded, seen = self._sees().lay_out(token_ids, images)
        return EncodedPrompt(expanded, text, options, seen)

    def _with_placeholders(self, text: str) -> list[int]:
        """A text in which the placeholder's name means the placeholder: there are images for it."""
        placeholder = self._sees().image_token_id
        name = self._tokenizer.token_bytes(placeholder).decode()
        first, *others = text.split(name) if name else [text]
        token_ids = self._tokenizer.encode(first)
        for other in others:
            token_ids.append(placeholder)
            token_ids += self._tokenizer.encode(other, add_special_tokens=False)
        return token_ids

    def _sees(self) -> ImageReader:
        if self._reader is None:
            raise InvalidImageError("this model sees no images: serve one that does")
        return self._reader
