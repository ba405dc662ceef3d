"""Every bound that the server puts on what a client sends, in one place.

All of them hold before work is queued. Bounds of sampling options (n, stop strings, logprobs) are
in `octavo.core.SamplingParams`, bounds of the vocabulary and the context are the engine's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.server.config import ServerConfig

MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 2**10
MAX_REQUEST_ID_CHARS = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server."""

    max_request_bytes: int
    read_timeout_s: float
    write_timeout_s: float
    max_prompts: int
    max_stored_responses: int
    max_stored_bytes: int = 256 * 2**20  # of responses, as JSON, with the conversations before them
    max_choices: int = 4096  # prompts times n
    max_logit_bias_bytes: int = 64 * 2**10  # as JSON: some 4,000 entries
    max_listed_token_ids: int = 2**18  # in stop_token_ids and allowed_token_ids
    max_chars_per_token: int = 16  # a text longer than this times the context cannot fit it
    max_inline_chars: int = 8192  # longer texts are tokenized off the event loop
    max_unread_deltas: int = 1024  # for each HTTP request; more wait in the engine
    max_inspected_bytes: int = 64 * 2**10  # longer bodies are not searched for unknown fields
    max_tools: int = 128
    max_tools_bytes: int = 256 * 2**10  # as JSON, all together
    tool_name_pattern: str = "[a-zA-Z0-9_-]{1,64}"
    max_tool_calls: int = 128  # in one message of the conversation
    max_template_kwargs_bytes: int = 64 * 2**10  # as JSON
    max_images: int = 16  # in one conversation
    max_image_pixels: int = 2**26  # of all of them together: 192 MiB decoded
    max_videos: int = 2  # in one conversation
    allowed_media_domains: tuple[str, ...] = ()  # hosts that images are fetched from
    media_timeout_s: float = 10.0  # for all images and videos of a request to be fetched
    max_json_depth: int = 32  # of schemas of tools, arguments of calls, chat_template_kwargs

    @classmethod
    def of(cls, config: ServerConfig) -> "Limits":
        """The operator's bounds, and our own for the rest."""
        return cls(
            max_request_bytes=config.max_request_bytes,
            read_timeout_s=config.read_timeout_s,
            write_timeout_s=config.write_timeout_s,
            max_prompts=config.max_prompts,
            max_stored_responses=config.max_stored_responses,
            allowed_media_domains=config.allowed_media_domains,
            media_timeout_s=config.media_timeout_s,
        )

    def max_prompt_chars(self, max_model_len: int) -> int:
        """Texts beyond this are refused without tokenizing them."""
        return self.max_chars_per_token * max_model_len + 1024

    def is_too_deep(self, value: object) -> bool:
        """Whether data that came as JSON is nested beyond what anybody needs."""
        level = [value]
        for _ in range(self.max_json_depth + 1):
            level = [child for item in level for child in _children(item)]
        return bool(level)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
