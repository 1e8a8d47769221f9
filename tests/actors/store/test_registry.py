"""The registry against a real SQLite store; `test_tracker_outage.py` holds it against a server."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from actors.store.mlflow_runs import open_client
from actors.store.registry import Registry
from configs.errors import ArtifactError, TrackingError


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/sub/mlflow.db"


@pytest.fixture(scope="module")
def registry(uri):
    return Registry.open(uri)


def _register(registry, name, digest, **tags):
    return registry.register(name, ref="model/demo-finetune@1", digest=digest, run_id=None, tags=tags)


def test_one_digest_has_one_version(registry):
    first = _register(registry, "same", "d1", corpus="c1")
    again = _register(registry, "same", "d1", corpus="c1")
    other = _register(registry, "same", "d2")
    assert (first.version, again.version, other.version) == (1, 1, 2)
    assert [str(v) for v in registry.entries() if v.name == "same"] == ["same@1", "same@2"]


def test_references_resolve_to_versions(registry):
    _register(registry, "ref", "d1")
    _register(registry, "ref", "d2")
    registry.set_alias("ref", "champion", 1)
    registry.set_alias("ref", "candidate", 2)
    assert registry.resolve("ref@champion").digest == "d1"
    assert registry.resolve("ref@2").aliases == ("candidate",)
    newest = registry.resolve("ref")
    assert (newest.version, newest.ref) == (2, "model/demo-finetune@1")


def test_scores_stand_on_the_card_of_every_version_of_a_model(registry, uri):
    registry.register("scored", ref="model/a@1", digest="s1", run_id=None, tags={}, description="Passed the gate.")
    _register(registry, "other-name", "s1")
    _register(registry, "scored", "s2")
    found = registry.record_scores("s1", {"sst2.accuracy": "0.8 (0.7 to 0.9)", "mbpp.pass@1": "0.1"})
    assert [str(one) for one in found] == ["other-name@1", "scored@1"]
    registry.record_scores("s1", {"sst2.accuracy": "0.9", "squad.squad_f1": "60"})
    entry = open_client(uri).get_model_version("scored", "1")
    rows = "| mbpp.pass_at_1 | 0.1 |\n| squad.squad_f1 | 60 |\n| sst2.accuracy | 0.9 |"
    assert entry.description.startswith("Passed the gate.\n\n### Scores\n\n| task and metric | score |")
    assert entry.description.endswith(rows)
    assert entry.tags["score.sst2.accuracy"] == "0.9"
    assert "Scores" not in (open_client(uri).get_model_version("scored", "2").description or "")
    assert registry.record_scores("unknown", {"a.b": "1"}) == []


def test_an_alias_moves(registry):
    _register(registry, "move", "d1")
    _register(registry, "move", "d2")
    registry.set_alias("move", "champion", 1)
    registry.set_alias("move", "champion", 2)
    assert registry.resolve("move@champion").version == 2
    assert registry.resolve("move@1").aliases == ()


def test_an_alias_goes_back_move_by_move_by_another_process_too(registry, uri):
    for digest in ("d1", "d2", "d3"):
        _register(registry, "back", digest)
    for version in (1, 3, 3, 2):
        registry.set_alias("back", "champion", version)
    other = Registry.open(uri)
    left, now = other.roll_back("back", "champion")
    assert (left.version, now.version, now.aliases) == (2, 3, ("champion",))
    assert other.roll_back("back", "champion")[1].version == 1
    with pytest.raises(ArtifactError, match="no other version before"):
        other.roll_back("back", "champion")
    registry.set_alias("back", "champion", 2)
    assert registry.roll_back("back", "champion")[1].version == 1


def test_a_move_that_was_written_down_and_not_made_does_not_count(registry, uri):
    for digest in ("d1", "d2"):
        _register(registry, "cut", digest)
    registry.set_alias("cut", "champion", 1)
    registry.set_alias("cut", "champion", 2)
    client = open_client(uri)
    client.set_registered_model_tag("cut", "ganymede.before.champion", "1 2")
    assert registry.roll_back("cut", "champion")[1].version == 1
    client.set_registered_model_tag("cut", "ganymede.before.champion", "1")
    with pytest.raises(ArtifactError, match="no other version before"):
        registry.roll_back("cut", "champion")


def test_an_unknown_reference_names_what_there_is(registry):
    _register(registry, "known", "d1")
    registry.set_alias("known", "candidate", 1)
    with pytest.raises(ArtifactError, match=r"known@1, known@candidate"):
        registry.resolve("known@champion")
    with pytest.raises(ArtifactError, match=r"no registered model 'nobody'.*known"):
        registry.resolve("nobody@champion")


@pytest.mark.parametrize("reference", ["", "@champion", "name@", "na'me", "model/demo@1"])
def test_what_is_no_reference_is_refused(registry, reference):
    with pytest.raises(ArtifactError, match="NAME@ALIAS"):
        registry.resolve(reference)


def test_a_server_that_is_away_is_said():
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9.*cannot be reached"):
        Registry.open("http://127.0.0.1:9").resolve("x@champion")


def test_a_database_whose_making_was_killed_is_made_again(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    make = f"from actors.store.mlflow_runs import create_database; create_database({uri!r})"
    process = subprocess.Popen([sys.executable, "-c", make])
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".new-*/raw.db")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert _register(Registry.open(uri), "after", "d1").version == 1
