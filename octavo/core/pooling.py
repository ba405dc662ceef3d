"""How a prompt becomes one vector. Owns validation; knows no tensors and no models.

Names and meanings follow vLLM's `PoolingParams`.
"""

from typing import Literal, get_args

import msgspec

from octavo.errors import RequestError

PoolingType = Literal["last", "mean", "cls"]
POOLING_TYPES: tuple[str, ...] = get_args(PoolingType)


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What an embedding is made of. Invalid values raise `RequestError` naming the field.

    pooling: "last" takes the hidden state of the last prompt token, after the final norm; "mean"
        the mean over all of them, in fp32; "cls" that of the first, in which encoders gather what
        they read.
    normalize: divide the vector by its Euclidean length.
    uses_head: give the vector to the model's head of classes, whose scores are the result then.
    """

    pooling: PoolingType = "last"
    normalize: bool = True
    uses_head: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLING_TYPES:
            known = ", ".join(POOLING_TYPES)
            raise RequestError(
                f"pooling must be one of {known}, got {self.pooling!r}"[:300], param="pooling"
            )
        for name in ("normalize", "uses_head"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false", param=name)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether tokens before the last are read: no cached KV stands for a hidden state."""
        return self.pooling != "last"


SCORE = PoolingParams(pooling="cls", normalize=False, uses_head=True)
