"""Experiment tracking: one interface, three implementations (MLflow, JSON lines, none).

Logging appends to files below `GANYMEDE_HOME` and returns; it never waits for a server. A background thread delivers
to MLflow in order, retries while the server is away, and goes on at the next start with what a killed process left.
Importing this module does not import MLflow.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from typing_extensions import override

from actors.store.delivery import Delivery
from actors.store.spool import DeliveryState, Recorder, run_folder
from configs.errors import ConfigError, TrackingError

Status = Literal["FINISHED", "FAILED", "KILLED"]
TrackerKind = Literal["mlflow", "jsonl", "none"]


class Run(Protocol):
    """One run of a tracker. Every method returns at once; the values appear later, in order."""

    @property
    def id(self) -> str | None:
        """The MLflow run id; None until the server gave one."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters of the run; nested mappings become dotted names. The first value of a name stays."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, time_ms: int | None = None) -> None:
        """Points of curves. The steps of one name only go up: a point at or below the last one sent is a repeat,
        made by a run that resumed from before it, and is left out."""
        ...

    def log_file(self, path: Path, folder: str = "") -> None:
        """A file as it is now, below `folder` of the run's artifacts."""
        ...

    def log_json(self, value: Any, name: str) -> None:
        """`value` as an artifact called `name`."""
        ...

    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """An evaluation table; `name` ends in `.json`, the first row names the columns."""
        ...

    def log_dataset(self, *, name: str, digest: str, uri: str, context: str, profile: Mapping[str, Any]) -> None:
        """Data that the run reads; `context` says what for (training, validation, ...)."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; the last value of a name stays."""
        ...

    def end(self, status: Status) -> None:
        """Closes the run; opening it again under its key goes on with it."""
        ...


class Tracker(Protocol):
    """Where runs go."""

    def run(self, key: str, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """The run called `key`, shown as `name`: the same run whenever the key is the same.

        Args:
            parent: key of the run that it is nested under, opened before.

        Raises:
            TrackingError: no run was ever opened under `parent`.
            StorageError: the spool cannot be written.
        """
        ...

    def close(self, timeout_seconds: float) -> int:
        """Delivers what is left, for at most `timeout_seconds`.

        Returns:
            Points not sent (metric values, and other records one each). They stay on disk for the next start.
        """
        ...


class RecordedRun(Run):
    """A run whose calls become records on disk."""

    def __init__(self, folder: Path, notify: Callable[[], None]) -> None:
        self._recorder = Recorder(folder)
        self._notify = notify

    @property
    @override
    def id(self) -> str | None:
        return DeliveryState.load(self._recorder.folder).run_id

    def begin(self, key: str, name: str, parent: str | None, tags: Mapping[str, str]) -> None:
        """Opens, or opens again, the run."""
        self._append("begin", key=key, name=name, parent=parent, tags=dict(tags))

    @override
    def log_params(self, params: Mapping[str, Any]) -> None:
        self._append("params", params=_flatten(params))

    @override
    def log_metrics(self, metrics: Mapping[str, float], *, step: int, time_ms: int | None = None) -> None:
        at = {} if time_ms is None else {"time_ms": time_ms}
        self._append("metrics", metrics={name: float(value) for name, value in metrics.items()}, step=step, **at)

    @override
    def log_file(self, path: Path, folder: str = "") -> None:
        self._append("file", path=self._relative(self._recorder.keep(path)), folder=folder)

    @override
    def log_json(self, value: Any, name: str) -> None:
        self._write_json(value, name, "file")

    @override
    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        if not name.endswith(".json"):
            raise ValueError(f"the name of a table ends in .json; received {name!r}")
        columns = list(rows[0]) if rows else []
        split = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        self._write_json(split, name, "table")

    @override
    def log_dataset(self, *, name: str, digest: str, uri: str, context: str, profile: Mapping[str, Any]) -> None:
        self._append("dataset", name=name, digest=digest, uri=uri, context=context, profile=dict(profile))

    @override
    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", tags=dict(tags))

    @override
    def end(self, status: Status) -> None:
        self._append("end", status=status)
        self._recorder.close()

    def _write_json(self, value: Any, name: str, op: str) -> None:
        folder, _, file_name = name.rpartition("/")
        path = self._recorder.file(file_name)
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        self._append(op, path=self._relative(path), folder=folder)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._recorder.folder).as_posix()

    def _append(self, op: str, **fields: Any) -> None:
        self._recorder.append(op, **fields)
        self._notify()


class MlflowTracker(Tracker):
    """Delivers to an MLflow server or store.

    Args:
        uri: tracking URI, `http(s)://...` or a database URI.
        spool_dir: where records wait; each pair of URI and experiment has its own folder in it.
        experiment: name of the experiment; made if it is not there.
        artifact_location: URI that a new experiment keeps its files under; the server decides if None.
    """

    def __init__(self, uri: str, spool_dir: Path, experiment: str, artifact_location: str | None = None) -> None:
        destination = hashlib.sha256(f"{uri}\n{experiment}".encode()).hexdigest()[:10]
        self._spool = spool_dir / f"{experiment}-{destination}"
        self._delivery = Delivery(self._spool, uri, experiment, artifact_location)
        self._delivery.start()

    @override
    def run(
        self, key: str, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> RecordedRun:
        return _open_run(self._spool, key, name, parent, tags, self._delivery.notify)

    @override
    def close(self, timeout_seconds: float) -> int:
        return self._delivery.close(timeout_seconds)


class JsonLinesTracker(Tracker):
    """Keeps the records as they are: a folder a run, a `.jsonl` file a session, copied files beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @override
    def run(
        self, key: str, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> RecordedRun:
        return _open_run(self._folder, key, name, parent, tags, lambda: None)

    @override
    def close(self, timeout_seconds: float) -> int:
        return 0


def _open_run(
    spool: Path,
    key: str,
    name: str,
    parent: str | None,
    tags: Mapping[str, str] | None,
    notify: Callable[[], None],
) -> RecordedRun:
    if parent is not None and not run_folder(spool, parent).is_dir():
        raise TrackingError(f"run {key!r} is to be nested under a run that was never opened", received=parent)
    run = RecordedRun(run_folder(spool, key), notify)
    run.begin(key, name, parent, tags or {})
    return run


class NoRun(Run):
    """A run that keeps nothing."""

    @property
    @override
    def id(self) -> str | None:
        return None

    @override
    def log_params(self, params: Mapping[str, Any]) -> None: ...

    @override
    def log_metrics(self, metrics: Mapping[str, float], *, step: int, time_ms: int | None = None) -> None: ...

    @override
    def log_file(self, path: Path, folder: str = "") -> None: ...

    @override
    def log_json(self, value: Any, name: str) -> None: ...

    @override
    def log_table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None: ...

    @override
    def log_dataset(self, *, name: str, digest: str, uri: str, context: str, profile: Mapping[str, Any]) -> None: ...

    @override
    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    @override
    def end(self, status: Status) -> None: ...


class NoTracker(Tracker):
    """Tracks nothing."""

    @override
    def run(self, key: str, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> NoRun:
        return NoRun()

    @override
    def close(self, timeout_seconds: float) -> int:
        return 0


def tracking_uri(home: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or the SQLite store below `home`.

    Raises:
        ConfigError: the variable holds neither a server's address nor a database's.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{(home / 'mlflow' / 'mlflow.db').resolve()}"
    scheme = urllib.parse.urlparse(uri).scheme.partition("+")[0]
    if scheme not in ("http", "https", "sqlite", "postgresql", "mysql", "mssql"):
        raise ConfigError(
            "MLFLOW_TRACKING_URI names no tracking server and no database",
            received=uri,
            allowed="http://..., https://..., sqlite:///..., postgresql://..., mysql://..., mssql://...",
            next_step="unset it to track in GANYMEDE_HOME",
        )
    return uri


def artifact_location(home: Path, experiment: str) -> str | None:
    """Where a new experiment keeps its files: below `home` for a database, the server's choice (None) for a server."""
    if tracking_uri(home).startswith("http"):
        return None
    return (home / "mlflow" / "artifacts" / experiment).resolve().as_uri()


def open_tracker(kind: TrackerKind, home: Path, experiment: str) -> Tracker:
    """The tracker of a recipe.

    Args:
        home: `GANYMEDE_HOME`; spool, default store and JSON lines live below it.
        experiment: the recipe's name.
    """
    if kind == "none":
        return NoTracker()
    if kind == "jsonl":
        return JsonLinesTracker(home / "tracking" / experiment)
    location = artifact_location(home, experiment)
    return MlflowTracker(tracking_uri(home), home / "spool", experiment, location)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
