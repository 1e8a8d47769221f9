"""Learning-rate schedules."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema.training import OptimConfig
from pipelines.training.schedule import rate_factor


def factors(steps: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    return [rate_factor(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_schedule_rises_to_the_peak_and_ends_at_its_final_share(schedule: str) -> None:
    rates = factors(200, schedule=schedule, warmup_fraction=0.1, final_fraction=0.05)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[0] < 0.1
    assert rates[-1] == pytest.approx(0.05)


def test_wsd_is_flat_until_it_decays() -> None:
    rates = factors(100, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.3, final_fraction=0.0)
    assert rates[10:70] == [1.0] * 60
    assert rates[84] == pytest.approx(0.5)


def test_linear_halves_at_the_middle_and_cosine_lags_behind_at_first() -> None:
    settings = {"warmup_fraction": 0.0, "final_fraction": 0.0}
    linear, cosine = factors(100, schedule="linear", **settings), factors(100, schedule="cosine", **settings)
    assert linear[49] == pytest.approx(cosine[49]) == pytest.approx(0.5)
    assert cosine[24] > linear[24]
    assert cosine[74] < linear[74]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(steps: int) -> None:
    for schedule in ("cosine", "linear", "wsd"):
        assert all(0 < rate <= 1 for rate in factors(steps, schedule=schedule))
