"""The tracking server goes away in the middle of a training stage: training does not wait, and no point is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from actors.store.mlflow_runs import open_client
from tests.actors.store.mlflow_server import Server
from tests.faults.command import RECIPE, Command

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_training_goes_on_without_the_tracking_server_and_every_point_arrives(tmp_path: Path) -> None:
    document = yaml.safe_load(RECIPE.read_text())
    document["stages"] = {name: document["stages"][name] for name in ("tokenizer", "corpus", "pretrain")}
    training = document["stages"]["pretrain"]["training"] | {"steps": 400, "log_every_steps": 1}
    document["stages"]["pretrain"]["training"] = training
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    server = Server.made(tmp_path)
    server.start()
    try:
        run = Command(tmp_path / "home", recipe, tracking_uri=server.uri)
        run.until(run.trained("pretrain", 20))
        server.stop()
        # It ends with the server still away; what could not be sent stays on disk for the next run.
        made = run.finish()["outcomes"]
        assert isinstance(made, list)
        assert [outcome["status"] for outcome in made] == ["made", "made", "made"]
        server.start()
        again = Command(tmp_path / "home", recipe, tracking_uri=server.uri).finish()["outcomes"]
        assert isinstance(again, list)
        assert [outcome["status"] for outcome in again] == ["reused", "reused", "reused"]

        client = open_client(server.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
        (found,) = [
            r for r in client.search_runs([experiment.experiment_id]) if r.data.tags["mlflow.runName"] == "pretrain"
        ]
        points = client.get_metric_history(found.info.run_id, "loss")
        assert sorted(point.step for point in points) == list(range(1, 401))
        assert found.info.status == "FINISHED"
        assert json.loads(json.dumps(made[-1]["summary"]))["steps"] == 400
    finally:
        server.stop()
