"""The model registry: names and aliases over published model artifacts, kept in MLflow's Model Registry.

A registered version points at one artifact, by reference and digest, and never changes; aliases (`candidate`,
`champion`) move, and the registry keeps where they were, in a tag: `roll_back` goes there. Moves of one alias by two
processes at once are not told apart, the last one stands. The source that MLflow shows is `ganymede:/<ref>`: a server
takes no local path that lies outside the artifacts of one of its runs, and a store of its own takes anything, so this
form works with both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from actors.store.mlflow_runs import is_refusal, open_client
from configs.errors import ArtifactError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REFERENCE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<selector>[A-Za-z0-9._-]+))?$")
_REF, _DIGEST = "ganymede.ref", "ganymede.digest"
_BEFORE = "ganymede.before."
"""Tag of a registered model, with the name of an alias: the versions it pointed at before, the latest last."""
_SCORE = "score."
"""Tag of a version, with task and metric: what it reached."""
_SCORES = "### Scores"
"""Heading of the table of them in a version's description, its last part."""
_MOST_MOVES = 200
"""Of each alias that are kept: MLflow cuts a tag at 5,000 characters."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One immutable entry of the registry."""

    name: str
    version: int
    ref: str
    """The model artifact, `kind/name@version`."""
    digest: str
    aliases: tuple[str, ...]
    """The aliases that point at it now, sorted."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class Registry:
    """The registry behind one tracking URI. Every method raises `TrackingError` if it cannot be reached."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri

    @classmethod
    def open(cls, uri: str) -> Self:
        """Opens the registry at an MLflow tracking URI; a fresh SQLite store is made on first use."""
        with _reaching(uri):
            return cls(open_client(uri), uri)

    def register(
        self, name: str, *, ref: str, digest: str, run_id: str | None, tags: Mapping[str, str], description: str = ""
    ) -> RegisteredVersion:
        """Enters a model artifact, or finds its entry: one digest has one version under a name.

        Args:
            run_id: the MLflow run that made the model.
            tags: lineage; on an entry that stands they are brought up to date.
        """
        with _reaching(self._uri):
            standing = next((v for v in self._versions(name) if v.digest == digest), None)
            if standing is None:
                self._make_name(name)
                all_tags = {**tags, _REF: ref, _DIGEST: digest}
                made = self._client.create_model_version(
                    name, f"ganymede:/{ref}", run_id=run_id, tags=all_tags, description=description
                )
                return _to_version(made, ())
            for key, value in tags.items():
                self._client.set_model_version_tag(name, str(standing.version), key, value)
            return standing

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Points `alias` at `version`; it leaves the version it pointed at before, which `roll_back` goes back to.

        What it pointed at is written down first: a process that is killed in between has moved nothing, and a version
        that is written down while the alias still points at it does not count.
        """
        with _reaching(self._uri):
            now, before = self._moves(name, alias)
            if now == version:
                return
            if now is not None:
                self._remember(name, alias, [*before, now])
            self._client.set_registered_model_alias(name, alias, str(version))

    def roll_back(self, name: str, alias: str) -> tuple[RegisteredVersion, RegisteredVersion]:
        """Points `alias` at the version before the last `set_alias`; each call goes one move further back.

        Returns:
            The version it left, and the one it points at now.

        Raises:
            ArtifactError: there is no such alias, it was never moved, or the version before is no longer registered.
        """
        left = self.resolve(f"{name}@{alias}")
        with _reaching(self._uri):
            _, before = self._moves(name, alias)
        if not before:
            raise ArtifactError(
                f"{name}@{alias} has pointed at no other version before", received=str(left),
                next_step=f"ganymede promote {name}@VERSION --to {alias}",
            )  # fmt: skip
        self.resolve(f"{name}@{before[-1]}")
        with _reaching(self._uri):
            self._client.set_registered_model_alias(name, alias, str(before[-1]))
            self._remember(name, alias, before[:-1])
        return left, self.resolve(f"{name}@{before[-1]}")

    def resolve(self, reference: str) -> RegisteredVersion:
        """The version that `NAME@ALIAS`, `NAME@VERSION` or `NAME` (its newest version) stands for now.

        Raises:
            ArtifactError: there is none; says what there is.
        """
        match = _REFERENCE.match(reference)
        if match is None:
            raise ArtifactError(
                "not a reference to a registered model",
                received=reference,
                allowed="NAME, NAME@VERSION or NAME@ALIAS, e.g. demo@champion",
            )
        name, selector = match["name"], match["selector"]
        with _reaching(self._uri):
            versions = self._versions(name)
            if not versions:
                raise ArtifactError(
                    f"no registered model {name!r} in {self._uri}",
                    allowed=", ".join(self._names()) or "the registry is empty",
                    next_step="ganymede run RECIPE registers one",
                )
        if selector is None:
            return versions[-1]
        for version in versions:
            if selector == str(version.version) or selector in version.aliases:
                return version
        known = [f"{name}@{each}" for v in versions for each in (str(v.version), *v.aliases)]
        raise ArtifactError("no such registered version", received=reference, allowed=", ".join(known))

    def holder(self, name: str, alias: str) -> RegisteredVersion | None:
        """The version of `name` that `alias` points at now, if it points at any."""
        with _reaching(self._uri):
            return next((version for version in self._versions(name) if alias in version.aliases), None)

    def record_scores(self, digest: str, scores: Mapping[str, str]) -> list[RegisteredVersion]:
        """Enters what a model reached on the card of its versions: as tags, and as a table of their descriptions.

        Args:
            scores: by `TASK.METRIC`; what stands there under other names stays.

        Returns the versions of the model, of any name; none if it is not registered.
        """
        named = {_SCORE + name.replace("@", "_at_"): value for name, value in scores.items()}
        with _reaching(self._uri):
            found = [entry for entry in self.entries() if entry.digest == digest]
            for one in found:
                name, number = one.name, str(one.version)
                for key, value in named.items():
                    self._client.set_model_version_tag(name, number, key, value)
                entry = self._client.get_model_version(name, number)
                told = sorted((k.removeprefix(_SCORE), v) for k, v in entry.tags.items() if k.startswith(_SCORE))
                rows = [f"| {key} | {value} |" for key, value in told]
                table = "\n".join([_SCORES, "", "| task and metric | score |", "|---|---|", *rows])
                before = (entry.description or "").partition(_SCORES)[0].rstrip()
                self._client.update_model_version(name, number, "\n\n".join(filter(None, [before, table])))
            return found

    def entries(self) -> list[RegisteredVersion]:
        """Every registered version, by name and version."""
        with _reaching(self._uri):
            return [version for name in self._names() for version in self._versions(name)]

    def _names(self) -> list[str]:
        return sorted(model.name for model in _pages(self._client.search_registered_models))

    def _moves(self, name: str, alias: str) -> tuple[int | None, list[int]]:
        """The version that `alias` points at, and those before it, the latest last."""
        model = self._client.get_registered_model(name)
        now = int(model.aliases[alias]) if alias in model.aliases else None
        before = [int(version) for version in model.tags.get(f"{_BEFORE}{alias}", "").split()]
        while before and before[-1] == now:
            before.pop()
        return now, before

    def _remember(self, name: str, alias: str, before: list[int]) -> None:
        self._client.set_registered_model_tag(name, f"{_BEFORE}{alias}", " ".join(map(str, before[-_MOST_MOVES:])))

    def _make_name(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, name: str) -> list[RegisteredVersion]:
        """The versions of `name` that point at artifacts of ours, ascending; none if there is no such name."""
        found = list(_pages(self._client.search_model_versions, filter_string=f"name = '{name}'"))
        if not found:
            return []
        aliases = self._client.get_registered_model(name).aliases
        versions = [
            _to_version(v, tuple(sorted(a for a, version in aliases.items() if str(version) == str(v.version))))
            for v in found
            if _DIGEST in v.tags
        ]
        return sorted(versions, key=lambda v: v.version)


def _pages(search: Any, **kwargs: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **kwargs)
        yield from page
        token = page.token
        if not token:
            return


def _to_version(entry: Any, aliases: tuple[str, ...]) -> RegisteredVersion:
    return RegisteredVersion(entry.name, int(entry.version), entry.tags[_REF], entry.tags[_DIGEST], aliases)


@contextmanager
def _reaching(uri: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        if not hasattr(error, "error_code"):
            raise
        refused = is_refusal(error)
        raise TrackingError(
            f"the model registry at {uri} {'refuses the request' if refused else 'cannot be reached'}: {error}",
            next_step=None if refused else "start the server or unset MLFLOW_TRACKING_URI, then run the same command",
        ) from error
