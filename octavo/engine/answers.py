"""From engine events (token ids) to answers (text). Runs in the caller's process, on a CPU.

Knows detokenization and stop strings; nothing of scheduling, sockets or HTTP.
"""

import hashlib
import secrets
from collections.abc import Iterator

import msgspec

from octavo.core import (
    FinishReason,
    ModelTasks,
    PoolingParams,
    Request,
    RequestEvent,
    SamplingParams,
    check_prompt,
    check_sampling_ids,
    resolve_max_tokens,
)
from octavo.engine.interface import DEFAULT_TASKS, TextDelta
from octavo.errors import RequestError
from octavo.text import IncrementalDetokenizer, NoTokenizer, StopStrings, Tokenizer
from octavo.text.bad_words import banned_sequences


def fan_out(request: Request) -> Iterator[Request]:
    """The engine requests behind one user request; each has an id and a seed of its own.

    The first `n` are the answers; a beam search has one for each beam, the best answers first.
    Answer 0 uses the user's seed, so that `n` does not change it. Where the user gave none, one is
    drawn here, so that a request that is computed again after preemption draws the same tokens.
    It alone has the prompt scored and brings the pictures, for they are the same for all of them.
    """
    sampling = request.sampling
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    of_others = sampling
    if sampling.prompt_logprobs is not None:
        of_others = msgspec.structs.replace(sampling, prompt_logprobs=None)
    places_alone = msgspec.structs.replace(request.images, pictures=())
    for index in range(sampling.num_sequences):
        yield msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}#{index}",
            sampling=of_others if index else sampling,
            seed=seed if index == 0 else _derived_seed(seed, index),
            images=places_alone if index else request.images,
        )


def _derived_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_request(
    prompt_token_ids: list[int],
    sampling: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    has_text: bool = True,
    tasks: ModelTasks = DEFAULT_TASKS,
    pooling: PoolingParams | None = None,
) -> None:
    """Refuse what could never run, before anything is queued; raises `RequestError`."""
    tasks.check(pooling)
    if sampling.stop_strings and not has_text:
        raise RequestError(
            "stop strings need a tokenizer, and none is loaded (skip_tokenizer_init); "
            "stop_token_ids work without",
            param="stop",
        )
    for name in ("structured_outputs", "bad_words"):
        if getattr(sampling, name) and not has_text:
            raise RequestError(
                f"{name} needs a tokenizer, and none is loaded (skip_tokenizer_init)", param=name
            )
    has_types = pooling is not None and pooling.uses_head
    num_types = tasks.num_token_types if has_types else 1
    check_prompt(prompt_token_ids, vocab_size=num_types * vocab_size)
    check_sampling_ids(sampling, vocab_size=vocab_size)
    resolve_max_tokens(len(prompt_token_ids), sampling.max_tokens, max_model_len)


def banned_by(
    sampling: SamplingParams, tokenizer: Tokenizer, *, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """What `bad_words` bans, as token ids that the model has."""
    if not sampling.bad_words:
        return ()
    sequences = banned_sequences(sampling.bad_words, tokenizer)
    return tuple(ids for ids in sequences if max(ids) < vocab_size)


def check_shape(sampling: SamplingParams, eos_token_ids: tuple[int, ...]) -> None:
    """Refuse an answer's shape that no grammar can be made of. May take a second."""
    if sampling.structured_outputs is None:
        return
    if not eos_token_ids:
        raise RequestError(
            "the shape of an answer needs an end-of-sequence token, and this model has none",
            param="structured_outputs",
        )
    from octavo.text.grammar import check_grammar  # its library is needed by nothing else

    check_grammar(sampling.structured_outputs)


class Answer:
    """One answer while it grows. Sole writer: whoever feeds it the request's events."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer):
        sampling = request.sampling
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._eos_token_ids = request.eos_token_ids
        self._keeps_stop = sampling.include_stop_str_in_output
        self._stops = StopStrings(sampling.stop_strings, include=self._keeps_stop)
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
            if sampling.detokenize and not isinstance(tokenizer, NoTokenizer)
            else None
        )

    def update(self, event: RequestEvent) -> TextDelta:
        """Take the next event; return what it adds.

        A stop string ends the answer here, before the engine knows of it: the caller then aborts
        the request, and passes on no more events.
        """
        finish_reason = event.finish_reason
        stop_reason: str | int | None = None
        visible = event.token_ids
        if finish_reason is FinishReason.STOP and visible:
            last = event.token_ids[-1]
            stop_reason = None if last in self._eos_token_ids else last
            visible = event.token_ids if self._keeps_stop else event.token_ids[:-1]
        text, stop_string = self._text_of(visible, final=finish_reason is not None)
        if stop_string is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop_string
        self.finish_reason = finish_reason
        return TextDelta(
            self.index,
            text,
            event.token_ids,
            event.logprobs,
            finish_reason,
            stop_reason,
            event.error,
            event.error_code,
            event.prompt_logprobs,
            event.vector,
            event.num_cached_tokens,
            event.queue_time_s,
            event.prefill_time_s,
        )

    def _text_of(self, token_ids: tuple[int, ...], *, final: bool) -> tuple[str, str | None]:
        """New text that is safe to show, and the stop string that it ran into."""
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.push(token_ids)
        if final:
            text += self._detokenizer.flush()
        shown, matched = self._stops.feed(text)
        if final and matched is None:
            shown += self._stops.flush()
        return shown, matched
