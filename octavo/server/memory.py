"""What the front end's C library keeps of memory that was freed. Knows no requests.

glibc gets a large block from the kernel and returns it when it is freed, but each such return
raises the size that counts as large, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). After the first
large body, the next ones lie on the heap between small objects that live on, and what they took
stays resident: a server would grow by a few MiB with the largest request that it ever refused.
"""

import ctypes

# From <malloc.h>. Setting either also ends the raising.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Above what asyncio reads at once (256 KiB), so that no ordinary request costs a system call more.
LARGE_BYTES = 2**19


def return_large_blocks() -> bool:
    """Have each block of `LARGE_BYTES` or more returned to the system as soon as it is freed.

    For this process and from now on. False where the C library is not glibc, and nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES) and mallopt(_M_TRIM_THRESHOLD, LARGE_BYTES))
