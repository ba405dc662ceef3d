"""What torch says where it finds no memory, in Python's own word for it. Knows no steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OF_CPUS = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for it there


@contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, a device or a host without memory raises `MemoryError`, and nothing else does."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if _OF_CPUS not in str(error):
            raise
        raise MemoryError(f"out of memory: {error}") from error
