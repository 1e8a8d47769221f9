"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.calls import TokenScore

LOWEST = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot hold."""


def completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Of `/v1/completions`: parallel lists. The token itself is always among its alternatives."""
    return {
        "tokens": [_name(score.token) for score in scores],
        "token_logprobs": [None if score.logprob is None else max(score.logprob, LOWEST) for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Of `/v1/chat/completions`: an entry a token."""
    content = [
        {**_entry(score.token, score.logprob or 0.0), "top_logprobs": [_entry(*other) for other in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _alternatives(score: TokenScore) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    # Tokens that are spelt alike share a place: the likeliest one has it.
    for token, logprob in [*score.top, (score.token, score.logprob)]:
        found.setdefault(_name(token), max(logprob, LOWEST))
    return found


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": token.decode(errors="backslashreplace"),
        "logprob": max(logprob, LOWEST),
        "bytes": list(token),
    }


def _name(token: bytes) -> str:
    """A token's text; one that is part of a character is named by its bytes, as OpenAI has it."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
