"""The sizes that steps on a GPU are filled up to, so that some ninety CUDA graphs serve them all.

Knows no graphs: `octavo.runner.graphs` makes one for each size, and the memory plan counts them.
"""


def decode_sizes(limit: int) -> list[int]:
    """Numbers of sequences that steps of one token a sequence have."""
    small = [1, 2, 4]
    return [size for size in small if size < limit] + _steps(limit, ((256, 8), (limit, 16)))


def mixed_sizes(limit: int) -> list[int]:
    """Numbers of tokens that steps of any mix have: at most an eighth is filled up."""
    return _steps(limit, ((1024, 64), (2048, 128), (4096, 256), (limit, 512)))


def _steps(limit: int, stretches: tuple[tuple[int, int], ...]) -> list[int]:
    """Multiples of each stretch's step up to its end, and the limit itself."""
    sizes: list[int] = []
    for end, step in stretches:
        first = (sizes[-1] if sizes else 0) + step
        sizes += range(first, min(end, limit) + 1, step)
    return [*(size for size in sizes if size < limit), limit]
