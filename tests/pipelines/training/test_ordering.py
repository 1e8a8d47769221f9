"""The order of examples: whole epochs, the same for every number of ranks, and like lengths together where asked."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.training.ordering import Epochs

LENGTHS = np.random.default_rng(0).integers(3, 60, 205)


def length(index: int) -> int:
    return int(LENGTHS[index])


def batches(epochs: Epochs, steps: int) -> list[list[int]]:
    return [epochs.batch(step, 0, 1, length) for step in range(steps)]


def padding(found: list[list[int]]) -> int:
    return sum(max(map(length, batch)) * len(batch) - sum(map(length, batch)) for batch in found)


@pytest.mark.parametrize("group", [1, 4])
def test_every_example_comes_once_an_epoch_and_epochs_differ(group: int) -> None:
    seen = [index for batch in batches(Epochs(205, batch_rows=10, seed=1, group=group), 41) for index in batch]
    first, second = seen[:205], seen[205:]
    assert sorted(first[:200]) != list(range(200))  # a permutation, not the file's order
    assert np.bincount(seen, minlength=205).tolist() == [2] * 205
    assert first != second


@pytest.mark.parametrize("group", [1, 4])
def test_the_ranks_share_the_same_batch_however_many_they_are(group: int) -> None:
    epochs = Epochs(205, batch_rows=10, seed=1, group=group)
    for step in (0, 20, 21):
        shared = [index for rank in range(5) for index in epochs.batch(step, rank, 5, length)]
        assert sorted(shared) == sorted(epochs.batch(step, 0, 1, length))


def test_batches_drawn_together_hold_like_lengths_and_come_in_any_order() -> None:
    alone, together = (batches(Epochs(205, batch_rows=10, seed=1, group=group), 20) for group in (1, 8))
    assert padding(together) < 0.3 * padding(alone)
    means = [np.mean([length(index) for index in batch]) for batch in together[:8]]
    assert means != sorted(means)
