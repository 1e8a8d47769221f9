"""Distributions equal those of transformers' logits processors; draws depend on seed and position alone."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from actors.engine.sampling import sample, truncate, uniform
from configs.schema.generation import Sampling

VOCAB = 700


def logits(rows: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * spread


def theirs(row: torch.Tensor, s: Sampling) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), row[None])[0].softmax(-1)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_rows_with_mixed_settings_have_the_distributions_that_transformers_gives_each(spread: float) -> None:
    settings = [
        Sampling(temperature=t, top_k=k, top_p=p)
        for t in (0.3, 1.0, 2.5)
        for k in (0, 1, 7, 300, 5000)
        for p in (1.0, 0.95, 0.5, 1e-6)
    ]
    rows = logits(len(settings), spread)
    heat = torch.tensor([[s.temperature] for s in settings])
    ours = truncate((rows / heat).softmax(-1), [s.top_k for s in settings], [s.top_p for s in settings])
    ours = ours / ours.sum(-1, keepdim=True)
    for row, s, got in zip(rows, settings, ours, strict=True):
        torch.testing.assert_close(got, theirs(row, s), atol=1e-5, rtol=1e-4, msg=lambda m, s=s: f"{s}: {m}")


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    row, count = logits(1)[0, :20], 20_000
    s = Sampling(temperature=0.8, top_p=0.9, seed=11)
    drawn = sample(row.expand(count, -1).contiguous(), [s] * count, range(count))
    frequency = torch.bincount(torch.tensor(drawn), minlength=20) / count
    expected = theirs(row, s)
    assert bool((frequency[expected == 0] == 0).all())
    assert float((frequency - expected).abs().max()) < 4 * math.sqrt(0.25 / count)


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    rows = logits(40)
    settings = [Sampling(temperature=0.1 * (n % 9), top_k=n % 5, top_p=1 - 0.02 * n, seed=n) for n in range(40)]
    together = sample(rows, settings, range(40))
    alone = [sample(rows[n : n + 1], [settings[n]], [n])[0] for n in range(40)]
    assert together == alone


def test_another_seed_or_position_draws_another_number() -> None:
    points = {uniform(seed, position) for seed in range(100) for position in range(100)}
    assert len(points) == 10_000
    assert all(0 <= point < 1 for point in points)
    assert abs(sum(points) / len(points) - 0.5) < 0.01


def test_the_numbers_stay_the_same_from_release_to_release() -> None:
    points = [uniform(0, 0), uniform(7, 1), uniform((1 << 63) - 1, 9)]
    assert points == [0.6524484863740321, 0.15589407130731625, 0.1618046427294364]


def test_temperature_zero_and_next_to_zero_take_the_most_likely_token() -> None:
    rows = logits(5)
    best = rows.argmax(-1).tolist()
    for temperature in (0.0, 1e-30, 1e-6, 1e-4):
        assert sample(rows, [Sampling(temperature=temperature)] * 5, range(5)) == best


def test_rows_with_unusable_logits_give_no_token_and_spare_the_others() -> None:
    rows = logits(5)
    rows[1, 3] = math.nan
    rows[2] = -math.inf
    rows[3, 0] = math.inf
    rows[4, 100:] = -math.inf
    for temperature in (0.0, 1.0):
        tokens = sample(rows, [Sampling(temperature=temperature, top_p=0.9)] * 5, range(5))
        assert tokens[1:4] == [None, None, None]
        assert tokens[0] is not None
        assert tokens[4] is not None
        assert tokens[4] < 100
