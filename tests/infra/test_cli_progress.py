"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from infra.cli.output import duration, figure, size
from infra.cli.progress import RunProgress
from pipelines.runner import Outcome
from pipelines.stage import Progress

MADE = Outcome("pretrain", "pretrain", "made", "model/demo-pretrain@1", "ab", 61.2, {})


def watch(console: Console, plain_every_seconds: float) -> None:
    with RunProgress(console, plain_every_seconds=plain_every_seconds) as progress:
        progress.stage_started("pretrain", "pretrain")
        for step in range(1, 4):
            progress.stage_progress(
                "pretrain", Progress(step, 300, "steps", {"loss": 2.5, "tokens_per_second": 4321.0, "lr": 0.1})
            )
        time.sleep(0.25)  # the bar is drawn ten times a second
        progress.stage_finished("pretrain", MADE)


def test_off_a_terminal_every_line_is_whole_and_says_where_it_is() -> None:
    file = io.StringIO()
    watch(Console(file=file, width=200), plain_every_seconds=0)
    lines = file.getvalue().splitlines()
    assert lines[0] == "pretrain: started"
    assert lines[1].startswith("pretrain: 1/300 steps  loss 2.5  tokens/s 4,321")
    assert "  left " in lines[3]
    assert lines[-1] == "pretrain: made model/demo-pretrain@1 in 1 min 01 s"


def test_the_time_before_the_first_step_is_no_pace() -> None:
    file = io.StringIO()
    with RunProgress(Console(file=file, width=200), plain_every_seconds=0) as progress:
        progress.stage_started("pretrain", "pretrain")
        progress.stage_progress("pretrain", Progress(0, 300, "steps"))
        time.sleep(1.0)
        for step in (5, 10):
            progress.stage_progress("pretrain", Progress(step, 300, "steps"))
        progress.stage_progress("pretrain", Progress(3, 20, "answers"))
    *_, first, second, other = file.getvalue().splitlines()
    assert "left" not in first  # nothing is known yet; it would have been a minute
    assert float(second.partition("left ")[2].removesuffix(" s")) < 15  # 29 with the start
    assert "left" not in other


def test_a_note_is_printed_whenever_it_comes() -> None:
    for terminal in (False, True):
        file = io.StringIO()
        with RunProgress(Console(file=file, width=200, force_terminal=terminal), plain_every_seconds=3600) as progress:
            progress.stage_started("pretrain", "pretrain")
            progress.stage_progress("pretrain", Progress(0, 300, "steps", note="preflight: [4] parameters"))
        assert "pretrain: preflight: [4] parameters" in file.getvalue()


def test_off_a_terminal_lines_are_rare() -> None:
    file = io.StringIO()
    watch(Console(file=file, width=200), plain_every_seconds=10)
    assert len(file.getvalue().splitlines()) == 2


def test_on_a_terminal_there_is_a_bar_with_position_and_figures() -> None:
    file = io.StringIO()
    watch(Console(file=file, width=200, force_terminal=True), plain_every_seconds=10)
    assert "300 steps" in file.getvalue()
    assert "tokens/s 4,321" in file.getvalue()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(999), "999 B"),
        (size(31_200_000), "31.2 MB"),
        (duration(3.44), "3.4 s"),
        (duration(125), "2 min 05 s"),
        (duration(3725), "1 h 02 min"),
        (figure(1234.4), "1,234"),
        (figure(2.3456), "2.35"),
    ],
)
def test_numbers_are_for_people(shown: str, expected: str) -> None:
    assert shown == expected
