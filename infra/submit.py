"""Runs recipes as Ray Jobs: the working directory and this code are packed and sent, the logs are followed, the exit
code is handed on. No Ray runs on the submitting side.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import GanymedeError, InputError
from infra.local import LOCAL_RAY, QUIET

ROOMS = ("configs", "actors", "pipelines", "serving", "infra")
EXCLUDED = (
    ".venv", ".ganymede", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis",
    ".import_linter_cache", "node_modules", "build", "dist",
)  # fmt: skip
"""Folders that never travel, wherever they are."""
PACKED_BYTES = 256 << 20
"""Most that a working directory may hold; Ray keeps the package in the head's memory."""
FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_S3_ENDPOINT_URL", "HF_HUB_OFFLINE", "HF_TOKEN")
"""Environment that a job needs as much as we do; sent if it is set here."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    entrypoint: str
    exit_code: int | None
    started_at: float | None
    """Seconds since the epoch."""


class JobClient:
    """The jobs of one cluster, through its dashboard.

    Every method raises `InputError` for a job or an address that is not there.
    """

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self.address = address

    @classmethod
    def connect(cls, address: str) -> JobClient:
        """Opens the dashboard at `address` (`http://host:port`).

        Raises:
            InputError: nothing answers there, or it is no Ray dashboard, or it refuses us.
        """
        if not address.startswith(("http://", "https://")):
            raise InputError(
                "the address of a cluster is its dashboard's", received=address, allowed="http://host:port"
            )
        _authenticate(address)
        from ray.job_submission import JobSubmissionClient

        with _told(address):
            return cls(JobSubmissionClient(address), address)

    def on_this_machine(self) -> bool:
        """Whether the head runs here; a loopback address may be the near end of a tunnel."""
        with _told(self.address):
            response = self._client._do_request("GET", "/nodes?view=summary")
        nodes = response.json()["data"]["summary"] if response.status_code == 200 else []
        return any(node.get("hostname") == socket.gethostname() for node in nodes)

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
        """Starts a job and returns its id."""
        with _told(self.address):
            job = self._client.submit_job(entrypoint=entrypoint, runtime_env=dict(runtime_env), metadata=dict(metadata))
        return str(job)

    def list(self) -> list[Job]:
        """Every job that was submitted, oldest first."""
        with _told(self.address):
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started_at or 0.0)

    def job(self, job_id: str) -> Job:
        """One job."""
        with _told(self.address, job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Everything the job has written so far."""
        with _told(self.address, job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Asks the job to end; false if it had ended already."""
        with _told(self.address, job_id):
            return bool(self._client.stop_job(job_id))

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Writes the job's log as it grows until the job has ended; a broken connection is opened again."""
        written = 0
        while True:
            written = asyncio.run(self._tail(job_id, write, written))
            job = self.job(job_id)
            if job.status in {"SUCCEEDED", "FAILED", "STOPPED"}:
                write(self.logs(job_id)[written:])
                return job
            time.sleep(1)

    async def _tail(self, job_id: str, write: Callable[[str], object], written: int) -> int:
        """Follows one connection to its end, leaving out what was `written`; returns how much has been by then."""
        import aiohttp

        seen = 0
        try:
            async for text in self._client.tail_job_logs(job_id):
                seen += len(text)
                if seen > written:
                    write(text[-(seen - written) :])
                    written = seen
        except (RuntimeError, OSError, aiohttp.ClientError):
            # The dashboard went away or was not ready: `follow` asks for the job's state, which tells if it is gone.
            return written
        return written


def recipe_job(
    recipe: str, arguments: Sequence[str], *, folder: Path, home: str, python: str
) -> tuple[str, dict[str, Any]]:
    """The entrypoint and the runtime environment of a job that runs `recipe`.

    Args:
        recipe: name of a packaged recipe, or a path below `folder`.
        arguments: what follows the recipe on the command line.
        folder: the working directory, packed and sent.
        home: state folder on the cluster.
        python: interpreter on the cluster.

    Raises:
        InputError: the recipe lies outside of `folder`, or `folder` holds too much.
    """
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"}:
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside:
            raise InputError(
                "the recipe lies outside of the working directory, which is what the job gets",
                received=recipe,
                allowed=f"a path below {folder}",
                next_step="change to the folder that holds the recipe and its data",
            )
        recipe = str(path.resolve().relative_to(folder.resolve()))
    _require_small(folder)
    code = Path(__file__).parent.parent
    environment = {**QUIET, **{k: os.environ[k] for k in FORWARDED if k in os.environ}, "GANYMEDE_HOME": home}
    runtime_env: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": [f"**/{name}" for name in EXCLUDED],
        "env_vars": environment,
    }
    if code.resolve() != folder.resolve():
        runtime_env["py_modules"] = [str(code / room) for room in ROOMS]
    return shlex.join([python, "-m", "infra.cli.main", "run", recipe, *arguments]), runtime_env


def _require_small(folder: Path) -> None:
    """Raises `InputError` if `folder` holds more than `PACKED_BYTES` without what is excluded."""
    sizes: dict[str, int] = {}
    for path, bytes_ in _packed(folder):
        top = path.relative_to(folder).parts[0]
        sizes[top] = sizes.get(top, 0) + bytes_
        if sum(sizes.values()) > PACKED_BYTES:
            largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
            raise InputError(
                f"{folder} holds more than a job can carry; so far the most is in {', '.join(largest)}",
                allowed=f"{PACKED_BYTES >> 20} MiB without {', '.join(EXCLUDED)}",
                next_step="submit from a folder that holds the recipe and little else; put data on shared storage",
            )


def _packed(folder: Path) -> Iterator[tuple[Path, int]]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in EXCLUDED]
        for name in files:
            path = Path(root) / name
            if not path.is_symlink():
                yield path, path.stat().st_size


def _authenticate(address: str) -> None:
    """Has Ray send the user's token if the cluster asks for one, and only then; call before ray is imported."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=10):
            return
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            os.environ.setdefault("RAY_AUTH_MODE", LOCAL_RAY["RAY_AUTH_MODE"])
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        f"no Ray dashboard answers: {str(error).strip()}",
        received=address,
        allowed="http://host:port of a running head",
        next_step="start one here with `ganymede up`, or forward the cluster's port 8265",
    )


class _told:  # noqa: N801 - used as a statement
    """Turns what Ray's client raises into errors of ours."""

    def __init__(self, address: str, job_id: str | None = None) -> None:
        self._address = address
        self._job_id = job_id

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConnectionError | OSError):
            raise _unreachable(self._address, error) from error
        if isinstance(error, RuntimeError | ValueError):
            if self._job_id is not None and "does not exist" in str(error):
                raise InputError(
                    f"the cluster at {self._address} has no such job",
                    received=self._job_id,
                    next_step=f"ganymede jobs list --address {self._address}",
                ) from error
            raise GanymedeError(f"the cluster at {self._address} refuses: {str(error).strip()}") from error


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        entrypoint=details.entrypoint,
        exit_code=details.driver_exit_code,
        started_at=details.start_time / 1000 if details.start_time else None,
    )


def cluster_python(same_machine: bool) -> str:
    """The interpreter to run a job with: this one on this machine, the image's elsewhere."""
    return sys.executable if same_machine else "python"
