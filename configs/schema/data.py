"""What a pretraining run reads: how documents become rows, and which corpus gives how much from which step on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.schema.base import Config

Layout = Literal["concat", "best_fit", "one_document"]
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]

MAX_PERIOD = 10_000
"""Largest sum of the weights of a phase, after they are divided by what they have in common."""


class Phase(Config):
    """Weights that hold from a step (of the training run) on."""

    from_step: Annotated[int, Field(ge=0)] = 0
    weights: Mapping[str, Annotated[int, Field(ge=0)]]
    """Samples of each corpus in a period; 0 leaves a corpus out."""


def check_phases(phases: Sequence[Phase]) -> Sequence[Phase]:
    """Returns `phases`, which begin at rising steps from 0 and give weights to the same names.

    Raises:
        ValueError: they do not, a phase has no weight above 0, or a period is too long.
    """
    steps = [phase.from_step for phase in phases]
    if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
        raise ValueError(f"weights change at steps {steps}; allowed: rising steps from 0")
    for phase in phases:
        weights = dict(phase.weights)
        where = f"the mixture from step {phase.from_step}"
        if weights.keys() != phases[0].weights.keys():
            raise ValueError(
                f"{where} names other corpora than the first phase: received {', '.join(sorted(weights))}; "
                f"allowed: {', '.join(sorted(phases[0].weights))}; weight 0 leaves a corpus out"
            )
        if not any(weights.values()):
            raise ValueError(f"{where} has no weight above 0: received {weights}; allowed: at least one above 0")
        if sum(weights.values()) // math.gcd(*weights.values()) > MAX_PERIOD:
            raise ValueError(
                f"{where} has too long a period: received {weights}; "
                f"allowed: a sum of at most {MAX_PERIOD:,} after dividing by what the weights have in common"
            )
    return phases


def _phases(value: Any) -> Any:
    """Weights alone hold from the first step on."""
    return [{"weights": value}] if isinstance(value, Mapping) else value


class DataConfig(Config):
    """Rows from documents, and documents from corpora."""

    packing: Layout = "concat"
    """`concat`: all documents one after the other, cut every `context_length`. `best_fit`: no document that fits in a
    row is cut. `one_document`: one document a row, its rest dropped."""
    attention: Literal["row", "document"] | None = None
    """`document` keeps attention within documents, and predicts none from the one before. Unless set, `row` for packing
    `concat` and `document` for the others, which have no other."""
    mixture: Annotated[tuple[Phase, ...], BeforeValidator(_phases), AfterValidator(check_phases)] | None = None
    """Whole-number weights of several corpora by name (`{web: 3, code: 1}`: three samples of four from `web`, in every
    batch), or a list of phases (`{from_step: 1000, weights: {web: 1, code: 1}}`)."""

    @property
    def within_documents(self) -> bool:
        """Whether attention stays within documents."""
        return self.packing != "concat" or self.attention == "document"

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if self.packing != "concat" and self.attention == "row":
            raise ValueError(f"attention row is for packing concat; packing {self.packing} keeps within documents")
        return self

    def check_names(self, corpora: Sequence[str], steps: int) -> None:
        """Raises `ValueError` if the mixture does not fit `corpora` (none if there is but one without a name), or has a
        phase that a run of `steps` never reaches.
        """
        if self.mixture is None:
            if len(corpora) > 1:
                raise ValueError(f"several corpora need weights: set data.mixture for {', '.join(corpora)}")
            return
        if not corpora:
            raise ValueError("data.mixture is for corpora with names; allowed: corpus: {NAME: STAGE, ...}")
        names = set(self.mixture[0].weights)
        if names != set(corpora):
            raise ValueError(
                f"data.mixture gives weights to other corpora than there are: received {', '.join(sorted(names))}; "
                f"allowed: {', '.join(corpora)}; weight 0 leaves a corpus out"
            )
        unused = [name for name in corpora if not any(phase.weights[name] for phase in self.mixture)]
        if unused:
            raise ValueError(f"data.mixture never takes from {', '.join(unused)}: leave it out of corpus, or weigh it")
        if self.mixture[-1].from_step >= steps:
            raise ValueError(
                f"data.mixture changes at step {self.mixture[-1].from_step}, which is never reached; "
                f"allowed: below training.steps, {steps}"
            )
