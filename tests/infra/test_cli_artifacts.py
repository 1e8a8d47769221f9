"""`ganymede artifacts` on a real store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.store import lease
from actors.store.artifacts import Artifact, ArtifactStore
from configs.artifacts import Identity, Ref
from infra.cli.artifacts import superseded
from tests.infra.conftest import Ganymede


def publish(store: ArtifactStore, ref: str, **inputs: Artifact) -> Artifact:
    parsed = Ref.parse(ref)
    folder = store.staging(parsed, "test")
    (folder / "data.txt").write_text(f"content of {ref}")
    identity = Identity(parsed.kind, 1, {"ref": ref}, {role: a.digest for role, a in inputs.items()}, {})
    return store.publish(
        folder,
        ref=parsed,
        identity=identity,
        config={"steps": 3},
        inputs=inputs,
        summary={"seconds": 1.0},
        tracking_run=None,
        fence=lambda: None,
    )


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "home" / "artifacts")
    old, new = publish(store, "corpus/a@1"), publish(store, "corpus/a@2")
    publish(store, "model/m@1", corpus=old)
    publish(store, "model/m@2", corpus=new)
    return store


def test_list_and_show_tell_what_is_there(ganymede: Ganymede, store: ArtifactStore) -> None:
    refs = [entry["ref"] for entry in json.loads(ganymede("artifacts", "list", "--json").stdout)]
    assert refs == ["corpus/a@1", "corpus/a@2", "model/m@1", "model/m@2"]
    assert "model/m@2" in ganymede("artifacts", "list").stdout
    shown = ganymede("artifacts", "show", "model/m@2").stdout
    assert "corpus: corpus/a@2" in shown
    assert "data.txt" in shown


def test_verify_names_the_damaged_file_and_fails(ganymede: Ganymede, store: ArtifactStore) -> None:
    assert ganymede("artifacts", "verify").returncode == 0
    (store.path(Ref.parse("model/m@1")) / "data.txt").write_text("tampered with: model/m@1")
    done = ganymede("artifacts", "verify", "--json")
    assert done.returncode == 1
    damaged = [entry for entry in json.loads(done.stdout) if not entry["whole"]]
    assert [entry["ref"] for entry in damaged] == ["model/m@1"]
    assert "data.txt" in damaged[0]["problem"]


def test_gc_keeps_the_newest_and_what_they_were_made_from(ganymede: Ganymede, store: ArtifactStore) -> None:
    assert superseded(store.list(), 1) == {Ref.parse("corpus/a@1"), Ref.parse("model/m@1")}
    assert superseded(store.list(), 2) == set()
    planned = json.loads(ganymede("artifacts", "gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert planned["removed"] == ["corpus/a@1", "model/m@1"]
    assert len(store.list()) == 4
    assert ganymede("artifacts", "gc", "--keep", "1").returncode == 0
    assert [str(m.ref) for m in store.list()] == ["corpus/a@2", "model/m@2"]


def test_gc_removes_one_artifact_and_the_leftovers_of_killed_attempts(ganymede: Ganymede, store: ArtifactStore) -> None:
    left = store.staging(Ref.parse("model/m@3"), "killed")
    (left / "half").write_text("...")
    assert ganymede("artifacts", "gc", "--remove", "model/m@1").returncode == 0
    assert not left.exists()
    assert [str(m.ref) for m in store.list()] == ["corpus/a@1", "corpus/a@2", "model/m@2"]


def test_gc_is_refused_while_a_run_is_going_on(ganymede: Ganymede, store: ArtifactStore, tmp_path: Path) -> None:
    with lease.hold(tmp_path / "home" / "leases" / "model-m@3"):
        done = ganymede("artifacts", "gc", "--keep", "1")
    assert done.returncode == 1
    assert "is being made by process" in done.stderr
    assert len(store.list()) == 4
