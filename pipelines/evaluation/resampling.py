"""Scores as functions of sums over items, and how sure they and their differences are.

Every metric here gives each item a vector; the score of a set is a function of the vectors' sum. Means, ratios (bits
per byte), F1 over counts and BLEU over n-gram counts are all of that form, so that one resampling serves them all.
Intervals are percentile bootstraps over items (Efron, "Bootstrap Methods", 1979). The difference of two models on the
same items is resampled in pairs, and its p-value is that of approximate randomisation: how often exchanging the two
models' answers at random makes a difference as large (Noreen 1989; Riezler and Maxwell 2005). All of it is seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Sums = npt.NDArray[np.float64]
"""[N, D]: a vector for each item."""
Combine = Callable[[Sums], float]
"""The score of a sum of vectors, [D]."""
Verdict = Literal["better", "worse", "noise"]

CONFIDENCE = 0.95
RESAMPLES = 1000
_SEED = 20240229
_AT_ONCE = 1 << 22
"""Random numbers drawn together: bounds the memory, 32 MB."""
_DECIMALS = 6
"""Fewer than the digits that the order of a floating-point sum can change."""


class Estimate(BaseModel):
    """A score with its 95 % confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


class Difference(BaseModel):
    """How two models differ on the same items: the second one's score less the first one's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: float
    second: float
    difference: Estimate
    p_value: float
    """Probability of a difference this large if the models were the same."""
    verdict: Verdict
    """`noise` unless the p-value is below 5 %."""


def estimate(vectors: Sums, combine: Combine) -> Estimate:
    """The score of at least one item, with its interval."""
    count = len(vectors)
    drawn = np.concatenate(
        [
            rng.multinomial(count, np.full(count, 1 / count), size=size) @ vectors
            for rng, size in _rounds(count)
        ]
    )  # fmt: skip
    return _interval(combine(vectors.sum(0)), [combine(row) for row in drawn])


def compare(first: Sums, second: Sums, combine: Combine, *, lower_is_better: bool = False) -> Difference:
    """The difference of two models, from the vectors of the same items in the same order."""
    count = len(first)
    before, after = combine(first.sum(0)), combine(second.sum(0))
    resampled: list[float] = []
    as_large = 0
    observed = abs(after - before)
    for rng, size in _rounds(count):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size)
        resampled += [combine(b) - combine(a) for a, b in zip(weights @ first, weights @ second, strict=True)]
        kept = rng.integers(0, 2, size=(size, count)).astype(np.float64)
        one, other = kept @ first + (1 - kept) @ second, kept @ second + (1 - kept) @ first
        # Sums in another order: what differs by their rounding alone is as large.
        as_large += sum(
            abs(combine(b) - combine(a)) >= observed - 1e-12 for a, b in zip(one, other, strict=True)
        )  # fmt: skip
    p_value = (as_large + 1) / (RESAMPLES + 1)
    gained = before - after if lower_is_better else after - before
    verdict: Verdict = "noise" if p_value >= 1 - CONFIDENCE or gained == 0 else "better" if gained > 0 else "worse"
    return Difference(
        first=_round(before),
        second=_round(after),
        difference=_interval(after - before, resampled),
        p_value=_round(p_value),
        verdict=verdict,
    )


def mean(total: Sums) -> float:
    """The score of vectors (value, 1)."""
    return float(total[0] / total[1])


def _rounds(count: int) -> list[tuple[np.random.Generator, int]]:
    """Generators and how many resamples to draw from each; the same for the same number of items."""
    size = max(1, min(RESAMPLES, _AT_ONCE // count))
    sizes = [size] * (RESAMPLES // size) + ([RESAMPLES % size] if RESAMPLES % size else [])
    seeds = np.random.SeedSequence(_SEED).spawn(len(sizes))
    return [(np.random.default_rng(seed), size) for seed, size in zip(seeds, sizes, strict=True)]


def _interval(value: float, resampled: list[float]) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(resampled), [tail, 1 - tail])
    return Estimate(value=_round(value), low=_round(low), high=_round(high))


def _round(value: float) -> float:
    return round(float(value), _DECIMALS)
