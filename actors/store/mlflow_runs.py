"""What MLflow is told about runs: every call can be made twice and is seen once.

Runs are found again by a tag before one is created; points are kept apart by (name, step, time, value) in MLflow's
own key; parameters, tags, datasets and files of the same name replace themselves. MLflow is imported on first use,
which takes seconds, as does the first opening of a fresh database (3.8 s and 3.6 s on 2 busy cores).
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "ganymede.run"
_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"
"""Has MLflow's page open on training runs; it would guess an experiment of prompts from our evaluation table."""
_MAX_METRICS, _MAX_PARAMS, _MAX_DIGEST = 1000, 100, 36  # limits of MLflow's log_batch and dataset tables
_REFUSALS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
"""Error codes that the same request would get again."""

_importing = threading.Lock()


class Refused(Exception):  # noqa: N818 - an outcome between two modules, never shown to a user
    """The server will not take `records`, however often they are sent; all of what was sent if empty."""

    def __init__(self, why: str, records: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(why)
        self.records = list(records)


def open_client(uri: str) -> MlflowClient:
    """An MLflow client for tracking and registry at `uri`; a SQLite file is made if it is not there.

    MLflow's client would itself retry a refused connection for minutes; its callers here have their own patience, so
    it tries twice, unless the environment says otherwise; so it is with its log lines about migrations.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # A client that talks HTTP prints where a run can be seen when it ends, into what may be a JSON document.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with _importing:
        create_database(uri)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def create_database(uri: str) -> None:
    """Makes MLflow's tables in the SQLite file of `uri` if there is no such file; leaves every other store alone.

    MLflow makes them in dozens of steps, and cannot go on from a file in which it was killed half way. So that happens
    beside the file, which then appears whole or not at all; of two processes that make it, one wins.
    """
    parsed = urllib.parse.urlparse(uri)
    path = Path(parsed.path[1:])
    if not parsed.scheme.startswith("sqlite") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        from mlflow import MlflowClient

        raw, whole = Path(folder) / "raw.db", Path(folder) / "whole.db"
        MlflowClient(tracking_uri=f"sqlite:///{raw}", registry_uri=f"sqlite:///{raw}").search_experiments(max_results=1)
        with closing(sqlite3.connect(raw)) as database:
            database.execute("VACUUM INTO ?", (str(whole),))
        with suppress(FileExistsError):  # another process was first, with the same tables
            path.hardlink_to(whole)


def is_refusal(error: Exception) -> bool:
    """True if the same request would fail again; false for what time may heal."""
    return getattr(error, "error_code", None) in _REFUSALS


class MlflowRuns:
    """The runs of one experiment; the client and the experiment are opened on first use."""

    def __init__(self, uri: str, experiment: str, artifact_location: str | None) -> None:
        self._uri = uri
        self._experiment = experiment
        self._artifact_location = artifact_location
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            self._opened = open_client(self._uri)
        return self._opened

    def open_run(self, known: str | None, unique: str, record: Mapping[str, Any], parent_id: str | None) -> str:
        """Opens the run `known`, or that tagged `unique`, or a new one; returns its id."""
        experiment_id = self._experiment_id()
        tags = {RUN_TAG: unique}
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        run_id = known if known is not None and self._is_active(known) else None
        if run_id is None:
            found = self._client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{unique}'", max_results=1)
            run_id = found[0].info.run_id if found else None
        if run_id is None:
            run = self._client.create_run(
                experiment_id, start_time=record["time_ms"], tags=tags, run_name=record["name"]
            )
            return str(run.info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        self._log(run_id, "tags", tags)
        return run_id

    def log_points(self, run_id: str, last_steps: dict[str, int], records: Sequence[Mapping[str, Any]]) -> None:
        """Sends the points above the last step of their name, and moves that on.

        Raises:
            Refused: with the points that were not taken; the others were.
        """
        from mlflow.entities import Metric

        reached = dict(last_steps)
        points = []
        for record in records:
            for name, value in record["metrics"].items():
                if record["step"] > reached.get(name, -1):
                    reached[name] = record["step"]
                    points.append(Metric(name, value, record["time_ms"], record["step"]))
        refusals = self._log_entities(run_id, "metrics", points, _MAX_METRICS)
        last_steps.update(reached)
        if refusals:
            raise Refused(
                refusals[-1][1],
                [
                    {"op": "metrics", "metrics": {p.key: p.value}, "step": p.step, "time_ms": p.timestamp}
                    for p, _ in refusals
                ],
            )

    def apply(self, run_id: str, folder: Path, record: Mapping[str, Any]) -> None:
        """Does what a record other than a begin or points asks for. Raises `Refused`."""
        op = record["op"]
        if op in ("params", "tags"):
            self._log(run_id, op, record[op])
        elif op == "file":
            self._call(self._client.log_artifact, run_id, str(folder / record["path"]), record["folder"] or None)
        elif op == "table":
            self._log_table(run_id, folder / record["path"], record["folder"])
        elif op == "dataset":
            self._log_dataset(run_id, record)
        elif op == "end":
            self._call(self._client.set_terminated, run_id, record["status"], record["time_ms"])
        else:
            raise Refused(f"unknown operation {op!r}")

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(
            self._client.create_experiment(
                self._experiment, artifact_location=self._artifact_location, tags={_KIND_TAG: _KIND}
            )
        )

    def _is_active(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if is_refusal(error):
                return False
            raise

    def _log(self, run_id: str, kind: Literal["params", "tags"], values: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        entity = Param if kind == "params" else RunTag
        refusals = self._log_entities(
            run_id, kind, [entity(name, value) for name, value in values.items()], _MAX_PARAMS
        )
        if refusals:
            raise Refused(refusals[-1][1], [{"op": kind, kind: {e.key: e.value for e, _ in refusals}}])

    def _log_entities(self, run_id: str, kind: str, entities: list[Any], limit: int) -> list[tuple[Any, str]]:
        """Sends entities of one kind, `limit` at a time; what is refused together is halved until the culprits stand
        alone. Returns those, each with the reason."""
        if len(entities) > limit:
            chunks = [entities[start : start + limit] for start in range(0, len(entities), limit)]
            return [refusal for chunk in chunks for refusal in self._log_entities(run_id, kind, chunk, limit)]
        if not entities:
            return []
        try:
            self._client.log_batch(run_id, **{kind: entities})
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(entities) == 1:
                return [(entities[0], str(error))]
            return self._log_entities(run_id, kind, entities, len(entities) // 2)
        return []

    def _log_table(self, run_id: str, path: Path, folder: str) -> None:
        """A table is a JSON file and an entry in a tag that the MLflow pages look at."""
        self._call(self._client.log_artifact, run_id, str(path), folder or None)
        entry = {"path": f"{folder}/{path.name}" if folder else path.name, "type": "table"}
        tables = json.loads(self._client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if entry not in tables:
            self._call(self._client.set_tag, run_id, "mlflow.loggedArtifacts", json.dumps([*tables, entry]))

    def _log_dataset(self, run_id: str, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = {"uri": record["uri"], "digest": record["digest"]}
        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:_MAX_DIGEST],
            source_type=urllib.parse.urlparse(record["uri"]).scheme or "local",
            source=json.dumps(source),
            profile=json.dumps(record["profile"]),
        )
        tag = InputTag("mlflow.data.context", record["context"])
        self._call(self._client.log_inputs, run_id, [DatasetInput(dataset, [tag])])

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:
            if is_refusal(error):
                raise Refused(str(error)) from error
            raise
