"""What a training stage starts from: a model from scratch, an artifact, or a folder in Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import nn

from actors.store.artifacts import Artifact, model_digest
from configs.schema.model import ModelConfig, is_folder
from pipelines.training.architectures import architecture_config
from pipelines.training.models import (
    LANGUAGE_HEADS,
    Head,
    build_model,
    build_skeleton,
    context_length,
    load_model,
    pretraining_head,
    read_shape,
)

ROLE = "model.from"
"""Role of the artifact that a stage's `model` names."""


def start_sources(config: ModelConfig) -> Mapping[str, str]:
    """Digest of the folder that `config` names, if it names one; artifacts are inputs, not sources."""
    if config.start is None or not is_folder(config.start):
        return {}
    return {ROLE: model_digest(Path(config.start).expanduser())}


@dataclass(frozen=True)
class Start:
    """Where training starts; can be sent to workers."""

    config: ModelConfig
    folder: Path | None
    """Model folder; None for a model from scratch."""
    digest: str | None
    """What is in the folder."""

    @classmethod
    def find(cls, config: ModelConfig, inputs: Mapping[str, Artifact]) -> Self:
        """Raises `ArtifactError` if the folder that `config` names holds no model."""
        if ROLE in inputs:
            return cls(config, inputs[ROLE].path.absolute(), inputs[ROLE].digest)
        if config.start is None:
            return cls(config, None, None)
        return cls(config, Path(config.start).expanduser().absolute(), start_sources(config)[ROLE])

    @property
    def language_head(self) -> Head:
        """The head of the language model that this is, or is to be."""
        return LANGUAGE_HEADS[self.config.family] if self.folder is None else pretraining_head(self.folder)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.config.context_length if self.folder is None else context_length(self.folder)

    def facts(self) -> dict[str, str]:
        """What a model card says of it."""
        if self.digest is None:
            return {"Architecture": self.config.architecture}
        return {"Base model digest": f"`{self.digest}`"}

    def skeleton(self, head: Head, *, vocab_size: int, eos_token_id: int, labels: Sequence[str] = ()) -> nn.Module:
        """What `model` gives, without memory for its weights; raises as it does."""
        if self.folder is not None:
            return build_skeleton(read_shape(self.folder), head, labels)
        shape = architecture_config(self.config, vocab_size=vocab_size, eos_token_id=eos_token_id)
        return build_skeleton(shape, head, labels)

    def model(
        self, head: Head, *, vocab_size: int, eos_token_id: int, seed: int, labels: Sequence[str] = ()
    ) -> nn.Module:
        """The model with `head`, equal for equal arguments; vocabulary and end are those of a model from scratch.

        Raises as `load_model` and `build_model` do.
        """
        if self.folder is not None:
            return load_model(self.folder, head, labels=labels, dropout=self.config.dropout, seed=seed)
        return build_model(
            self.config, vocab_size=vocab_size, eos_token_id=eos_token_id, seed=seed, head=head, labels=labels
        )
