"""What a stage is, and what it is given to run with.

A stage is a function of its config and its input artifacts. It writes its files below `context.out` and returns a
summary; the runner publishes. What must survive a kill it keeps below `context.work`, a folder that belongs to the
stage's fingerprint: a later run of the same stage finds there what the killed one left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import Run
from configs.schema.base import Config


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `done` of `total` in `unit`s, and what is worth showing beside it."""

    done: float
    total: float
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    """A sentence that a person should see, and that stays."""


@dataclass(frozen=True)
class StageContext:
    """What the runner hands a stage."""

    name: str
    """The stage's name in the recipe."""
    work: Path
    """Durable scratch folder of this fingerprint; kept across kills, removed once the artifact is published."""
    out: Path
    """Empty folder whose content becomes the artifact; unused by a stage that publishes none."""
    run: Run
    """The stage's run in the tracker."""
    progress: Callable[[Progress], None]
    check_lease: Callable[[], None]
    """Raises `LeaseError` if another run has taken over; may be sent to workers, which call it before a durable
    step."""
    store: ArtifactStore
    home: Path
    """`GANYMEDE_HOME`: logs, the local MLflow store, the platform's state."""
    acted: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By role, the summary of an input that is a stage without an artifact (a `register` that a `deploy` names)."""


C = TypeVar("C", bound=Config, contravariant=True)


class Stage(Protocol[C]):
    """One kind of stage; implementations hold no state."""

    kind: ClassVar[str]
    """Key in recipes."""
    artifact_kind: ClassVar[str | None]
    """Kind of the artifact it publishes; None for a stage that acts (register, deploy) and runs every time."""
    code_version: ClassVar[int]
    """Raised whenever the code would make other content from the same config and inputs."""

    def sources(self, config: C) -> Mapping[str, str]:
        """Digests, by role, of data from outside the store. Raises `DataError` if there is none."""
        ...

    def run(self, config: C, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Does the work; returns the summary (sizes, scores, speeds) for the manifest and the tracker."""
        ...
