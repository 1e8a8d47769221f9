"""Moves an alias of the registry to another version of a model, if the evaluation reports in the store say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors.store.artifacts import ArtifactStore
from actors.store.registry import RegisteredVersion, Registry
from actors.store.tracker import tracking_uri
from configs.schema.evaluation import Conditions
from pipelines.evaluation.gate import Decision, gate
from pipelines.evaluation.promotion import measure


@dataclass(frozen=True)
class Promotion:
    """What came of it."""

    candidate: RegisteredVersion
    alias: str
    holder: RegisteredVersion | None
    """The version that had the alias before, if there was one."""
    decision: Decision
    moved: bool
    """Whether the alias stands for the candidate now, and did not before."""
    reports: tuple[str, ...]
    """That were decided by."""

    @property
    def standing(self) -> bool:
        """Whether the candidate had the alias already, so that there was nothing to decide."""
        return self.holder is not None and self.holder.version == self.candidate.version


def promote(model: str, alias: str, conditions: Conditions, *, home: Path, dry_run: bool) -> Promotion:
    """Decides by the reports on `model` and on the version that has the alias, and moves it unless this is a dry run.

    Raises:
        ArtifactError: there is no such model.
        CorruptArtifactError: a report is not what was published.
        DataError: a report that is needed is not there.
        TrackingError: the registry cannot be reached.
    """
    registry = Registry.open(tracking_uri(home))
    candidate = registry.resolve(model)
    holder = registry.holder(candidate.name, alias)
    if holder is not None and holder.version == candidate.version:
        return Promotion(candidate, alias, holder, Decision(True, ()), False, ())
    scores, reports = measure(candidate, holder, ArtifactStore(home / "artifacts"))
    decision = gate(scores, conditions)
    moved = decision.passed and not dry_run
    if moved:
        registry.set_alias(candidate.name, alias, candidate.version)
    return Promotion(candidate, alias, holder, decision, moved, tuple(reports))
