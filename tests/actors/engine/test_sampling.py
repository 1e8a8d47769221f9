"""Distributions equal those of transformers' logits processors; draws follow them, and depend on nothing else."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.engine.randomness import choice_seed, uniform
from actors.engine.request import Request
from actors.engine.sampling import Row, sample, truncate
from configs.schema.generation import Sampling

VOCAB = 700
PROMPT, GENERATED = (3, 14, 5, 11), (5, 7, 7, 19, 7, 2)


def logits(rows: int, spread: float = 2.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread


def row(sampling: Sampling, position: int = 9, **fields: object) -> Row:
    """A row whose new token stands at `position`, without earlier tokens that matter."""
    return replace(Row(sampling, range(position), given=position), **fields)


def exact(
    scores: torch.Tensor, s: Sampling, prompt: tuple[int, ...] = (), generated: tuple[int, ...] = ()
) -> torch.Tensor:
    """The distribution that transformers' processors make of logits; its own words for what they have none for."""
    scores = scores.clone()
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if s.repetition_penalty != 1:
        penalise = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)
        scores = penalise(torch.tensor([prompt + generated]), scores[None])[0]
    for token in set(generated):
        scores[token] -= s.presence_penalty + generated.count(token) * s.frequency_penalty
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p > 0:
        warpers.append(MinPLogitsWarper(s.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), scores[None])[0].softmax(-1)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_rows_with_mixed_settings_have_the_distributions_that_transformers_gives_each(spread: float) -> None:
    settings = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
        for t in (0.3, 1.0, 2.5)
        for k in (0, 1, 7, 300, 5000)
        for p in (1.0, 0.95, 0.5, 1e-6)
        for m in (0.0, 0.05, 0.7, 1.0)
    ]
    rows = logits(len(settings), spread)
    heat = torch.tensor([[s.temperature] for s in settings])
    ours = truncate((rows / heat).softmax(-1), settings)
    ours = ours / ours.sum(-1, keepdim=True)
    for scores, s, got in zip(rows, settings, ours, strict=True):
        torch.testing.assert_close(got, exact(scores, s), atol=1e-5, rtol=1e-4, msg=lambda m, s=s: f"{s}: {m}")


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_a_large_vocabulary_is_truncated_as_a_small_one(spread: float) -> None:
    """Nuclei within and beyond what is ranked first, and ranks beyond it."""
    ranks = (0, 40, 1024, 1025, 2500, 9000, 12000)
    settings = [Sampling(top_k=k, top_p=p) for k in ranks for p in (1.0, 0.999, 0.9, 0.3)]
    rows = logits(len(settings), spread, vocab=12000)
    ours = truncate(rows.softmax(-1), settings)
    ours = ours / ours.sum(-1, keepdim=True)
    for scores, s, got in zip(rows, settings, ours, strict=True):
        torch.testing.assert_close(got, exact(scores, s), atol=1e-6, rtol=1e-3, msg=lambda m, s=s: f"{s}: {m}")


CONTROLS = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.08),
    "repetition": Sampling(repetition_penalty=1.8),
    "repetition-encouraged": Sampling(repetition_penalty=0.6),
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.7),
    "frequency-encouraged": Sampling(frequency_penalty=-0.5),
    "bias": Sampling(logit_bias={5: 2.5, 0: -100, 19: 1}),
    "penalties": Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "everything": Sampling(
        temperature=1.4, top_k=12, top_p=0.95, min_p=0.02, repetition_penalty=1.2, presence_penalty=-0.5,
        frequency_penalty=0.2, logit_bias={4: 1.5, 7: 2},
    ),
}  # fmt: skip


def drawn(scores: torch.Tensor, s: Sampling, count: int = 5_000) -> np.ndarray:
    """How often each token is drawn, with another seed each time."""
    rows = [Row(s.model_copy(update={"seed": seed}), PROMPT + GENERATED, given=len(PROMPT)) for seed in range(count)]
    return np.bincount(sample(scores.expand(count, -1).contiguous(), rows), minlength=len(scores))


def fit(counts: np.ndarray, expected: torch.Tensor) -> float:
    """The p-value of the counts under a distribution; tokens that are expected less than 5 times go together."""
    probabilities = expected.double().numpy() / float(expected.double().sum())
    if counts[probabilities == 0].any():
        return 0.0
    amounts = probabilities * counts.sum()
    rare = amounts < 5
    folded = [np.append(values[~rare], values[rare].sum()) for values in (counts, amounts)]
    kept = folded[1] > 0
    return float(chisquare(folded[0][kept], folded[1][kept]).pvalue)


@pytest.mark.parametrize("name", CONTROLS)
def test_tokens_are_drawn_as_often_as_their_probability_says(name: str) -> None:
    scores, s = logits(1, 1.5, vocab=20)[0], CONTROLS[name]
    counts = drawn(scores, s)
    assert fit(counts, exact(scores, s, PROMPT, GENERATED)) > 0.001
    # The same draws do not pass for those of a model without the control.
    assert fit(counts, exact(scores, Sampling(), PROMPT, GENERATED)) < 1e-6


def test_positions_of_one_seed_draw_independently() -> None:
    scores, s = logits(1, 1.5, vocab=6)[0], Sampling(seed=4)
    tokens = sample(scores.expand(8_001, -1).contiguous(), [row(s, position) for position in range(8_001)])
    pairs = np.bincount([a * 6 + b for a, b in pairwise(tokens)], minlength=36)
    one = exact(scores, s)
    assert fit(pairs, (one[:, None] * one).flatten()) > 0.001


def test_choices_of_one_seed_draw_independently() -> None:
    scores = logits(1, 1.5, vocab=20)[0]
    request = Request("r", (1, 2), Sampling(seed=8))
    rows = [Row(choice.sampling, (1, 2)) for choice in request.choices(5_000)]
    counts = np.bincount(sample(scores.expand(len(rows), -1).contiguous(), rows), minlength=20)
    assert fit(counts, exact(scores, Sampling())) > 0.001


def test_choices_have_seeds_of_their_own_that_do_not_depend_on_their_number() -> None:
    request = Request("r", (1, 2), Sampling(seed=(1 << 63) - 1))
    many = request.choices(1000)
    assert many[:3] == request.choices(3)
    assert many[0].sampling.seed == request.sampling.seed
    assert len({choice.sampling.seed for choice in many}) == len({choice.id for choice in many}) == 1000
    assert all(0 <= choice_seed(seed, index) < 1 << 63 for seed in range(50) for index in range(50))


def mixed(count: int) -> list[Row]:
    """Rows of every kind side by side."""
    rows = []
    for n in range(count):
        s = Sampling(
            temperature=0.1 * (n % 9), top_k=n % 5, top_p=1 - 0.02 * n, min_p=0.1 * (n % 3), seed=n,
            repetition_penalty=(1, 1.5)[n % 2], frequency_penalty=(0, 0.4, -0.3)[n % 3],
            logit_bias={n: 3.0} if n % 4 == 0 else {},
        )  # fmt: skip
        allowed = np.random.default_rng(n).integers(-(2**31), 2**31, -(-VOCAB // 32), dtype=np.int32)
        tokens = tuple(range(n, n + 30)) * 2
        rows.append(Row(s, tokens, 7, banned=(1, 2) if n % 5 == 0 else (), allowed=allowed if n % 6 == 1 else None))
    return rows


def test_a_draw_does_not_depend_on_the_rows_beside_it() -> None:
    rows = mixed(40)
    together = sample(logits(40), rows)
    assert together == [sample(logits(40)[n : n + 1], [rows[n]])[0] for n in range(40)]
    assert together == sample(logits(40).flip(0), rows[::-1])[::-1]


def test_rows_that_use_no_control_keep_their_logits_to_the_last_bit() -> None:
    scores = logits(3)
    sample(scores, [row(Sampling()), Row(CONTROLS["everything"], PROMPT + GENERATED, 4), row(Sampling(temperature=0))])
    assert torch.equal(scores[[0, 2]], logits(3)[[0, 2]])
    assert not torch.equal(scores[1], logits(3)[1])


def test_banned_and_masked_tokens_are_never_drawn() -> None:
    best = logits(1)[0].argsort(descending=True).tolist()
    mask = np.zeros(-(-VOCAB // 32), dtype=np.int32)
    for token in best[40:43]:
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    for temperature in (0.0, 5.0):
        s = Sampling(temperature=temperature)
        rows = [row(s, n, banned=best[:3]) for n in range(200)]
        assert not {*best[:3]} & {*sample(logits(1).expand(200, -1).contiguous(), rows)}
        rows = [row(s, n, allowed=mask) for n in range(200)]
        assert {*sample(logits(1).expand(200, -1).contiguous(), rows)} <= {*best[40:43]}
    assert sample(logits(1), [row(Sampling(), allowed=np.zeros_like(mask))]) == [None]


def test_tokens_beyond_a_short_mask_are_left_out() -> None:
    everything = np.full(2, -1, dtype=np.int32)
    drawn = sample(logits(1).expand(300, -1).contiguous(), [row(Sampling(), n, allowed=everything) for n in range(300)])
    assert max(drawn) < 64


def test_another_seed_or_position_draws_another_number() -> None:
    points = {uniform(seed, position) for seed in range(100) for position in range(100)}
    assert len(points) == 10_000
    assert all(0 <= point < 1 for point in points)
    assert abs(sum(points) / len(points) - 0.5) < 0.01


def test_the_numbers_stay_the_same_from_release_to_release() -> None:
    points = [uniform(0, 0), uniform(7, 1), uniform((1 << 63) - 1, 9)]
    assert points == [0.6524484863740321, 0.15589407130731625, 0.1618046427294364]
    assert [choice_seed(7, 1), choice_seed(7, 2)] == [2207009715805324207, 2545488658212934290]


def test_temperature_zero_and_next_to_zero_take_the_most_likely_token() -> None:
    best = logits(5).argmax(-1).tolist()
    for temperature in (0.0, 1e-30, 1e-6, 1e-4):
        assert sample(logits(5), [row(Sampling(temperature=temperature))] * 5) == best


def test_rows_with_unusable_logits_give_no_token_and_spare_the_others() -> None:
    rows = logits(5)
    rows[1, 3] = math.nan
    rows[2] = -math.inf
    rows[3, 0] = math.inf
    rows[4, 100:] = -math.inf
    for temperature in (0.0, 1.0):
        s = Sampling(temperature=temperature, top_p=0.9, min_p=0.1)
        tokens = sample(rows.clone(), [row(s, banned=(0, 3))] * 5)
        assert tokens[1:4] == [None, None, None]
        assert tokens[0] is not None
        assert tokens[4] is not None
        assert tokens[4] < 100
