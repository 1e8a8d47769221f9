"""The background thread that carries a spool to MLflow.

One process at a time delivers from a spool, in order, run by run, a parent before its children. What fails because
the server is away is tried again for as long as the process lives; what the server refuses for good is set aside in
`rejected.jsonl` with the reason, and said. A record that was sent before a crash could be noted is sent again:
`MlflowRuns` makes that invisible.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from actors.store.artifacts import write_durably
from actors.store.mlflow_runs import MlflowRuns, Refused
from actors.store.spool import (
    DeliveryState,
    Entry,
    entries,
    reject,
    retire,
    run_folder,
    run_folders,
    segments,
    sole_delivery,
    unsent,
)

_GATHER_SECONDS = 0.3
"""Records that arrive within this time travel together."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 10.0
_BATCH = 500

_log = logging.getLogger(__name__)


class Delivery:
    """Delivers what is in a spool, and what comes into it, until it is closed."""

    def __init__(self, spool: Path, uri: str, experiment: str, artifact_location: str | None) -> None:
        self._spool = spool
        self._uri = uri
        self._runs = MlflowRuns(uri, experiment, artifact_location)
        self._refused: set[Path] = set()
        """Runs whose first refusal was said; more of them would only be noise."""
        self._news = threading.Event()
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)

    def start(self) -> None:
        """Starts with what earlier processes left."""
        self._news.set()
        self._thread.start()

    def notify(self) -> None:
        """Says that there is something new in the spool."""
        self._news.set()

    def close(self, timeout_seconds: float) -> int:
        """Waits until all is delivered, `timeout_seconds` at most; returns the points left."""
        self._closing.set()
        self._news.set()
        self._thread.join(timeout_seconds)
        self._stopped.set()
        return unsent(self._spool)

    def _loop(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            self._news.wait()
            self._closing.wait(_GATHER_SECONDS)
            self._news.clear()
            last = self._closing.is_set()
            try:
                with sole_delivery(self._spool) as ours:
                    if ours:
                        self._deliver_all()
            except Exception as error:  # noqa: BLE001 - a thread that dies here would lose all that follows
                self._say_failure(error, failures)
                self._news.set()
                self._pause(min(_FIRST_DELAY_SECONDS * 2 ** min(failures, 10), _LONGEST_DELAY_SECONDS))
                failures += 1
                continue
            if failures:
                _log.warning("MLflow at %s is back", self._uri)
                failures = 0
            if not ours:  # the process that delivers now may end before it sees our records
                self._news.set()
                self._pause(_FIRST_DELAY_SECONDS)
            if last and (ours or not unsent(self._spool)):
                return

    def _say_failure(self, error: Exception, failures: int) -> None:
        level = logging.WARNING if failures == 0 else logging.DEBUG
        message = "MLflow at %s does not take what was logged (%s); it is kept in %s and sent again later"
        _log.log(level, message, self._uri, _first_line(error), self._spool)

    def _pause(self, seconds: float) -> None:
        """Waits; a close in progress retries at the shortest interval."""
        if not self._closing.wait(seconds):
            return
        self._stopped.wait(min(seconds, _FIRST_DELAY_SECONDS))

    def _deliver_all(self) -> None:
        for folder in run_folders(self._spool):
            self._deliver_run(folder)

    def _deliver_run(self, folder: Path) -> None:
        waiting = segments(folder)
        if not waiting:
            return
        state = DeliveryState.load(folder)
        for segment in waiting:
            while found := entries(segment, state.offsets.get(segment.name, 0), _BATCH):
                for batch in _batches(found):
                    if self._stopped.is_set():
                        return
                    self._send(folder, state, batch)
                    state.offsets[segment.name] = batch[-1].end
                    state.save(folder)
            retire(segment, state)

    def _send(self, folder: Path, state: DeliveryState, batch: list[Entry]) -> None:
        """Sends neighbouring points, or one other record."""
        record = batch[0].record
        try:
            if record["op"] == "begin":
                self._begin(folder, state, record)
            elif state.run_id is None:
                raise Refused("its run could not be opened")
            elif record["op"] == "metrics":
                self._runs.log_points(state.run_id, state.last_steps, [entry.record for entry in batch])
            else:
                self._runs.apply(state.run_id, folder, record)
        except Refused as refusal:
            changed_parameter = record["op"] == "params"  # a resumed run may; its first value stays
            level = logging.DEBUG if changed_parameter or folder in self._refused else logging.WARNING
            if not changed_parameter:
                self._refused.add(folder)
            _log.log(level, "MLflow refuses records of run %s, kept in %s: %s", folder.name, folder, refusal)
            for refused in refusal.records or [entry.record for entry in batch]:
                reject(folder, refused, str(refusal))

    def _begin(self, folder: Path, state: DeliveryState, record: dict[str, Any]) -> None:
        parent_id = None
        if record["parent"] is not None:
            parent = run_folder(self._spool, record["parent"])
            self._deliver_run(parent)
            parent_id = DeliveryState.load(parent).run_id
        run_id = self._runs.open_run(state.run_id, f"{self._spool_id()}/{folder.name}", record, parent_id)
        if run_id != state.run_id:
            state.run_id, state.last_steps = run_id, {}
            state.save(folder)
        self._runs.apply(run_id, folder, {"op": "tags", "tags": record["tags"]})

    def _spool_id(self) -> str:
        """Tells the runs of this spool from those of another user with the same recipe on the same server."""
        path = self._spool / "id"
        if not path.exists():
            write_durably(path, uuid.uuid4().hex.encode())
        return path.read_text()


def _batches(found: list[Entry]) -> Iterator[list[Entry]]:
    """Neighbouring points together, every other record alone."""
    for is_points, group in groupby(found, lambda entry: bool(entry.record["op"] == "metrics")):
        if is_points:
            yield list(group)
        else:
            yield from ([entry] for entry in group)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
