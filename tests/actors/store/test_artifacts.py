"""The store publishes whole artifacts or none, and notices every damaged byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.store.artifacts import Artifact, ArtifactStore
from configs.artifacts import MANIFEST, Identity, Ref
from configs.errors import ArtifactError, CorruptArtifactError, LeaseError, StorageError

REF = Ref("dataset", "toy", 1)
IDENTITY = Identity("dataset", 1, {"rows": 3}, {}, {"text": "abc"})


def publish(store: ArtifactStore, ref: Ref = REF, identity: Identity = IDENTITY, text: str = "hello") -> Artifact:
    out = store.staging(ref, "owner")
    (out / "part").mkdir()
    (out / "part" / "a.txt").write_text(text)
    (out / "b.txt").write_text("second")
    return store.publish(
        out, ref=ref, identity=identity, config={"rows": 3}, inputs={}, summary={"n": 1}, tracking_run=None,
        fence=lambda: None,
    )  # fmt: skip


def test_a_published_artifact_is_read_back_with_its_manifest(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    published = publish(store)
    read = store.get("dataset/toy@1")
    assert read == published
    assert (read.path / "part" / "a.txt").read_text() == "hello"
    assert [f.path for f in read.manifest.files] == ["b.txt", "part/a.txt"]
    assert read.manifest.identity == IDENTITY
    assert [str(m.ref) for m in store.list()] == ["dataset/toy@1"]


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first = publish(ArtifactStore(tmp_path / "one"))
    other_version = publish(ArtifactStore(tmp_path / "two"), Ref("dataset", "renamed", 7))
    other_text = publish(ArtifactStore(tmp_path / "three"), text="hellp")
    assert first.digest == other_version.digest != other_text.digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "moved"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    store = ArtifactStore(tmp_path)
    path = publish(store).path / "part" / "a.txt"
    if damage == "flip":
        path.write_text("jello")
    elif damage == "truncate":
        path.write_text("hell")
    elif damage == "delete":
        path.unlink()
    elif damage == "manifest":
        path = path.parent.parent / MANIFEST
        path.write_text(path.read_text().replace('"size_bytes": 5', '"size_bytes": 6'))
    else:
        path.parent.parent.rename(tmp_path / "dataset" / "toy@2")
        path = tmp_path / "dataset" / "toy@2" / MANIFEST
    with pytest.raises(CorruptArtifactError) as caught:
        store.get(Ref("dataset", "toy", 2 if damage == "moved" else 1))
    assert str(path) in caught.value.what


def test_nothing_is_visible_before_the_rename_and_a_lost_lease_publishes_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    out = store.staging(REF, "loser")
    (out / "a.txt").write_text("x")

    def fence() -> None:
        assert store.list() == []
        raise LeaseError("taken over")

    with pytest.raises(LeaseError):
        store.publish(out, ref=REF, identity=IDENTITY, config={}, inputs={}, summary={}, tracking_run=None, fence=fence)
    assert store.list() == []


def test_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = publish(store)
    with pytest.raises(ArtifactError, match="stands already"):
        publish(store, text="other")
    assert store.get(REF) == first


def test_an_empty_artifact_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    out = store.staging(REF, "owner")
    with pytest.raises(StorageError, match="nothing to publish"):
        store.publish(
            out, ref=REF, identity=IDENTITY, config={}, inputs={}, summary={}, tracking_run=None, fence=lambda: None
        )


def test_find_goes_by_fingerprint_over_all_versions(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    other = Identity("dataset", 1, {"rows": 4}, {}, {"text": "abc"})
    second = publish(store, Ref("dataset", "toy", 2), other, "four")
    assert store.find("dataset", "toy", other.fingerprint) == second
    assert store.find("dataset", "toy", "0" * 64) is None
    assert IDENTITY.differences(other) == ["config.rows: 3 -> 4"]


def test_an_unknown_artifact_error_lists_what_there_is(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    with pytest.raises(ArtifactError) as caught:
        store.get("model/toy@1")
    assert caught.value.allowed == "dataset/toy@1"
    with pytest.raises(ArtifactError, match="not an artifact reference"):
        store.get("../../etc/passwd@1")


def test_removal_takes_the_whole_artifact_damaged_or_not(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    manifest = publish(store).path / MANIFEST
    manifest.write_text("{}")
    with pytest.raises(CorruptArtifactError):
        store.get(REF)
    store.remove(REF)
    assert store.list() == []
    publish(store)
    with pytest.raises(ArtifactError, match="no artifact dataset/toy@2"):
        store.remove(Ref("dataset", "toy", 2))
