"""Work that a device has no memory for at once is done in parts; what it cannot hold even alone fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from configs.errors import EngineError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_parts(
    run: Callable[[Sequence[_Item]], list[_Result]],
    items: Sequence[_Item],
    alone: Callable[[_Item, str], list[_Result]],
) -> list[_Result]:
    """What `run` gives for some items: of all at once, or of ever smaller parts where that is more than fits.

    Args:
        run: may be called again with items of a call that ran out of memory, so must have changed nothing that counts.
        items: at least one.
        alone: what is to be done about an item for which there is no memory by itself, with the device's message.
    """
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        message = (str(error) or type(error).__name__).splitlines()[0]
    # Not in the handler, where the error would keep the failed attempt's tensors.
    if len(items) == 1:
        return alone(items[0], message)
    half = len(items) // 2
    return in_parts(run, items[:half], alone) + in_parts(run, items[half:], alone)


def no_memory(where: str, message: str, next_step: str) -> EngineError:
    """The error of a request that there is no memory for."""
    return EngineError("no memory to go on with this request", received=f"{where}: {message}", next_step=next_step)


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """PyTorch has a type for this on a GPU, and only a message on a CPU; numpy has Python's own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
