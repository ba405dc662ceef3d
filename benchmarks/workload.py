"""The CPU workloads: random token ids, greedy, end-of-sequence ignored, so counts are exact.

single: a 128-token prompt and 128 output tokens. prefill: one 1024-token prompt. batch: 32 requests
at once, prompts and outputs uniform in 32..256 tokens. New ids each repeat, so that no prefix cache
can help.
"""

import random

FIRST_ID, LAST_ID = 100, 49000  # ids that the model has and that are no special tokens

Work = list[tuple[list[int], int]]  # (prompt ids, output tokens)


def random_ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(count)]


def single(repeat: int) -> Work:
    return [(random_ids(128, 1000 + repeat), 128)]


def prefill(repeat: int) -> Work:
    return [(random_ids(1024, 2000 + repeat), 1)]


def batch(repeat: int, num_requests: int = 32, low: int = 32, high: int = 256) -> Work:
    rng = random.Random(0)  # the lengths are the same in every repeat
    ins = [rng.randint(low, high) for _ in range(num_requests)]
    outs = [rng.randint(low, high) for _ in range(num_requests)]
    rng = random.Random(3000 + repeat)
    prompts = [[rng.randrange(FIRST_ID, LAST_ID) for _ in range(length)] for length in ins]
    return list(zip(prompts, outs, strict=True))
