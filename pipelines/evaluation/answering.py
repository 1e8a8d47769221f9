"""What one model says: its answers to the held-out pairs and its loss on validation rows.

It goes through the engine that serves, greedily, with the model's own chat template; a base model gets the same chat
prompts as its fine-tuned successor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request, TokenEvent
from actors.text import Text
from configs.schema.generation import Sampling
from pipelines.corpus.instructions import Pair

_ROWS_AT_ONCE = 16


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Record):
    """What a model answered to one prompt."""

    text: str
    tokens: int
    finish_reason: str
    """`stop`: the model ended its answer; `length`: it was cut off."""


class ModelResult(_Record):
    """Everything measured of one model; kept on disk, so that a killed evaluation does not ask it again."""

    nats_per_token: float
    answers: tuple[Answer, ...]
    """In the order of the pairs."""
    seconds: float
    """Time spent answering."""

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens each second."""
        return sum(answer.tokens for answer in self.answers) / max(self.seconds, 1e-9)


def chat_prompt(text: Text, pair: Pair) -> tuple[int, ...]:
    """Token ids that ask a model for the completion of `pair`."""
    return tuple(text.render_chat([{"role": "user", "content": pair.prompt}]))


def measure(
    folder: Path,
    pairs: Sequence[Pair],
    rows: npt.NDArray[np.int64],
    *,
    max_new_tokens: int,
    max_sequences: int,
    progress: Callable[[int, float], None],
) -> ModelResult:
    """Scores `rows` [count, tokens + 1] and answers `pairs` with the model in `folder`.

    Args:
        progress: told the number of finished answers and the answer tokens per second so far.

    Raises:
        EngineError: the model's logits are not numbers.
        RequestError: the model has no chat template, or a prompt does not fit.
    """
    engine = Engine.load(folder, max_sequences=max_sequences, max_queued=len(pairs))
    nats_per_token = _score(engine, rows)
    began = time.monotonic()
    completions = _answer(engine, pairs, max_new_tokens, progress)
    seconds = time.monotonic() - began
    answers = tuple(
        Answer(text=c.text.strip(), tokens=len(c.token_ids), finish_reason=c.finish_reason) for c in completions
    )
    return ModelResult(nats_per_token=nats_per_token, answers=answers, seconds=seconds)


def _score(engine: Engine, rows: npt.NDArray[np.int64]) -> float:
    total = 0.0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        total += float(engine.score(torch.from_numpy(rows[start : start + _ROWS_AT_ONCE])).double().sum())
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def _answer(
    engine: Engine, pairs: Sequence[Pair], max_new_tokens: int, progress: Callable[[int, float], None]
) -> list[Completion]:
    greedy = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    for index, pair in enumerate(pairs):
        engine.submit(Request(str(index), chat_prompt(engine.text, pair), greedy))
    events: dict[str, list[TokenEvent]] = {str(index): [] for index in range(len(pairs))}
    began = time.monotonic()
    done = tokens = 0
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            events[event.request_id].append(event)
            tokens += len(event.token_ids)
            done += event.finish_reason is not None
        progress(done, tokens / max(time.monotonic() - began, 1e-9))
    return [Completion.of(found) for found in events.values()]
