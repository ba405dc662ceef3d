"""What `LLM` returns, under the names that vLLM's users know. Plain data."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.core import TokenLogprobs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one for each token where they were asked for
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log-probabilities, where they were asked for."""
        if self.logprobs is None:
            return None
        return sum(entry.logprob for entry in self.logprobs)


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its `n` answers."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    # One for each prompt token where they were asked for. The first follows nothing: None.
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of a prompt."""

    embedding: "npt.NDArray[np.float32]"  # [hidden_size]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well two texts fit each other."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """A pair of texts, in the order in which they were given, and its score."""

    request_id: str  # of the pair, or where the two were embedded, of the second
    outputs: ScoringOutput
    finished: bool = True
