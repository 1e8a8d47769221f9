"""Language models side by side on one corpus."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Config, Input


class CompareConfig(Config):
    """Stage `compare`: how decoders learned, and how much each position of a context helps them."""

    kind: Literal["compare"] = "compare"
    models: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")], Input], Field(min_length=1)
    ]
    """Label in the report to model, in the order of the tables."""
    corpus: Input
    """Corpus that all of them were made with the tokenizer of."""
    rows: Annotated[int, Field(ge=1)] = 256
    """Validation rows that are read, each as long as the shortest context of the models."""
