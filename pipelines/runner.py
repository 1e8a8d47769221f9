"""Runs a recipe: each stage once, in order, reusing what stands and resuming what was interrupted.

For every stage the runner resolves its inputs, computes its fingerprint and looks for an artifact made from it. If
there is one it is reused; otherwise the stage runs under a lease, in a work folder that belongs to the fingerprint,
and its output is published in one rename. A process killed at any moment leaves the published artifacts, the work
folder and a lease whose owner is dead: the same command goes on from there.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from actors.store import lease
from actors.store.artifacts import Artifact, ArtifactStore, remove_tree
from actors.store.tracker import Run, Tracker
from configs.artifacts import Identity, Ref
from configs.errors import ConfigError, DriftError, GanymedeError, StageError, StorageError
from configs.schema.base import Config, content_literals
from configs.schema.project import Recipe
from pipelines.corpus.known_hashes import kept_in
from pipelines.stage import Progress, Stage, StageContext

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    kind: str
    status: Literal["made", "reused", "acted"]
    ref: str | None
    digest: str | None
    seconds: float
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class RunReport:
    """What became of a recipe."""

    recipe: str
    version: int
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


class Observer(Protocol):
    """Watches a run; for terminals."""

    def stage_started(self, name: str, kind: str) -> None:
        """Called before a stage is looked up or run."""

    def stage_progress(self, name: str, progress: Progress) -> None:
        """Called from any thread, as often as the stage likes."""

    def stage_finished(self, name: str, outcome: Outcome) -> None:
        """Called once the stage's result stands."""


@dataclass(frozen=True)
class _Plan:
    """One stage with everything that decides its content."""

    name: str
    config: Config
    stage: Stage[Any]
    inputs: Mapping[str, Artifact]
    acted: Mapping[str, Mapping[str, Any]]


class Runner:
    """Runs the stages of one recipe against one store."""

    def __init__(
        self,
        recipe: Recipe,
        store: ArtifactStore,
        tracker: Tracker,
        home: Path,
        stages: Mapping[str, Stage[Any]],
        observer: Observer,
    ) -> None:
        self.recipe = recipe
        self.store = store
        self.tracker = tracker
        self.home = home
        self.stages = stages
        self.observer = observer
        self._artifacts: dict[str, Artifact] = {}
        self._summaries: dict[str, Mapping[str, Any]] = {}

    def run(self, *, only: str | None = None, start: str | None = None) -> RunReport:
        """Runs the recipe.

        Args:
            only: run this stage alone; its inputs must stand.
            start: leave out the stages before this one; what they made must stand.

        Raises:
            GanymedeError: a stage cannot be done; what the stages before it published stays.
            KeyboardInterrupt: passed on once the stage's lease is given back.
        """
        chosen = self._chosen(only, start)
        project_key = f"{self.recipe.name}@{self.recipe.version}"
        project = self.tracker.run(project_key, project_key, tags={"ganymede.recipe": self.recipe.name})
        with _ending(project), kept_in(self.home / "hashes"):
            outcomes = [self._run_stage(name, project_key) for name in self.recipe.order() if name in chosen]
        return RunReport(self.recipe.name, self.recipe.version, tuple(outcomes))

    def _chosen(self, only: str | None, start: str | None) -> set[str]:
        order = self.recipe.order()
        for option, name in (("--only", only), ("--from", start)):
            if name is not None and name not in order:
                raise ConfigError(f"{option} names no stage", received=name, allowed=", ".join(order))
        if only is not None:
            return {only}
        return set(order[order.index(start) :] if start is not None else order)

    def _run_stage(self, name: str, project_key: str) -> Outcome:
        plan = self._plan(name)
        kind = plan.stage.kind
        self.observer.stage_started(name, kind)
        began = time.monotonic()
        if plan.stage.artifact_kind is None:
            summary = self._act(plan, project_key)
            outcome = Outcome(name, kind, "acted", None, None, time.monotonic() - began, summary)
        else:
            artifact, status = self._make_or_reuse(plan, plan.stage.artifact_kind, project_key)
            self._artifacts[name] = artifact
            summary = artifact.manifest.summary
            seconds = time.monotonic() - began
            outcome = Outcome(name, kind, status, str(artifact.ref), artifact.digest, seconds, summary)
        self._summaries[name] = outcome.summary
        self.observer.stage_finished(name, outcome)
        return outcome

    def _plan(self, name: str) -> _Plan:
        inputs: dict[str, Artifact] = {}
        acted: dict[str, Mapping[str, Any]] = {}
        for role, reference in self.recipe.inputs(name).items():
            if reference in self.recipe.stages:
                if self._kind(reference).artifact_kind is None:
                    acted[role] = self._summaries.get(reference, {})
                else:
                    inputs[role] = self._artifacts.get(reference) or self._standing(reference)
            elif "/" in reference:
                inputs[role] = self.store.get(reference)
        return _Plan(name, self.recipe.stages[name], self._kind(name), inputs, acted)

    def _kind(self, name: str) -> Stage[Any]:
        return self.stages[self.recipe.stages[name].kind]

    def _identity(self, plan: _Plan, artifact_kind: str) -> Identity:
        digests = {role: artifact.digest for role, artifact in plan.inputs.items()}
        sources = plan.stage.sources(plan.config)
        return Identity(artifact_kind, plan.stage.code_version, content_literals(plan.config), digests, sources)

    def _ref(self, name: str, artifact_kind: str) -> Ref:
        return Ref(artifact_kind, f"{self.recipe.name}-{name}", self.recipe.version)

    def _standing(self, name: str) -> Artifact:
        """The artifact of a stage that this run leaves out."""
        plan = self._plan(name)
        artifact_kind = str(plan.stage.artifact_kind)
        ref = self._ref(name, artifact_kind)
        found = self.store.find(artifact_kind, ref.name, self._identity(plan, artifact_kind).fingerprint)
        if found is None:
            raise ConfigError(
                f"stage {name!r} was left out, but no artifact {ref} made from this config stands",
                next_step=f"ganymede run {self.recipe.name} --from {name}",
            )
        self._artifacts[name] = found
        return found

    def _make_or_reuse(
        self, plan: _Plan, artifact_kind: str, project_key: str
    ) -> tuple[Artifact, Literal["made", "reused"]]:
        """The artifact of a stage, and whether it stood already."""
        ref = self._ref(plan.name, artifact_kind)
        identity = self._identity(plan, artifact_kind)
        found = self.store.find(artifact_kind, ref.name, identity.fingerprint)
        if found is not None:
            return found, "reused"
        with lease.hold(self.home / "leases" / f"{ref.kind}-{ref.name}@{ref.version}") as held:
            found = self.store.find(artifact_kind, ref.name, identity.fingerprint)
            if found is not None:  # published by the run that held the lease before us
                return found, "reused"
            self._refuse_drift(ref, identity)
            return self._make(plan, ref, identity, held, project_key), "made"

    def _make(self, plan: _Plan, ref: Ref, identity: Identity, held: lease.Lease, project_key: str) -> Artifact:
        label = f"{ref.kind}-{ref.name}-{identity.fingerprint[:16]}"
        config = plan.config.model_dump(mode="json")
        tags = _lineage_tags(ref, identity, plan.inputs)
        run = self.tracker.run(label, plan.name, parent=project_key, tags=tags)
        work = self.home / "work" / label
        with _ending(run), _as_user_errors(plan.name):
            work.mkdir(parents=True, exist_ok=True)
            out = self.store.staging(ref, held.nonce)
            try:
                run.log_json(config, "config.json")
                summary = plan.stage.run(plan.config, plan.inputs, self._context(plan, work, out, run, held))
                artifact = self.store.publish(
                    out,
                    ref=ref,
                    identity=identity,
                    config=config,
                    inputs=plan.inputs,
                    summary=summary,
                    tracking_run=run.id,
                    fence=held.check,
                )
            finally:
                remove_tree(out)
            run.set_tags({"ganymede.digest": artifact.digest})
            remove_tree(work)
        return artifact

    def _act(self, plan: _Plan, project_key: str) -> dict[str, Any]:
        label = f"{self.recipe.name}-{plan.name}@{self.recipe.version}"
        with lease.hold(self.home / "leases" / f"{plan.stage.kind}-{label}") as held:
            run = self.tracker.run(label, plan.name, parent=project_key)
            work = self.home / "work" / f"{plan.stage.kind}-{label}"
            with _ending(run), _as_user_errors(plan.name):
                work.mkdir(parents=True, exist_ok=True)
                summary = plan.stage.run(plan.config, plan.inputs, self._context(plan, work, work, run, held))
                remove_tree(work)
        return summary

    def _context(self, plan: _Plan, work: Path, out: Path, run: Run, held: lease.Lease) -> StageContext:
        return StageContext(
            name=plan.name,
            work=work,
            out=out,
            run=run,
            progress=lambda progress: self.observer.stage_progress(plan.name, progress),
            check_lease=held.check,
            store=self.store,
            home=self.home,
            acted=plan.acted,
        )

    def _refuse_drift(self, ref: Ref, identity: Identity) -> None:
        if ref.version not in self.store.versions(ref.kind, ref.name):
            return
        standing = self.store.get(ref, verify=False).manifest
        newest = max(self.store.versions(ref.kind, ref.name))
        raise DriftError(
            f"{ref} stands, made from something else",
            received="; ".join(standing.identity.differences(identity)),
            allowed="the same config, inputs and code, or another version",
            next_step=f"ganymede run ... --set version={newest + 1} keeps both (unchanged stages are reused)",
        )


def _lineage_tags(ref: Ref, identity: Identity, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    lineage = {f"ganymede.input.{role}": f"{a.ref} {a.digest}" for role, a in inputs.items()}
    sources = {f"ganymede.source.{role}": digest for role, digest in identity.sources.items()}
    return {"ganymede.artifact": str(ref), "ganymede.fingerprint": identity.fingerprint, **lineage, **sources}


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Closes a tracker run with the status that the block ends in."""
    try:
        yield
    except KeyboardInterrupt:
        run.end("KILLED")
        raise
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


@contextmanager
def _as_user_errors(stage: str) -> Iterator[None]:
    """Turns what a stage raised into the project's errors; the cause stays attached for `--debug`."""
    try:
        yield
    except GanymedeError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, GanymedeError):
                raise cause from error
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS:
                raise StorageError(
                    f"stage {stage}: storage refused a write: {cause}",
                    next_step="free space or fix permissions, then run the same command: it goes on where it stopped",
                ) from error
        raise StageError(
            f"stage {stage} failed: {type(error).__name__}: {str(error).strip()}",
            next_step="run the same command with --debug for the traceback; finished work is kept",
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it; Ray keeps a task's own error in `cause`."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [getattr(current, "cause", None), current.__cause__, current.__context__]
