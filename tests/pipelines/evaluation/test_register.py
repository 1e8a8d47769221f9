"""The register stage against a real SQLite registry."""

from __future__ import annotations

import pytest
from evaluation_world import stage_context

from actors.store.mlflow_runs import open_client
from actors.store.registry import Registry
from actors.store.tracker import tracking_uri
from configs.errors import ConfigError
from configs.schema.evaluation import GateConfig, RegisterConfig
from pipelines.stages.register import RegisterStage


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _register(world, evaluated, home, name, model="models.finetuned", **gate):
    labels = {"baseline": "pretrained", "candidate": "finetuned", **gate}
    config = RegisterConfig(model="finetune", report="evaluate", name=name, gate=GateConfig(**labels))
    inputs = {"model": world.inputs[model], "report": evaluated}
    return RegisterStage().run(config, inputs, stage_context(home, world.store))


def test_a_better_model_becomes_champion_and_registering_again_changes_nothing(world, evaluated, home):
    first = _register(world, evaluated, home, "better")
    again = _register(world, evaluated, home, "better")
    assert first == again
    assert (first["version"], first["aliases"]) == (1, ["candidate", "champion"])
    assert first["gate"]["passed"]
    assert all("holds" in reason for reason in first["gate"]["reasons"])
    registry = Registry.open(tracking_uri(home))
    champion = registry.resolve("better@champion")
    assert (champion.digest, champion.ref) == (world.inputs["models.finetuned"].digest, "model/demo-finetune@1")


def test_a_model_that_misses_the_gate_stays_candidate_and_the_champion_stays(world, evaluated, home):
    _register(world, evaluated, home, "kept")
    worse = _register(world, evaluated, home, "kept", "models.pretrained", baseline="finetuned", candidate="pretrained")
    assert (worse["version"], worse["aliases"]) == (2, ["candidate"])
    assert not worse["gate"]["passed"]
    assert any("fails" in reason for reason in worse["gate"]["reasons"])
    registry = Registry.open(tracking_uri(home))
    assert registry.resolve("kept@champion").version == 1
    assert registry.resolve("kept@candidate").version == 2


def test_lineage_reaches_back_to_tokenizer_shards_data_report_and_runs(world, evaluated, home):
    _register(world, evaluated, home, "lineage")
    (entry,) = open_client(tracking_uri(home)).search_model_versions("name = 'lineage'")
    for kind, name in (
        ("tokenizer", "demo-tokenizer"),
        ("corpus", "demo-corpus"),
        ("dataset", "demo-instructions"),
        ("model", "demo-pretrain"),
        ("model", "demo-finetune"),
        ("report", "demo-evaluate"),
    ):
        artifact = world.store.get(f"{kind}/{name}@1")
        assert entry.tags[f"ganymede.lineage.{kind}.{name}"] == f"{kind}/{name}@1 {artifact.digest}"
    assert entry.tags["ganymede.run.tokenizer.demo-tokenizer"] == "run-tokenizer"
    assert entry.tags["ganymede.run.report.demo-evaluate"] == "run-evaluate"


def test_a_report_on_another_model_is_refused(world, evaluated, home):
    with pytest.raises(ConfigError, match="not the model to be registered"):
        _register(world, evaluated, home, "wrong", "models.pretrained")


def test_an_unknown_label_names_those_there_are(world, evaluated, home):
    with pytest.raises(ConfigError, match=r"gate\.candidate.*'newest'.*pretrained, finetuned"):
        _register(world, evaluated, home, "unknown", candidate="newest")


def test_two_answers_are_too_few_to_gain_beyond_noise(world, evaluated, home):
    refused = _register(world, evaluated, home, "strict", beyond_noise=True)
    assert refused["aliases"] == ["candidate"]
    assert all("which is noise: fails" in reason for reason in refused["gate"]["reasons"])
