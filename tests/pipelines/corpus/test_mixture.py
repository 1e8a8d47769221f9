from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.schema.data import Phase
from pipelines.corpus.mixture import Ints, Mixture, interleave

weights = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@given(weights)
@settings(max_examples=200, deadline=None)
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[int]) -> None:
    order = interleave(weights)
    period = sum(weights)
    for source, weight in enumerate(weights):
        taken = np.concatenate([[0], np.cumsum(order == source)])
        assert taken[-1] == weight
        assert (np.abs(taken * period - np.arange(period + 1) * weight) < period).all()


@given(st.lists(weights.map(lambda w: (w + [1] * 6)[:6]), min_size=1, max_size=3), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_each_source_is_drawn_in_order_without_gaps_across_phases(
    phases: list[list[int]], batch_rows: int, data: st.DataObject
) -> None:
    steps = [0, *sorted(data.draw(st.sets(st.integers(1, 30), min_size=len(phases) - 1, max_size=len(phases) - 1)))]
    mixture = Mixture(
        [
            Phase(from_step=step, weights={str(i): w for i, w in enumerate(phase)})
            for step, phase in zip(steps, phases, strict=True)
        ],
        batch_rows,
    )
    sources, ordinals = _draw(mixture, 40, batch_rows)
    for source in range(6):
        mine = ordinals[sources == source]
        assert mine.tolist() == list(range(len(mine)))
    for sample in np.random.default_rng(0).permutation(40 * batch_rows)[:50]:
        alone = mixture.draw(np.array([sample]))
        assert (alone[0][0], alone[1][0]) == (sources[sample], ordinals[sample])


def _draw(mixture: Mixture, steps: int, batch_rows: int) -> tuple[Ints, Ints]:
    """Sources and ordinals of the samples of the first `steps`."""
    drawn = [mixture.draw(np.arange(step * batch_rows, (step + 1) * batch_rows)) for step in range(steps)]
    return np.concatenate([sources for sources, _ in drawn]), np.concatenate([ordinals for _, ordinals in drawn])


def test_a_batch_holds_exactly_its_share() -> None:
    first, second = {"web": 5, "code": 2, "books": 1}, {"web": 0, "code": 1, "books": 1}
    mixture = Mixture([Phase(weights=first), Phase(from_step=10, weights=second)], 16)
    sources, _ = _draw(mixture, 20, 16)
    assert [mixture.taken(step * 16).tolist() for step in (0, 1, 10, 11)] == [
        [0, 0, 0], [10, 4, 2], [100, 40, 20], [100, 48, 28],
    ]  # fmt: skip
    shares = [np.bincount(batch, minlength=3).tolist() for batch in sources.reshape(20, 16)]
    assert shares == [[10, 4, 2]] * 10 + [[0, 8, 8]] * 10


def test_weights_are_proportions() -> None:
    samples = np.arange(100)
    small, large = (Mixture([Phase(weights={"a": k, "b": 3 * k})], 4).draw(samples)[0] for k in (1, 500_000))
    assert np.array_equal(small, large)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "rising steps from 0"),
        ([(3, {"a": 1})], "rising steps from 0"),
        ([(0, {"a": 1}), (5, {"a": 1}), (5, {"a": 2})], "rising steps from 0"),
        ([(0, {"a": 1}), (5, {"b": 1})], "from step 5 names other corpora"),
        ([(0, {"a": 0, "b": 0})], "at least one above 0"),
        ([(0, {"a": 1_000_003, "b": 1_000_033})], "too long a period"),
    ],
)
def test_an_unusable_mixture_is_an_error(phases: list[tuple[int, dict[str, Any]]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture([Phase(from_step=step, weights=weights) for step, weights in phases], 4)
