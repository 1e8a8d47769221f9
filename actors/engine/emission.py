"""From a step's logits to the events of its requests: which logits are needed, drawing, what is to be shown."""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

import math
from collections.abc import Sequence as Items

import torch

from actors.engine.logprobs import describe
from actors.engine.request import TokenEvent, TokenLogprob
from actors.engine.sampling import Row, sample
from actors.engine.scheduler import Turn
from actors.engine.sequence import Sequence
from actors.engine.structured import masks
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
    """Scores prompts and gives each turn that is due one its next token; the turns with something to show, and what.

    Args:
        logits_NV: fp32, of the rows that `wanted` named; overwritten.
        turns: the step's, after it has run.
    """
    events: list[tuple[Turn, TokenEvent]] = []
    due: list[Turn] = []
    rows: list[int] = []
    first = 0
    for turn in turns:
        count = len(_wanted(turn))
        sequence = turn.sequence
        usable = True
        if sequence.scores_prompt:
            usable = _score_prompt(logits_NV[first : first + count], sequence, turn.span.start)
        first += count
        if not usable:
            events.append((turn, sequence.fail(_unusable(turn))))
        elif turn.completes and sequence.generates:
            due.append(turn)
            rows.append(first - 1)
        elif turn.completes:
            events.append((turn, sequence.end()))
        elif count and not bool(logits_NV[first - 1].isfinite().all()):
            # At once: copies of a spoiled row would spread it, and attention that multiplies what lies in it by 0.
            events.append((turn, sequence.fail(_unusable(turn))))
    if due:
        events += zip(due, _draw(logits_NV if len(rows) == len(logits_NV) else logits_NV[rows], due), strict=True)
    return events


def _wanted(turn: Turn) -> range:
    """Positions of a turn whose logits are needed: to draw, to score, or to see that they are numbers."""
    sequence, stop = turn.sequence, turn.span.stop
    if not sequence.scores_prompt:
        return range(stop - 1, stop)
    draws = turn.completes and sequence.generates
    return range(turn.span.start, stop if draws else min(stop, sequence.prompt_tokens - 1))


def _score_prompt(logits_TV: torch.Tensor, sequence: Sequence, start: int) -> bool:
    """Records what the model thought of the prompt's tokens after position `start`; whether it can be used."""
    targets = sequence.request.prompt_ids[start + 1 : start + 1 + len(logits_TV)]
    top = sequence.request.sampling.prompt_logprobs or 0
    entries = describe(logits_TV[: len(targets)].log_softmax(-1), targets, [top] * len(targets))
    sequence.record_prompt(start + 1, entries)
    return not any(math.isnan(entry.logprob) for entry in entries)


def _draw(logits_BV: torch.Tensor, turns: Items[Turn]) -> list[TokenEvent]:
    """The next token of each turn, with its log-probability where it was asked for."""
    sequences = [turn.sequence for turn in turns]
    asked = [index for index, sequence in enumerate(sequences) if sequence.request.sampling.logprobs is not None]
    logprobs_RV = logits_BV[asked].log_softmax(-1) if asked else None
    drawn = sample(logits_BV, _rows(sequences, logits_BV.shape[-1]))
    entries: list[TokenLogprob | None] = [None] * len(turns)
    if logprobs_RV is not None:
        tops = [sequences[index].request.sampling.logprobs or 0 for index in asked]
        found = describe(logprobs_RV, [drawn[index] or 0 for index in asked], tops)
        for index, entry in zip(asked, found, strict=True):
            entries[index] = entry
    return [_advance(*due) for due in zip(turns, drawn, entries, strict=True)]


def _rows(sequences: Items[Sequence], vocab: int) -> list[Row]:
    matchers = [sequence.matcher for sequence in sequences if sequence.matcher is not None]
    allowed = iter(masks(matchers) if matchers else ())
    return [
        Row(
            sequence.request.sampling,
            sequence.tokens,
            sequence.prompt_tokens,
            banned=() if sequence.may_stop else [token for token in sequence.stop_ids if token < vocab],
            allowed=None if sequence.matcher is None else next(allowed),
        )
        for sequence in sequences
    ]


def _advance(turn: Turn, token: int | None, entry: TokenLogprob | None) -> TokenEvent:
    sequence = turn.sequence
    if token is None:
        return sequence.fail(_unusable(turn))
    try:
        return sequence.advance(token, entry)
    except EngineError as error:
        return sequence.fail(error)


def _unusable(turn: Turn) -> EngineError:
    return EngineError(
        "the model's logits are not finite numbers",
        received=f"position {turn.span.stop}",
        next_step="check the model's weights; in bf16, try precision fp32",
    )
