import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.programs import run_module
from benchmarks.training import _page, _speed_recipe
from benchmarks.training_loops import LEARNING_RATE, SmallGpt, cosine_rate
from benchmarks.training_ours import timed
from configs.schema.project import Recipe

SHAPE = ["--vocab", 40, "--length", 16, "--width", 16, "--layers", 1, "--heads", 2, "--inner", 32]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six batches of rows that count upwards."""
    starts = np.random.default_rng(0).integers(0, 20, (6, 4, 1))
    np.save(tmp_path / "rows.npy", (starts + np.arange(17)).astype(np.int32))
    return tmp_path / "rows.npy"


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["bare", "bare_fused_loss", "trainer", "small_gpt"])
def test_every_contestant_takes_the_steps(rows: Path, loop: str) -> None:
    found = run_module("benchmarks.training_loops", loop, rows, *SHAPE, "--micro-rows", 2)
    assert found["positions"] == 4 * 16
    assert len(found["seconds"]) == 6
    assert all(seconds > 0 for seconds in found["seconds"])


def test_the_small_gpt_looks_back_only_and_learns_its_rate() -> None:
    torch.manual_seed(0)
    model = SmallGpt(vocab=40, length=16, width=16, layers=2, heads=2)
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 10] = 39
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])
    rates = [cosine_rate(step, 2000) for step in range(2000)]
    assert max(rates) == rates[100] == LEARNING_RATE
    assert rates[0] < LEARNING_RATE / 50
    assert math.isclose(rates[-1], LEARNING_RATE / 10, rel_tol=1e-3)


def test_training_time_adds_up_over_intervals_of_different_speed() -> None:
    lines = timed([{"step": 10, "tokens_per_second": 100.0}, {"step": 30, "tokens_per_second": 50.0}], positions=20)
    assert [line["seconds"] for line in lines] == [2.0, 10.0]


def test_the_recipe_that_is_timed_is_a_recipe_of_fp32() -> None:
    stage = Recipe.model_validate(_speed_recipe(8)).stages["run-0"]
    assert stage.training.precision == "fp32"
    assert (stage.training.workers, stage.training.cpus_per_worker) == (1, 2)


def test_the_page_has_ratios_stalls_and_times_to_a_loss() -> None:
    ours = ("ganymede, 1 worker of 2 threads, AdamW", "ganymede, 2 workers of 1 thread, AdamW")
    rates = {ours[0]: 1000.0, ours[1]: 900.0, "transformers' Trainer": 800.0}

    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"step": 100.0 * n, "seconds": s, "validation_loss": v} for n, (s, v) in enumerate(points, 1)]

    page = _page({
        "date": "today", "command": "python -m benchmarks.training", "versions": {"torch": "2"},
        "machine": {"processor": "p", "cores": 2, "memory_gb": 8, "load_before": 0.1, "python": "3"},
        "parts": {
            "speed": {"steps": 9, "tokens_per_second": rates, "fastest_tokens_per_second": rates,
                      "share_of_matmul_rate": {ours[0]: 0.8, ours[1]: 0.7}},
            "checkpoint": {"17M": {"seconds": 0.5, "bytes": 2e8}},
            "shakespeare": {
                "stage": "third", "parameters": 1, "reference": curve((30.0, 2.0), (60.0, 1.88)),
                "ours": curve((10.0, 2.0), (20.0, 1.85)),
            },
        },
    })  # fmt: skip
    assert "| transformers' Trainer | 800 | 800 | 1.25x (1.25x) |  |" in page
    assert "| ganymede, 2 workers of 1 thread, AdamW | 900 | 900 | 1.11x (1.11x) | 70% |" in page
    assert "against 1 of 2: 0.90x (0.90x)" in page
    assert "Every 50 steps of 4.55 s, that is 0.2% of the time" in page
    assert "| ganymede `third` | 200 | 20.0 | 1.8500 | 0.33 |" in page
    assert "To the small GPT's last loss (1.880): small GPT 60.0 s, ganymede `third` 20.0 s." in page
    assert "To 1.886 (1.886)" in page
