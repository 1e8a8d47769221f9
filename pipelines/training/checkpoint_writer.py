"""Checkpoints that training does not wait for: the state is copied to host memory, a second thread makes it durable.

Training stands still for the copy, and for what is left of the write before if that has not ended. At most one write is
under way. Ranks that each write a part meet in a process group of their own, which no other thread uses: within one
group, what two threads exchange could come in another order on another rank.

A write that failed ends the run: its error is raised by the next call. A process that is killed leaves what it was
writing aside, where nothing looks for checkpoints; the one before stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipelines.training.checkpoint import Checkpoint, Checkpoints
from pipelines.training.parallel import Ranks


class CheckpointWriter:
    """Writes to `checkpoints` from a second thread, as one of `ranks`, whose process group nothing else may use."""

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks) -> None:
        self._checkpoints = checkpoints
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._write: Future[None] | None = None
        self._host: dict[str, Tensor] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Copies `checkpoint` and begins to write the copy; waits first until the write before has ended.

        Raises what ended that one: `StorageError` if the disk is full or cannot be written, `RuntimeError` if another
        rank did not come to its end.
        """
        self._wait()
        copy = dataclasses.replace(checkpoint, tensors=self._copied(checkpoint.tensors))
        self._write = self._thread.submit(self._checkpoints.save, copy, self._ranks)

    def check(self) -> None:
        """Raises what ended the last write, if something did and has not been raised yet; does not wait."""
        if self._write is not None and self._write.done():
            self._wait()

    @contextlib.contextmanager
    def finishing(self, notice: Callable[[str], None]) -> Iterator[None]:
        """Leaves this context when no write is under way, whatever ended it; raises as `save` does.

        If an error ended the context, that error passes, and `notice` is told of a write that failed too.
        """
        with self._thread:
            try:
                yield
            except BaseException:
                try:
                    self._wait()
                except Exception as error:  # noqa: BLE001 - told; what ended the run is the error to raise
                    notice(f"the last checkpoint was not written ({error}); the one before stands")
                raise
            self._wait()

    def _wait(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            write.result()

    @torch.no_grad()
    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` in host memory that is kept from one checkpoint to the next: fresh pages cost more than the copy.

        From a GPU all are copied into pinned memory, and waited for once.
        """
        for name, tensor in tensors.items():
            if name not in self._host:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._host[name] for name in tensors}
