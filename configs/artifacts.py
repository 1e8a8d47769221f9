"""What an artifact is: names, manifests, fingerprints, digests.

An artifact is a folder `<kind>/<name>@<version>/` whose `manifest.json` is written last. Its *fingerprint* covers what
decides the content (config literals, input digests, the stage's code version); its *digest* covers the content itself
(kind, and each file's path, size and blake3). Neither depends on paths, worker counts or the clock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from configs.errors import ArtifactError

MANIFEST = "manifest.json"
_REF = re.compile(r"^(?P<kind>[a-z][a-z0-9-]*)/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<version>[1-9][0-9]*)$")


@dataclass(frozen=True, order=True)
class Ref:
    """The address of an artifact in a store: `kind/name@version`."""

    kind: str
    name: str
    version: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `ArtifactError` unless `text` reads `kind/name@version`."""
        match = _REF.match(text)
        if match is None:
            raise ArtifactError(
                "not an artifact reference",
                received=text,
                allowed="kind/name@version, e.g. model/demo-finetune@1",
                next_step="ganymede artifacts list",
            )
        return cls(match["kind"], match["name"], int(match["version"]))

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """One file of an artifact; `path` is relative, with forward slashes."""

    path: str
    size_bytes: int
    blake3: str


class InputRecord(_Record):
    """One artifact that an artifact was made from."""

    ref: str
    digest: str


class Manifest(_Record):
    """Everything known of an artifact. Two artifacts with one digest hold the same bytes."""

    format: Literal[1] = 1
    kind: str
    name: str
    version: int
    digest: str
    fingerprint: str
    code_version: int
    config: dict[str, Any]
    """The stage's resolved config, placement fields included."""
    literals: dict[str, Any]
    """The part of the config that the fingerprint covers."""
    inputs: dict[str, InputRecord]
    sources: dict[str, str]
    """Digests of data from outside the store, by role."""
    files: tuple[FileRecord, ...]
    summary: dict[str, Any]
    """Sizes, scores, speeds and times of the run that made it; no part of the digest."""
    packages: dict[str, str]
    """Versions of Python, Ganymede and the packages it is built on."""
    tracking_run: str | None
    """MLflow run id, when there is one."""
    created_at: str
    """ISO 8601, UTC."""

    @property
    def ref(self) -> Ref:
        """Its address."""
        return Ref(self.kind, self.name, self.version)

    @property
    def identity(self) -> Identity:
        """What its fingerprint was computed from."""
        digests = {role: record.digest for role, record in self.inputs.items()}
        return Identity(self.kind, self.code_version, self.literals, digests, self.sources)


@dataclass(frozen=True)
class Identity:
    """What decides the content of a stage's artifact."""

    kind: str
    code_version: int
    literals: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Digest of each input artifact, by role."""
    sources: Mapping[str, str]

    def fields(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {
            "kind": self.kind,
            "code_version": self.code_version,
            "config": dict(self.literals),
            "inputs": dict(self.inputs),
            "sources": dict(self.sources),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all fields, hex."""
        return hash_json(self.fields())

    def differences(self, other: Identity) -> list[str]:
        """One line for each key in which `other` differs: `config.model.layers: 4 -> 6`."""
        mine, theirs = _flat(self.fields()), _flat(other.fields())
        keys = sorted(mine.keys() | theirs.keys())
        missing = "(absent)"
        return [
            f"{key}: {mine.get(key, missing)} -> {theirs.get(key, missing)}"
            for key in keys
            if mine.get(key, missing) != theirs.get(key, missing)
        ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def content_digest(kind: str, files: Iterable[FileRecord]) -> str:
    """Digest of an artifact's content: its kind, and path, size and blake3 of each file."""
    return hash_json([kind, sorted([f.path, f.size_bytes, f.blake3] for f in files)])


class TextContract(_Record):
    """Tokenizer, chat template and special tokens, pinned by a hash and a few prompts with their token ids."""

    hash: str
    """SHA-256 over the tokenizer's JSON, the chat template and the special tokens."""
    golden: tuple[tuple[str, tuple[int, ...]], ...]
    """Prompt and its token ids; every holder of the tokenizer must give these."""
    golden_chat: tuple[tuple[tuple[tuple[str, str], ...], tuple[int, ...]], ...]
    """Messages as (role, content) pairs, and the ids of the rendered chat with the generation prompt."""
