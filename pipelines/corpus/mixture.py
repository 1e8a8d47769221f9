"""Which source each global sample comes from.

Weights are integers: with 3 and 1, three samples of four come from the first source, exactly, over any four that begin
at a multiple of four. In between, the share of each source is never off by a whole sample, so every batch is
stratified. Weights may change at given steps. Everything is arithmetic on the sample's number: no state, any sample
costs the same.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError
from configs.schema.data import Phase, check_phases

Ints = npt.NDArray[np.int64]


def interleave(weights: Sequence[int]) -> Ints:
    """A sequence of sum(weights) source numbers in which source s occurs weights[s] times, evenly spread.

    Every prefix of length n holds more than n * share - 1 and fewer than n * share + 1 samples of each source: place j
    of a source falls between floor(j / share) and ceil((j + 1) / share), and the source whose next place is due first
    comes first (Baruah et al., "Proportionate progress", 1996).
    """
    period = sum(weights)
    used = [s for s, weight in enumerate(weights) if weight]
    taken = [0] * len(weights)
    result = np.empty(period, dtype=np.int64)
    for place in range(period):
        ready = [s for s in used if taken[s] * period // weights[s] <= place and taken[s] < weights[s]]
        chosen = min(ready, key=lambda s: (-(-(taken[s] + 1) * period // weights[s]), s))
        result[place] = chosen
        taken[chosen] += 1
    return result


class _Pattern:
    """The samples of one phase, which begins at sample `first` when `before` samples of each source were taken."""

    def __init__(self, first: int, before: Ints, weights: Sequence[int]) -> None:
        self.first = first
        self._before = before
        self._weights = np.array(weights, dtype=np.int64)
        self._sources = interleave(weights)
        self._ordinals = np.empty(len(self._sources), dtype=np.int64)
        for source in range(len(weights)):
            places = np.flatnonzero(self._sources == source)
            self._ordinals[places] = np.arange(len(places))

    def draw(self, samples: Ints) -> tuple[Ints, Ints]:
        """Source of each global sample, and how many samples of that source came before it."""
        inside = samples - self.first
        periods, places = inside // len(self._sources), inside % len(self._sources)
        sources = self._sources[places]
        return sources, self._before[sources] + periods * self._weights[sources] + self._ordinals[places]

    def taken(self, sample: int) -> Ints:
        """Samples of each source before global sample `sample` of this phase."""
        periods, places = divmod(sample - self.first, len(self._sources))
        inside = np.bincount(self._sources[:places], minlength=len(self._weights))
        return self._before + periods * self._weights + inside


class Mixture:
    """Sources by name, and the phases of their weights."""

    def __init__(self, phases: Sequence[Phase], batch_rows: int) -> None:
        """Takes phases that `check_phases` finds nothing against.

        Raises:
            ConfigError: it does.
        """
        try:
            check_phases(phases)
        except ValueError as error:
            raise ConfigError(f"weights of a mixture cannot be used: {error}") from error
        self.sources = tuple(phases[0].weights)
        self._patterns: list[_Pattern] = []
        self._firsts: list[int] = []
        before = np.zeros(len(self.sources), dtype=np.int64)
        for phase in phases:
            first = phase.from_step * batch_rows
            if self._patterns:
                before = self._patterns[-1].taken(first)
            weights = [phase.weights[name] for name in self.sources]
            common = math.gcd(*weights)
            self._firsts.append(first)
            self._patterns.append(_Pattern(first, before, [weight // common for weight in weights]))

    def draw(self, samples: Ints) -> tuple[Ints, Ints]:
        """Sources (numbers into `sources`) of global samples in rising order, and their places among their source's."""
        phases = np.split(samples, np.searchsorted(samples, self._firsts[1:]))
        drawn = [pattern.draw(part) for pattern, part in zip(self._patterns, phases, strict=True) if len(part)]
        if len(drawn) == 1:
            return drawn[0]
        sources, ordinals = zip(*drawn, strict=True)
        return np.concatenate(sources), np.concatenate(ordinals)

    def taken(self, sample: int) -> Ints:
        """How many samples of each source come before global sample `sample`."""
        return self._patterns[max(bisect_right(self._firsts, sample) - 1, 0)].taken(sample)
