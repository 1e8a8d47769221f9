"""What follows from a sweep's report, on reports made by hand."""

from __future__ import annotations

import itertools

import pytest

from pipelines.evaluation.resampling import Difference, Estimate
from pipelines.prompting.sweep_picture import sweep_picture
from pipelines.prompting.sweep_report import Cell, Recommendation, Reference, Series, SweepReport, best_cell, recommend

NOISE = 0.02


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=round(value - 0.03, 4), high=round(value + 0.03, 4))


def difference(first: float, second: float) -> Difference:
    gain = round(second - first, 4)
    verdict = "noise" if abs(gain) < NOISE else "better" if gain > 0 else "worse"
    interval = Estimate(value=gain, low=round(gain - 0.02, 4), high=round(gain + 0.02, 4))
    return Difference(first=first, second=second, difference=interval, p_value=0.2 if verdict == "noise" else 0.001,
                      verdict=verdict)  # fmt: skip


def report(scores: dict[int, float], *, target: float | None = None, trained: float | None = None) -> SweepReport:
    cells = tuple(
        Cell(model="m", template="t", shots=shots, sampling="greedy", score=estimate(score), shown=shots, cut_items=0,
             unanswered=0, prompt_tokens=10)
        for shots, score in scores.items()
    )  # fmt: skip
    best = best_cell(cells)
    gains = tuple((a, b, difference(scores[a], scores[b])) for a, b in itertools.combinations(scores, 2))
    references = {} if trained is None else {
        "encoder": Reference(score=estimate(trained), unanswered=0,
                             against_best=difference(cells[best].score.value, trained))
    }  # fmt: skip
    return SweepReport(
        task="sst2", metric="accuracy", signature="", items=100, strategy="balanced", left_out=0, templates={"t": "0"},
        cells=cells, best=best, series=Series(shots=tuple(scores), gains=gains), references=references, target=target,
    )  # fmt: skip


def advice(*args: object, **kwargs: object) -> Recommendation:
    return recommend(report(*args, **kwargs))


def test_few_shot_stops_helping_where_more_is_not_better_beyond_noise() -> None:
    found = advice({0: 0.50, 1: 0.60, 3: 0.70, 5: 0.71, 8: 0.705}, target=0.83)
    assert found.shots == 3
    assert found.sentences[0] == (
        "Best prompt: m, template t, 5 shots, greedy: accuracy 71.0 (68.0 to 74.0) on 100 items."
    )
    assert found.sentences[1].startswith(
        "Few-shot stops helping at 3: the most that more examples add is +1.0 points with 5 (-1.0 to +3.0"
    )


def test_examples_may_not_help_at_all_or_still_help() -> None:
    assert "Few-shot does not help" in advice({0: 0.6, 1: 0.6, 2: 0.55}).sentences[1]
    still = advice({0: 0.5, 1: 0.6, 2: 0.7})
    assert (still.shots, still.sentences[1]) == (2, "Few-shot still helps at 2, the most that were tried.")
    assert advice({0: 0.5}).sentences[1] == "No examples were tried."


def test_below_the_target_it_says_by_how_much_and_to_fine_tune() -> None:
    found = advice({0: 0.6, 3: 0.71}, target=0.83)
    assert (found.advice, found.gap) == ("fine-tune", pytest.approx(-12))
    assert found.sentences[-1] == "12.0 points below the target (83.0): fine-tune."


def test_above_the_target_prompting_is_enough() -> None:
    found = advice({0: 0.6, 3: 0.85}, target=0.83)
    assert (found.advice, found.gap) == ("prompt", pytest.approx(2))


def test_within_the_interval_more_items_are_asked_for() -> None:
    assert advice({0: 0.81}, target=0.83).advice == "measure more"


def test_the_best_trained_model_is_the_target_unless_there_is_one() -> None:
    found = advice({0: 0.6, 3: 0.7}, trained=0.8)
    assert found.advice == "fine-tune"
    assert "encoder has 80.0, +10.0 points against the best prompt" in found.sentences[2]
    assert "10.0 points below encoder (80.0)" in found.sentences[3]
    assert advice({0: 0.6, 3: 0.7}, trained=0.8, target=0.65).advice == "prompt"
    assert advice({0: 0.6}).advice == "set a target"


def test_a_window_without_room_for_the_examples_is_named() -> None:
    made = report({0: 0.5, 3: 0.7}, target=0.9)
    narrow = made.cells[1].model_copy(update={"shown": 1.25, "cut_items": 80})
    found = recommend(made.model_copy(update={"cells": (made.cells[0], narrow)}))
    assert "The window of m had no room for all examples at 3 (1.25 shown on average)." in found.sentences
    assert not any("window" in sentence for sentence in recommend(made).sentences)


def test_of_equal_cells_the_one_with_fewer_examples_is_the_best() -> None:
    found = report({1: 0.6, 0: 0.6, 2: 0.6})
    assert found.cells[found.best].shots == 0


def test_the_picture_is_the_same_every_time() -> None:
    drawn = sweep_picture(report({0: 0.5, 3: 0.7}, trained=0.8, target=0.9))
    assert drawn.startswith(b"\x89PNG")
    assert drawn == sweep_picture(report({0: 0.5, 3: 0.7}, trained=0.8, target=0.9))
