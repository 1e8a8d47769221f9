"""Model architectures that can be built from scratch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config


class ModelConfig(Config):
    """A decoder-only transformer; the vocabulary comes from the tokenizer."""

    architecture: Literal["llama"] = "llama"
    hidden_size: Annotated[int, Field(ge=16)] = 192
    """Width of the residual stream."""
    layers: Annotated[int, Field(ge=1)] = 6
    heads: Annotated[int, Field(ge=1)] = 6
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Key/value heads (grouped-query attention); as many as `heads` unless set."""
    intermediate_size: Annotated[int, Field(ge=16)] | None = None
    """Width of the feed-forward layer; 8/3 of `hidden_size`, rounded up to 32, unless set."""
    context_length: Annotated[int, Field(ge=16)] = 256
    """Longest sequence in tokens."""
    tie_embeddings: bool = True
    """Input and output embeddings share their weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x heads ({2 * self.heads})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self
