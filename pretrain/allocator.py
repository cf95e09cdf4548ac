"""How a process on a CPU gets its memory: freed memory stays with it, in large pages."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)
_AHEAD = 64 * 2**20
"""Bytes that are taken from the system at a time."""


def keep_freed_memory() -> None:
    """Take large tensors' memory from the system once, not in every step; on Linux with glibc.

    Otherwise glibc gives every large block back when it is freed, and the next step pays for each
    of its pages again: the gradient of 30,522 embeddings then takes longer to allocate than to
    compute. Call it before the first tensor is made. What a user has set in the environment
    (`MALLOC_*`, `GLIBC_TUNABLES`, `THP_MEM_ALLOC_ENABLE`) stays as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own, of blocks from 2 MiB on
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(n.startswith(("MALLOC_", "GLIBC_TUNABLES")) for n in os.environ):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, _AHEAD)
