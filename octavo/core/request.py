"""A request as the engine knows it: token ids in, token ids out. Knows no text and no tensors."""

import enum
import struct
from collections.abc import Sequence as SequenceOf

import msgspec

from octavo.core.adapters import Adapter
from octavo.core.images import NO_IMAGES, SeenImages
from octavo.core.pooling import PoolingParams
from octavo.core.sampling import SamplingParams
from octavo.errors import ContextLengthError, RequestError

MAX_SALT_CHARS = 256
MAX_PRIORITY = 2**31
MAX_DEADLINE_MS = 2**31

NO_TOKENS = SamplingParams(max_tokens=0, detokenize=False)


class FinishReason(enum.StrEnum):
    """Why a request ended. The values are those of the OpenAI API, plus `abort` and `error`."""

    STOP = "stop"  # end-of-sequence, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # this request failed; its event carries the reason


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a request wants to be treated, besides how its tokens are drawn.

    cache_salt: requests with different salts never share cached prefixes; a secret of one tenant
        hides from the others what it asked (arXiv 2411.18191 measures the leak).
    priority: lower goes first under the policy "priority".
    tenant: whose share of the engine this uses under the policy "fair".
    deadline_ms: the first token is wanted within this time of arrival; the policy "deadline" serves
        the nearest first, a request that cannot make it is refused at once, and one that has not
        begun by then ends with `FailureCode.DEADLINE_EXCEEDED`.
    adapter: whose low-rank products are added to the model's own; None: nobody's.
    """

    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""
    deadline_ms: int | None = None
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        salt = self.cache_salt
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_CHARS):
            raise RequestError(
                f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters",
                param="cache_salt",
            )
        if not isinstance(self.priority, int) or not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be an integer in -{MAX_PRIORITY}..{MAX_PRIORITY}", param="priority"
            )
        deadline = self.deadline_ms
        if deadline is not None and not (
            isinstance(deadline, int) and 0 < deadline <= MAX_DEADLINE_MS
        ):
            raise RequestError(
                f"deadline_ms must be an integer in 1..{MAX_DEADLINE_MS}", param="deadline_ms"
            )


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. Built once by the front end and never changed.

    `seed` is what draws are made from; `SamplingParams.seed` is only what the user asked for. With
    `pooling` the prompt becomes a vector; nothing is generated, and `sampling` is `NO_TOKENS`.
    Of all the answers to one prompt the first alone brings the pictures.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    options: RequestOptions = RequestOptions()
    banned: tuple[tuple[int, ...], ...] = ()  # of `sampling.bad_words`
    pooling: PoolingParams | None = None
    images: SeenImages = NO_IMAGES

    @property
    def cache_extras(self) -> tuple[str, ...]:
        """What a prefix's KV depends on besides its tokens, or must be kept apart by."""
        salt, adapter = self.options.cache_salt, self.options.adapter
        of_salt = () if salt is None else ("salt", salt)
        return of_salt if adapter is None else (*of_salt, "adapter", adapter.digest)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end this request."""
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.sampling.stop_token_ids or ())


def check_prompt(token_ids: SequenceOf[int], *, vocab_size: int) -> None:
    """Refuse prompts that are empty or hold ids outside the vocabulary.

    Raises:
        RequestError: the prompt is empty, or an id is no integer in 0..vocab_size-1.
    """
    if not token_ids:
        raise RequestError("the prompt is empty", param="prompt")
    if _all_below(vocab_size, token_ids):
        return
    for token_id in token_ids:
        if not isinstance(token_id, int):
            raise RequestError("prompt token ids must be integers", param="prompt")
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary of {vocab_size}", param="prompt"
            )


def _all_below(limit: int, numbers: SequenceOf[int]) -> bool:
    """Whether these are integers from 0 to limit - 1.

    Two passes in C: in a batch of long prompts a loop would hold the device up.
    """
    try:
        struct.pack(f"{len(numbers)}I", *numbers)
    except struct.error:
        return False
    return max(numbers) < limit


def check_sampling_ids(sampling: SamplingParams, *, vocab_size: int) -> None:
    """Refuse sampling options that name token ids outside the vocabulary."""
    tables: dict[str, SequenceOf[int]] = {
        "stop_token_ids": sampling.stop_token_ids or (),
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logit_bias": list(sampling.logit_bias or ()),
    }
    for name, ids in tables.items():
        for token_id in ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}, outside the vocabulary of {vocab_size}",
                    param=name,
                )


def resolve_max_tokens(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """The number of tokens a request may generate.

    None means "as many as fit". An explicit number must fit: nothing is cut silently. With 0 the
    prompt may fill the context.

    Raises:
        ContextLengthError: prompt, or prompt and `max_tokens`, exceed the context.
    """
    room = max_model_len - num_prompt_tokens
    if room < min(1, 1 if max_tokens is None else max_tokens):
        new = "" if max_tokens == 0 else ", which must hold the prompt and at least one new token"
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, but this model's maximum context length is"
            f" {max_model_len} tokens{new}",
            param="prompt",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}: together "
            f"{num_prompt_tokens + max_tokens}, but this model's maximum context length is "
            f"{max_model_len} tokens",
            param="max_tokens",
        )
    return max_tokens
