"""Which examples a step sees: every epoch is a new permutation, and the ranks share a batch out by length."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError

Order = npt.NDArray[np.int64]


class Epochs:
    """The order in which `count` examples are gone through, a pure function of (seed, step).

    With `group` above 1, that many batches are drawn together and cut by length, so that each holds examples of like
    lengths, and come in any order. Of 29,000 pairs of captions in batches of 64 on two ranks, padded to a multiple of
    8, 16 batches together leave 1.4 positions for each token instead of 2.1.
    """

    def __init__(self, count: int, *, batch_rows: int, seed: int, group: int = 1) -> None:
        self._count = count
        self._batch_rows = batch_rows
        self._seed = seed
        self._group = group
        self._kept = functools.lru_cache(maxsize=2)(self._order)

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
        chosen = [int(self._kept(place // self._count, length)[place % self._count]) for place in places]
        chosen.sort(key=length)
        return chosen[rank::world_size]

    def _order(self, epoch: int, length: Callable[[int], int]) -> Order:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(self._count)
        if self._group == 1:
            return order
        lengths = np.array([length(int(index)) for index in order])
        together = self._group * self._batch_rows
        batches: list[Order] = []
        for begin in range(0, self._count, together):
            drawn = order[begin : begin + together][np.argsort(lengths[begin : begin + together], kind="stable")]
            cut = [drawn[at : at + self._batch_rows] for at in range(0, len(drawn), self._batch_rows)]
            batches += [cut[place] for place in random.permutation(len(cut))]
        return np.concatenate(batches)
