"""What callers of `LLM` write as prompts, and what the engine takes of it. Knows no scheduling."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from octavo.core import NO_IMAGES, Adapter, RequestOptions, SeenImages
from octavo.engine.interface import DEFAULT_OPTIONS
from octavo.errors import InvalidImageError, RequestError
from octavo.text import Tokenizer
from octavo.text.content_parts import shows_plain_text
from octavo.vision.parts import pictures_of
from octavo.vision.prompts import ImageReader, shown_in
from octavo.vision.videos import Video

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

    def through(self, adapter: Adapter | None) -> "EncodedPrompt":
        """The same, for an adapter."""
        if adapter is None:
            return self
        return replace(self, options=structs.replace(self.options, adapter=adapter))


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
        data = prompt.get("multi_modal_data")
        shown = shown_in(data, self._sees()) if data else ([], [])
        text = None
        if "prompt_token_ids" in prompt:
            token_ids = list(prompt["prompt_token_ids"])
        elif "prompt" in prompt:
            text = str(prompt["prompt"])
            token_ids = (
                self._with_placeholders(text) if any(shown) else self._tokenizer.encode(text)
            )
        else:
            raise RequestError("a prompt needs 'prompt' or 'prompt_token_ids'", param="prompt")
        return self._with_images(token_ids, *shown, text=text, options=options)

    def encode_chat(self, messages: Conversation) -> EncodedPrompt:
        """A conversation, whose messages may have images among their parts."""
        if self._reader is None:
            return EncodedPrompt(self._tokenizer.encode_chat(messages))
        as_parts = not shows_plain_text(self._tokenizer)
        turns, images, videos = pictures_of(messages, self._reader, as_parts=as_parts)
        return self._with_images(self._tokenizer.encode_chat(turns), images, videos)

    def _with_images(
        self,
        token_ids: list[int],
        images: Sequence[Any],
        videos: Sequence[Video],
        *,
        text: str | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> EncodedPrompt:
        if not images and not videos:
            return EncodedPrompt(token_ids, text, options)
        expanded, seen = self._sees().lay_out(token_ids, images, videos)
        return EncodedPrompt(expanded, text, options, seen)

    def _with_placeholders(self, text: str) -> list[int]:
        """A text in which a placeholder's name means the placeholder: something is shown there."""
        reader, token_bytes = self._sees(), self._tokenizer.token_bytes
        known = (i for i in (reader.image_token_id, reader.video_token_id) if i is not None)
        by_name = {name: i for i in known if (name := token_bytes(i).decode())}
        names = "|".join(map(re.escape, by_name))
        # With a group in it, the names are among the pieces: text, name, text, name, ..., text.
        first, *others = re.split(f"({names})", text) if names else [text]
        token_ids = self._tokenizer.encode(first)
        for name, other in zip(others[::2], others[1::2], strict=True):
            token_ids.append(by_name[name])
            token_ids += self._tokenizer.encode(other, add_special_tokens=False)
        return token_ids

    def _sees(self) -> ImageReader:
        if self._reader is None:
            raise InvalidImageError("this model sees no images: serve one that does")
        return self._reader
