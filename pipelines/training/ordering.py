"""Which examples a step sees: every epoch is a new permutation, and the ranks share a batch out by length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError


class Epochs:
    """The order in which `count` examples are gone through, a pure function of (seed, step)."""

    def __init__(self, count: int, *, batch_rows: int, seed: int) -> None:
        self._count = count
        self._batch_rows = batch_rows
        self._seed = seed

    def batch(self, step: int, rank: int, world_size: int, length: Callable[[int], int]) -> list[int]:
        """The examples of `rank` in the global batch of `step`; sorted by `length` and dealt, to even out work.

        Raises:
            ConfigError: the batch cannot be divided so.
        """
        if self._batch_rows % world_size:
            raise ConfigError(
                "batch_rows cannot be divided among the workers",
                received=self._batch_rows,
                allowed=f"a multiple of {world_size}",
            )
        places = range(step * self._batch_rows, (step + 1) * self._batch_rows)
        orders = {epoch: self._order(epoch) for epoch in {place // self._count for place in places}}
        chosen = [int(orders[place // self._count][place % self._count]) for place in places]
        chosen.sort(key=length)
        return chosen[rank::world_size]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)
