"""Which version of a model a reference stands for, as an endpoint serves it: with its lineage, and with its canary."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.registry import RegisteredVersion, Registry
from actors.store.tracker import tracking_uri
from configs.artifacts import Ref
from configs.errors import ArtifactError, InputError
from configs.schema.serving import CanaryConfig
from pipelines.evaluation.lineage import ancestors
from serving.calls import Ancestor, Lineage, ServedModel


def find_model(reference: str, store: ArtifactStore, home: Path) -> ServedModel:
    """The immutable version that `NAME@ALIAS`, `NAME@VERSION`, `NAME` or `model/NAME@VERSION` stands for now.

    Raises:
        ArtifactError: there is none, or its artifact is not in this store.
        CorruptArtifactError: the artifact is not what was published.
        TrackingError: the registry cannot be reached.
    """
    if "/" in reference:
        artifact = store.get(Ref.parse(reference))
        return _served(artifact, store, name=artifact.ref.name, version=None, alias=None)
    version = Registry.open(tracking_uri(home)).resolve(reference)
    return _registered(version, reference.partition("@")[2] or None, store)


def with_canary(model: ServedModel, canary: CanaryConfig | None, store: ArtifactStore, home: Path) -> ServedModel:
    """`model` with the version beside it that is to get a share of its requests, if there is to be one.

    Raises:
        InputError: that is another model, or the very same version.
        GanymedeError: as `find_model`.
    """
    if canary is None:
        return model
    other = find_model(canary.model, store, home)
    if other.name != model.name or other.digest == model.digest:
        raise InputError(
            f"the canary of {model.ref} has to be another version of {model.name}",
            received=f"{canary.model}, which is {other.ref}",
            allowed=f"{model.name}@ALIAS or {model.name}@VERSION with another content",
        )
    return replace(model, canary=other)


def _registered(version: RegisteredVersion, selector: str | None, store: ArtifactStore) -> ServedModel:
    artifact = store.get(version.ref)
    if artifact.digest != version.digest:
        raise ArtifactError(
            f"{version} is registered with another content than {version.ref} has in this store",
            received=artifact.digest[:16],
            allowed=version.digest[:16],
            next_step="set GANYMEDE_HOME to the store it was registered from, or run the recipe again",
        )
    alias = selector if selector in version.aliases else None
    return _served(artifact, store, name=version.name, version=version.version, alias=alias)


def _served(
    artifact: Artifact, store: ArtifactStore, *, name: str, version: int | None, alias: str | None
) -> ServedModel:
    if artifact.ref.kind != "model":
        raise ArtifactError("only models can be served", received=str(artifact.ref), allowed="model/NAME@VERSION")
    return ServedModel(
        name,
        str(artifact.path),
        str(artifact.ref),
        artifact.digest,
        version,
        alias,
        created=int(time.time()),
        lineage=_lineage(artifact, store),
    )


def _lineage(artifact: Artifact, store: ArtifactStore) -> Lineage:
    """What the model was made from, and the reports that any of the store's evaluations made of this content."""
    _, *sources = ancestors([artifact.manifest], store)
    reports = [
        manifest
        for manifest in store.list()
        if manifest.kind == "report" and artifact.digest in {record.digest for record in manifest.inputs.values()}
    ]
    return Lineage(
        artifact.manifest.tracking_run,
        tuple(Ancestor(ref, digest, None if m is None else m.tracking_run) for ref, digest, m in sources),
        tuple(Ancestor(str(manifest.ref), manifest.digest, manifest.tracking_run) for manifest in reports),
    )
