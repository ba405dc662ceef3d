"""Which part of the model this process holds, and how the parts are summed. Knows no models."""

from dataclasses import dataclass

import torch.distributed
from torch import Tensor

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """One rank of a tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3)."""

    rank: int = 0
    world_size: int = 1

    def share(self, count: int, what: str) -> slice:
        """This rank's part of `count` equal things.

        Raises:
            ConfigError: `count` cannot be divided by the group's size.
        """
        if count % self.world_size:
            raise ConfigError(
                f"{count} {what} cannot be shared equally by {self.world_size} devices; choose a "
                "tensor parallel size that divides it"
            )
        size = count // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def local(self, count: int, what: str) -> int:
        """How many of `count` equal things this rank holds; raises as `share` does."""
        self.share(count, what)  # refuses what cannot be divided
        return count // self.world_size

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place where the group has more than one rank."""
        if self.world_size > 1:
            torch.distributed.all_reduce(partial)
        return partial
