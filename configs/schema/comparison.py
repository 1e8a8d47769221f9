"""Language models side by side on one corpus."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Config, Input
from configs.schema.corpus import SourceConfig


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
    text: SourceConfig | None = None
    """Text that perplexity per word is measured on, by which models of different tokenizers compare. What stands
    between white space is a word, and the end of a document (with format `lines`, of a line) is one more: the
    convention of WikiText and the Penn Treebank, where `<unk>` is a word like any other."""
