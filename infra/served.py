"""Which version of a model a reference stands for, as an endpoint serves it: with lineage, canary and adapters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.store.artifacts import Artifact, ArtifactStore, model_digest
from actors.store.registry import RegisteredVersion, Registry
from actors.store.tracker import tracking_uri
from configs.artifacts import Manifest, Ref
from configs.errors import ArtifactError, ConfigError, InputError
from configs.schema.serving import CanaryConfig, ModelSettings, ServedModelConfig
from pipelines.evaluation.lineage import ancestors
from serving.calls import AdapterSource, Ancestor, Lineage, Offer, ServedModel


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


def find_offers(
    models: Sequence[ServedModelConfig],
    store: ArtifactStore,
    home: Path,
    *,
    adapters: Sequence[str] = (),
    canary: CanaryConfig | None = None,
) -> tuple[Offer, ...]:
    """What several models are served as: each version as it is now, with its canary and its adapters.

    Args:
        models: with the settings of each.
        store: of artifacts.
        home: the state folder.
        adapters: more of them, each of the model that it was trained on.
        canary: one more, of the model with its name.

    Raises:
        InputError: none of the models is an adapter's, or the canary's.
        GanymedeError: as `find_model` and `offer_of`.
    """
    found = [find_model(each.model, store, home) for each in models]
    more: list[dict[str, Any]] = [{"adapters": each.adapters} for each in models]
    for reference in adapters:
        manifest = store.get(find_model(reference, store, home).ref, verify=False).manifest
        at = next((index for index, model in enumerate(found) if _is_base(model, manifest)), None)
        if at is None:
            raise _no_base(manifest, found)
        more[at]["adapters"] += (reference,)
    if canary is not None:
        name = canary.model.rpartition("/")[2].partition("@")[0]
        at = 0 if len(found) == 1 else next((i for i, model in enumerate(found) if model.name == name), None)
        if at is None:
            allowed = ", ".join(model.name for model in found)
            raise InputError("the canary is of none of the models", received=canary.model, allowed=allowed)
        more[at]["canary"] = canary
    settings = [each.model_copy(update=update) for each, update in zip(models, more, strict=True)]
    return tuple(offer_of(model, each, store, home) for model, each in zip(found, settings, strict=True))


def offer_of(model: ServedModel, settings: ModelSettings, store: ArtifactStore, home: Path) -> Offer:
    """`model` with the canary and the adapters that its settings name.

    Raises:
        ConfigError: it is an adapter itself.
        InputError: the canary is another model, or the very same version; an adapter belongs to another model.
        GanymedeError: as `find_model` and `check_adapter`.
    """
    if not (Path(model.folder) / "config.json").is_file() and (Path(model.folder) / "adapter").is_dir():
        raise ConfigError(
            f"{model.ref} is an adapter, and has no replicas of its own",
            next_step=f"serve the model it was trained on, with --adapter {model.ref} (in YAML: adapters)",
        )
    canary = None if settings.canary is None else _canary(model, settings.canary, store, home)
    adapters = tuple(_adapted(model, reference, store, home) for reference in settings.adapters)
    return Offer(replace(model, canary=canary, adapters=adapters), settings)


def check_names(offers: Sequence[Offer]) -> None:
    """Raises `ConfigError` if two models, or adapters over them, go by one name."""
    counted = Counter(each.name for offer in offers for each in (offer.model, *offer.model.adapters))
    name, count = counted.most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"clients could not tell {count} models apart: they are all called {name!r}",
            allowed="a name once; a second version of a model is its canary",
            next_step="register one of them under another name",
        )


def _canary(model: ServedModel, canary: CanaryConfig, store: ArtifactStore, home: Path) -> ServedModel:
    other = find_model(canary.model, store, home)
    if other.name != model.name or other.digest == model.digest:
        raise InputError(
            f"the canary of {model.ref} has to be another version of {model.name}",
            received=f"{canary.model}, which is {other.ref}",
            allowed=f"{model.name}@ALIAS or {model.name}@VERSION with another content",
        )
    return other


def _adapted(base: ServedModel, reference: str, store: ArtifactStore, home: Path) -> ServedModel:
    """An adapter over `base`, as a model of its own name."""
    from actors.engine.adapter_loading import check_adapter  # imports torch, which nothing else here needs

    found = find_model(reference, store, home)
    manifest = store.get(found.ref, verify=False).manifest
    if not _is_base(base, manifest):
        raise _no_base(manifest, [base])
    check_adapter(Path(base.folder), Path(found.folder))
    source = AdapterSource(found.ref, found.folder, found.digest, base.digest)
    return replace(found, digest=source.key, adapter=source, parent=base.name)


_TRAINED_ON = "model.from"
"""Role of the model that `finetune` starts from, among the inputs of what it makes."""


def _is_base(model: ServedModel, adapter: Manifest) -> bool:
    """Whether an adapter was trained on this very content."""
    if _TRAINED_ON in adapter.inputs:
        return adapter.inputs[_TRAINED_ON].digest == model.digest
    return adapter.sources.get(_TRAINED_ON) == model_digest(Path(model.folder))


def _no_base(adapter: Manifest, models: Sequence[ServedModel]) -> InputError:
    made_from = adapter.inputs.get(_TRAINED_ON)
    trained_on = adapter.sources.get(_TRAINED_ON, "nothing") if made_from is None else made_from.ref
    return InputError(
        f"{adapter.ref} is an adapter of no model that is served",
        received=f"trained on {trained_on}" + (f", digest {made_from.digest[:16]}" if made_from else ""),
        allowed="adapters of " + ", ".join(f"{model.ref}, digest {model.digest[:16]}" for model in models),
        next_step="serve the model that it was trained on",
    )


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
