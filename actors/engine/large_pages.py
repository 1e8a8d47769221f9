"""Memory for weights in pages of 2 MB, where the system has them.

Each step reads all weights once, in pages of 4 KB many more than a processor knows the places of: products of 16 and 32
rows with weights out of memory are 16 % and 8 % faster in large pages (one core of an Emerald Rapids).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from threading import Lock

import torch

_SLAB_BYTES = 32 << 20
"""Taken from the system at a time; what is not used costs no memory."""
_ALIGNMENT = 64
"""Bytes of a cache line."""

_lock = Lock()
_slab: mmap.mmap | None = None
_used = 0


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor for a weight, on the CPU; what it holds is undefined.

    Its memory is given back with the last tensor of the slab that it lies in. Raises `MemoryError` if there is none.
    """
    count = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE") or count == 0:
        return torch.empty(*shape, dtype=dtype)
    size = -(-dtype.itemsize * count // _ALIGNMENT) * _ALIGNMENT
    global _slab, _used
    with _lock:
        if _slab is None or _used + size > len(_slab):
            _slab, _used = _new_slab(max(size, _SLAB_BYTES)), 0
        slab, offset = _slab, _used
        _used += size
    return torch.frombuffer(slab, dtype=dtype, count=count, offset=offset).view(*shape)


def _new_slab(size: int) -> mmap.mmap:
    try:
        slab = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes of weights") from error
    with contextlib.suppress(OSError):  # a system that is built without them
        slab.madvise(mmap.MADV_HUGEPAGE)
    return slab
