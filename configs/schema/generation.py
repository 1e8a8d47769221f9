"""How text is generated from a model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.schema.base import Config


class Sampling(Config):
    """Sampling parameters of one request. `temperature` 0 is greedy decoding."""

    max_new_tokens: Annotated[int, Field(ge=0)] = 64
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only the k most likely tokens are drawn from; 0 is all of them."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the smallest set of tokens with this probability mass is drawn from."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=16)] = ()
    """Generation ends before the first of these strings; none of it is given out."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends at one of these tokens; the model's end-of-text tokens are always among them."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """The tokens drawn are a function of (seed, position) and the logits alone."""
