"""From a step's logits to the events of its requests: which logits are needed, drawing, what is to be shown."""

# ruff: noqa: N803 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from actors.engine.request import TokenEvent
from actors.engine.sampling import sample
from actors.engine.scheduler import Turn
from configs.errors import EngineError


def wanted(turns: Items[Turn]) -> list[int]:
    """Rows of the step's tokens whose logits `emit` needs, in order; row 0 is the first token of the first turn."""
    rows: list[int] = []
    first = 0
    for turn in turns:
        rows.extend(first + position - turn.span.start for position in _wanted(turn))
        first += len(turn.span.tokens)
    return rows


@torch.inference_mode()
def emit(logits_NV: torch.Tensor, turns: Items[Turn]) -> list[tuple[Turn, TokenEvent]]:
    """Gives each turn that is due one its next token; the turns that have something to show, and what.

    Args:
        logits_NV: fp32, of the rows that `wanted` named; overwritten.
        turns: the step's, after it has run.
    """
    due = [turn for turn in turns if _wanted(turn)]
    if not due:
        return []
    settings = [turn.sequence.request.sampling for turn in due]
    positions = [turn.span.stop for turn in due]
    return [
        (turn, turn.sequence.fail(_unusable(turn)) if token is None else turn.sequence.advance(token))
        for turn, token in zip(due, sample(logits_NV, settings, positions), strict=True)
    ]


def _wanted(turn: Turn) -> range:
    """Positions of a turn whose logits are needed."""
    return range(turn.span.stop - 1, turn.span.stop) if turn.completes else range(0)


def _unusable(turn: Turn) -> EngineError:
    return EngineError(
        "the model's logits are not finite numbers",
        received=f"position {turn.span.stop}",
        next_step="check the model's weights; in bf16, try precision fp32",
    )
