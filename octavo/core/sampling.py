"""How a request wants its tokens drawn. Owns validation of every field; knows no tensors.

Names and meanings follow vLLM's `SamplingParams` and the OpenAI API, so that users' code fits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from octavo.core.structured import StructuredOutputsParams
from octavo.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1_000
MAX_BAD_WORDS = 1_000
MAX_BAD_WORD_CHARS = 1_000
MAX_LOGPROBS = 20
MAX_N = 128
MAX_BEAMS = 32
INT64_MAX = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling options of one request. Invalid values raise `RequestError` naming the field.

    n: how many independent answers to draw.
    temperature: 0 means greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of likeliest tokens whose probabilities reach it (nucleus).
    min_p: keep tokens at least this fraction as likely as the likeliest.
    presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once and per
        occurrence (OpenAI).
    repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or
        output (CTRL, arXiv 1909.05858, section 4.1).
    seed: any int64; the same seed gives the same text whatever else runs. None draws a fresh one.
    stop, stop_token_ids: strings and ids that end the answer; strings are cut from the text unless
        `include_stop_str_in_output`.
    ignore_eos: go on past the model's end-of-sequence tokens.
    max_tokens: upper bound of generated tokens; None means up to the model's context, 0 that the
        prompt is only computed: to be scored, or to be found in the prefix cache.
    min_tokens: end-of-sequence and stop ids cannot be drawn before this many tokens.
    logprobs: report log-probabilities of the drawn token and of this many likeliest ones.
    prompt_logprobs: report those of each prompt token but the first, and of this many likeliest
        ones in its place, of the distribution that the model gives after the tokens before it.
        The whole prompt is computed then: nothing of it is taken from the prefix cache.
    logit_bias: added to the logits of these token ids.
    allowed_token_ids: if given, nothing else can be drawn.
    bad_words: the last token of each of these words is not drawn where it would complete the word.
    structured_outputs: the shape that the answer must have; nothing else can be drawn.
    use_beam_search: instead of drawing, keep the `beam_width` likeliest continuations at each step
        and return the best `n` by sum of logprobs / length ** `length_penalty`; `early_stopping`
        ends the search when `beam_width` are finished (True), when no better one is likely (False),
        or when none is possible ("never"), as in transformers.
    detokenize: False returns ids only. skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_integers(self)
        _check_reals(self)
        _check_stops(self)
        _check_token_tables(self)
        _check_beams(self)
        _check_structured_outputs(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever of its forms was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_beams(self) -> int:
        """Continuations that a beam search keeps; `beam_width`, or `n` where it was not given."""
        return self.n if self.beam_width is None else self.beam_width

    @property
    def num_sequences(self) -> int:
        """Sequences that run for one request."""
        return self.num_beams if self.use_beam_search else self.n

    @property
    def greedy(self) -> bool:
        """True where the draw has no randomness."""
        return self.temperature == 0.0 or self.use_beam_search

    @property
    def has_penalties(self) -> bool:
        """True where generated tokens change later logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


def _refuse(param: str, rule: str, value: object) -> RequestError:
    return RequestError(f"{param} must be {rule}, got {value!r}"[:300], param=param)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integers(params: SamplingParams) -> None:
    bounds: dict[str, tuple[int, int]] = {
        "n": (1, MAX_N),
        "top_k": (-1, INT64_MAX),
        "min_tokens": (0, INT64_MAX),
    }
    optional_bounds: dict[str, tuple[int, int]] = {
        "max_tokens": (0, INT64_MAX),
        "logprobs": (0, MAX_LOGPROBS),
        "prompt_logprobs": (0, MAX_LOGPROBS),
        "beam_width": (1, MAX_BEAMS),
        "seed": (-(2**63), INT64_MAX),
    }
    for name, (low, high) in (bounds | optional_bounds).items():
        value = getattr(params, name)
        if value is None and name in optional_bounds:
            continue
        if not _is_int(value) or not low <= value <= high:
            limit = f"at least {low}" if high == INT64_MAX and low > -2 else f"in {low}..{high}"
            raise _refuse(name, f"an integer {limit}", value)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise _refuse("min_tokens", f"at most max_tokens ({params.max_tokens})", params.min_tokens)


def _check_reals(params: SamplingParams) -> None:
    bounds: dict[str, tuple[float, float]] = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
        "repetition_penalty": (0.01, 100.0),
        "length_penalty": (-10.0, 10.0),
    }
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        finite = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not finite or not math.isfinite(value) or not low <= value <= high:
            raise _refuse(name, f"a finite number in {low:g}..{high:g}", value)
    if params.top_p == 0.0:
        raise _refuse("top_p", "greater than 0", params.top_p)


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop_strings) > MAX_STOP_STRINGS:
        raise _refuse("stop", f"at most {MAX_STOP_STRINGS} strings", len(params.stop_strings))
    for text in params.stop_strings:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
            raise RequestError(
                f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters", param="stop"
            )
    words = () if params.bad_words is None else params.bad_words
    if isinstance(words, str) or len(words) > MAX_BAD_WORDS:
        raise _refuse("bad_words", f"a list of at most {MAX_BAD_WORDS} words", len(words))
    for word in words:
        if not isinstance(word, str) or not word.strip() or len(word) > MAX_BAD_WORD_CHARS:
            raise RequestError(
                f"each bad word must have 1 to {MAX_BAD_WORD_CHARS} characters, not all of them "
                "spaces",
                param="bad_words",
            )
    if params.stop_strings and not params.detokenize:
        raise RequestError("stop strings need detokenize=True", param="stop")


def _check_token_tables(params: SamplingParams) -> None:
    """Shapes only; `check_sampling_ids` holds the ids to the vocabulary where that is known."""
    for name in ("stop_token_ids", "allowed_token_ids"):
        ids = getattr(params, name)
        if ids is not None and not all(_is_int(i) and i >= 0 for i in ids):
            raise RequestError(f"{name} must hold non-negative token ids", param=name)
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
    for token_id, bias in (params.logit_bias or {}).items():
        if not _is_int(token_id) or token_id < 0:
            raise RequestError("logit_bias keys must be token ids", param="logit_bias")
        if not isinstance(bias, (int, float)) or not -100.0 <= bias <= 100.0:
            raise RequestError("logit_bias values must be in -100..100", param="logit_bias")


def _check_beams(params: SamplingParams) -> None:
    """A beam search is deterministic: what shapes or restricts a draw has no meaning in it."""
    if not params.use_beam_search:
        neutral = {"beam_width": None, "length_penalty": 1.0, "early_stopping": False}
        for name, value in neutral.items():
            if getattr(params, name) != value:
                raise RequestError(f"{name} needs use_beam_search", param=name)
        return
    if params.early_stopping not in (True, False, "never"):
        raise _refuse("early_stopping", 'true, false or "never"', params.early_stopping)
    if not params.n <= params.num_beams <= MAX_BEAMS:
        raise _refuse("beam_width", f"in n ({params.n})..{MAX_BEAMS}", params.num_beams)
    shaped = {
        "temperature": params.temperature not in (0.0, 1.0),
        "top_p": params.top_p != 1.0,
        "top_k": params.top_k not in (0, -1),
        "min_p": params.min_p != 0.0,
        "repetition_penalty": params.has_penalties,
        "logit_bias": bool(params.logit_bias),
        "allowed_token_ids": params.allowed_token_ids is not None,
        "min_tokens": params.min_tokens != 0,
        "structured_outputs": params.structured_outputs is not None,
        "bad_words": bool(params.bad_words),
        "stop": bool(params.stop_strings),
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "max_tokens=0": params.max_tokens == 0,
    }
    for name, is_given in shaped.items():
        if is_given:
            message = f"{name} cannot be combined with use_beam_search"
            raise RequestError(message, param=name.partition("=")[0])


def _check_structured_outputs(params: SamplingParams) -> None:
    """Nothing may rule out what the shape demands: its end, above all."""
    if params.structured_outputs is None:
        return
    contrary = {
        "ignore_eos": params.ignore_eos,
        "min_tokens": params.min_tokens != 0,
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words),
    }
    for name, is_given in contrary.items():
        if is_given:
            raise RequestError(f"{name} cannot be combined with structured_outputs", param=name)
