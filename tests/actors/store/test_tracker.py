"""The tracker against a real MLflow store, and its two smaller twins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from actors.store.spool import unsent
from actors.store.tracker import JsonLinesTracker, MlflowTracker, NoTracker, open_tracker, tracking_uri
from configs.errors import ConfigError, TrackingError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A SQLite store, its client, and a maker of trackers for it."""
    from actors.store.mlflow_runs import open_client

    home = tmp_path_factory.mktemp("home")
    uri = f"sqlite:///{home}/mlflow/mlflow.db"
    return home, uri, open_client(uri)


def _tracker(store, experiment: str) -> MlflowTracker:
    home, uri, _ = store
    return MlflowTracker(uri, home / "spool", experiment, (home / "artifacts" / experiment).as_uri())


def _only_run(store, experiment: str, name: str):
    client = store[2]
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    (run,) = client.search_runs([experiment_id], f"attributes.run_name = '{name}'")
    return run


def test_everything_logged_is_seen_in_mlflow(store, tmp_path):
    client = store[2]
    tracker = _tracker(store, "all")
    project = tracker.run("p", "project")
    run = tracker.run("p/train", "train", parent="p", tags={"stage": "train"})
    run.log_params({"optim": {"name": "muon", "lr": 0.02}, "steps": 3})
    for step in range(3):
        run.log_metrics({"loss": 3.0 - step, "lr": 0.1}, step=step, time_ms=1000 + step)
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"first")
    run.log_file(picture, "pictures")
    picture.write_bytes(b"changed later")
    run.log_json({"a": 1}, "config.json")
    run.log_table([{"prompt": "p1", "answer": "a1"}, {"prompt": "p2", "answer": "a2"}], "tables/answers.json")
    run.log_dataset(name="corpus", digest="d" * 64, uri="/data/corpus", context="training", profile={"tokens": 12})
    run.set_tags({"note": "done"})
    run.end("FINISHED")
    project.end("FINISHED")
    assert tracker.close(60) == 0

    seen = _only_run(store, "all", "train")
    parent = _only_run(store, "all", "project")
    assert run.id == seen.info.run_id
    assert (seen.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert seen.data.params == {"optim.name": "muon", "optim.lr": "0.02", "steps": "3"}
    assert seen.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (seen.data.tags["stage"], seen.data.tags["note"]) == ("train", "done")
    points = client.get_metric_history(seen.info.run_id, "loss")
    assert [(p.step, p.value, p.timestamp) for p in points] == [(0, 3.0, 1000), (1, 2.0, 1001), (2, 1.0, 1002)]
    (dataset,) = seen.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("corpus", "d" * 36)
    assert {t.key: t.value for t in dataset.tags} == {"mlflow.data.context": "training"}
    mlflow.set_tracking_uri(store[1])  # `load_table` looks there, whatever its client was given
    table = client.load_table(seen.info.experiment_id, "tables/answers.json", [seen.info.run_id])
    mlflow.set_tracking_uri("")  # the environment of the process holds it too
    assert table.to_dict("list") == {"prompt": ["p1", "p2"], "answer": ["a1", "a2"]}
    sent = Path(client.download_artifacts(seen.info.run_id, "pictures/loss.png", str(tmp_path)))
    assert sent.read_bytes() == b"first"
    assert "artifacts/all" in seen.info.artifact_uri


def test_delivered_files_leave_the_disk(store):
    tracker = _tracker(store, "tidy")
    run = tracker.run("k", "tidy")
    run.log_json({"a": 1}, "a.json")
    run.end("FINISHED")
    assert tracker.close(60) == 0
    spool = next((store[0] / "spool").glob("tidy-*"))
    assert [p.name for p in spool.rglob("*") if p.is_file() and p.suffix == ".jsonl"] == []
    assert not list(spool.rglob("*.files"))


def test_a_resumed_run_is_the_same_run_and_repeated_steps_are_left_out(store):
    first = _tracker(store, "resume")
    run = first.run("k", "train")
    for step in (1, 2, 3):
        run.log_metrics({"loss": 10.0 - step}, step=step)
    run.end("KILLED")
    assert first.close(60) == 0

    second = _tracker(store, "resume")
    run = second.run("k", "train")
    for step in (2, 3, 4):
        run.log_metrics({"loss": 10.0 - step}, step=step)
    run.end("FINISHED")
    assert second.close(60) == 0

    seen = _only_run(store, "resume", "train")
    points = store[2].get_metric_history(seen.info.run_id, "loss")
    assert sorted(p.step for p in points) == [1, 2, 3, 4]
    assert seen.info.status == "FINISHED"


def test_a_deleted_run_is_made_anew_with_all_its_points(store):
    client = store[2]
    for _ in range(2):
        tracker = _tracker(store, "deleted")
        run = tracker.run("k", "train")
        run.log_metrics({"loss": 1.0}, step=1)
        run.end("FINISHED")
        assert tracker.close(60) == 0
        seen = _only_run(store, "deleted", "train")
        assert len(client.get_metric_history(seen.info.run_id, "loss")) == 1
        client.delete_run(seen.info.run_id)


def test_what_mlflow_refuses_is_set_aside_and_the_rest_arrives(store, caplog):
    tracker = _tracker(store, "refused")
    run = tracker.run("k", "train")
    run.log_params({"a": 1})
    run.log_params({"a": 2, "b": 3})
    run.log_metrics({"bad\tname": 1.0, "good": 2.0, "other": 3.0}, step=1)
    run.end("FINISHED")
    assert tracker.close(60) == 0
    seen = _only_run(store, "refused", "train")
    assert seen.data.params == {"a": "1", "b": "3"}
    assert seen.data.metrics == {"good": 2.0, "other": 3.0}
    rejected = next((store[0] / "spool").glob("refused-*/*/rejected.jsonl")).read_text().splitlines()
    assert [json.loads(line).get("params") or json.loads(line)["metrics"] for line in rejected] == [
        {"a": "2"},
        {"bad\tname": 1.0},
    ]
    assert "refuses records" in caplog.text


def test_what_a_killed_process_logged_is_delivered_at_the_next_start(store):
    home, uri, client = store
    program = f"""
import os, signal
from pathlib import Path
from actors.store.tracker import MlflowTracker
from actors.store import delivery
delivery._GATHER_SECONDS = 3600.0
tracker = MlflowTracker({uri!r}, Path({str(home / "spool")!r}), "killed", {(home / "artifacts").as_uri()!r})
run = tracker.run("k", "train")
for step in range(200):
    run.log_metrics({{"loss": float(step)}}, step=step)
run.log_json([1, 2], "kept.json")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert client.get_experiment_by_name("killed") is None
    assert unsent(next((home / "spool").glob("killed-*"))) == 202

    tracker = _tracker(store, "killed")
    assert tracker.close(60) == 0
    seen = _only_run(store, "killed", "train")
    assert sorted(p.step for p in client.get_metric_history(seen.info.run_id, "loss")) == list(range(200))
    assert [f.path for f in client.list_artifacts(seen.info.run_id)] == ["kept.json"]


def test_torn_and_spoilt_lines_do_not_stop_the_rest(store):
    tracker = MlflowTracker(store[1], store[0] / "torn", "torn")
    run = tracker.run("k", "train")
    run.log_metrics({"loss": 1.0}, step=1)
    segment = next((store[0] / "torn").glob("*/*/*.jsonl"))
    with segment.open("ab") as file:
        file.write(b"\0\0\0\n")
    run.log_metrics({"loss": 2.0}, step=2)
    with segment.open("ab") as file:
        file.write(b'{"op": "metr')
    run._recorder.close()
    assert tracker.close(60) == 0
    assert _only_run(store, "torn", "train").data.metrics == {"loss": 2.0}
    assert not segment.exists()


def test_two_processes_can_log_at_once(store):
    trackers = [_tracker(store, "two") for _ in range(2)]
    runs = []
    for number, tracker in enumerate(trackers):
        project = tracker.run("project", "project")
        runs += [project, tracker.run(f"stage {number}", f"stage {number}", parent="project")]
    for step in range(50):
        for run in runs[1::2]:
            run.log_metrics({"loss": 1.0}, step=step)
    for run in runs:
        run.end("FINISHED")
    for tracker in trackers:
        tracker.close(60)
    assert unsent(next((store[0] / "spool").glob("two-*"))) == 0
    parent = _only_run(store, "two", "project").info.run_id
    for number in range(2):
        seen = _only_run(store, "two", f"stage {number}")
        assert seen.data.tags["mlflow.parentRunId"] == parent
        assert len(store[2].get_metric_history(seen.info.run_id, "loss")) == 50


def test_a_parent_that_was_never_opened_is_an_error(tmp_path):
    with pytest.raises(TrackingError, match="never opened"):
        JsonLinesTracker(tmp_path).run("child", "child", parent="nobody")


def test_json_lines_keep_every_record(tmp_path):
    tracker = JsonLinesTracker(tmp_path)
    run = tracker.run("demo@1", "demo", tags={"a": "b"})
    run.log_metrics({"loss": 1.5}, step=7, time_ms=1)
    run.log_table([{"q": 1}], "t.json")
    run.end("FINISHED")
    assert tracker.close(1) == 0
    assert run.id is None
    (lines,) = tmp_path.glob("demo@1-*/*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["op"] for r in records] == ["begin", "metrics", "table", "end"]
    assert records[1] == {"op": "metrics", "time_ms": 1, "metrics": {"loss": 1.5}, "step": 7}
    assert json.loads((lines.parent / records[2]["path"]).read_text()) == {"columns": ["q"], "data": [[1]]}


def test_no_tracker_takes_everything_and_leaves_nothing(tmp_path):
    run = NoTracker().run("k", "name")
    run.log_metrics({"a": 1.0}, step=1)
    run.log_file(tmp_path / "not there")
    run.end("FAILED")
    assert run.id is None
    assert list(tmp_path.iterdir()) == []


def test_opening_by_kind(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert isinstance(open_tracker("none", tmp_path, "x"), NoTracker)
    assert isinstance(open_tracker("jsonl", tmp_path, "x"), JsonLinesTracker)
    idle = open_tracker("mlflow", tmp_path, "x")
    assert idle.close(5) == 0
    assert not (tmp_path / "mlflow").exists(), "a tracker that logs nothing must not make a database"


def test_the_tracking_uri_comes_from_the_environment_or_home(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        tracking_uri(tmp_path)


def test_importing_the_tracker_does_not_import_mlflow():
    program = "import sys, actors.store.tracker, actors.store.registry; print('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
