"""The requests of the benchmarks: random token ids, the same in every run and for every engine.

Generator, seeds and the order of the draws are those that the peers were measured with. One draw
more or less, and all prompts after it are others. Knows no engine.
"""

import random
from dataclasses import dataclass

MAX_TOKEN_ID = 10_000  # of offline prompts: an id that every vocabulary of a real model has
MAX_SERVED_TOKEN_ID = 30_000  # of prompts sent to a server
TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that come all at once. Each generates exactly as many tokens as it says."""

    prompts: list[list[int]]
    num_output_tokens: list[int]
    temperature: float = TEMPERATURE

    @property
    def sum_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def sum_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(self.num_output_tokens)

    def with_output(self, num_tokens: int) -> "Work":
        """The same prompts, each with so many output tokens."""
        return Work(self.prompts, [num_tokens] * len(self.prompts), self.temperature)


class Draws:
    """Work of fixed lengths from one generator, each after what was drawn before."""

    def __init__(self, vocab_size: int, *, seed: int = 0):
        self._random = random.Random(seed)
        self._last_id = min(MAX_TOKEN_ID, vocab_size - 1)

    def work(
        self,
        num_requests: int,
        input_len: int,
        output_len: int,
        *,
        temperature: float = TEMPERATURE,
    ) -> Work:
        """Requests of equal lengths."""
        draw, last_id = self._random.randint, self._last_id
        prompts = [[draw(0, last_id) for _ in range(input_len)] for _ in range(num_requests)]
        return Work(prompts, [output_len] * num_requests, temperature)

    def warm_up(self) -> Work:
        """The request that comes before all others."""
        return self.work(1, 64, 16)


def uniform_work(
    vocab_size: int,
    *,
    num_requests: int = 256,
    lengths: tuple[int, int] = (100, 1024),
    seed: int = 0,
) -> Work:
    """nano-vllm's published workload: lengths of prompts and of outputs uniform, bounds included.

    It has a generator of its own: length and ids of each prompt in turn, then all output lengths.
    """
    draw, last_id = random.Random(seed).randint, min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[draw(0, last_id) for _ in range(draw(*lengths))] for _ in range(num_requests)]
    return Work(prompts, [draw(*lengths) for _ in range(num_requests)])


def served_work(
    num_requests: int, input_len: int, output_len: int, *, last_id: int, seed: int
) -> Work:
    """What a load on a server asks for: length, ids and output length of each request in turn.

    The lengths are drawn though they are fixed, since the generator moves on with each draw.
    """
    draw = random.Random(seed).randint
    prompts, outputs = [], []
    for _ in range(num_requests):
        prompts.append([draw(10, last_id) for _ in range(draw(input_len, input_len))])
        outputs.append(draw(output_len, output_len))
    return Work(prompts, outputs)
