"""The platform of this machine that outlives a command: a Ray head with dashboard, and an MLflow server.

`start` writes `<home>/platform.json` as soon as the first process runs and again after each, so that `stop` finds every
process whatever happened in between. A process is known by its id and start time: a reused id is never taken for ours.
Both bind loopback, each leads a session of its own (closing the terminal does not end it), and each logs to
`<home>/logs`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from actors.store.mlflow_runs import create_database
from configs.errors import GanymedeError, InputError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServiceProcess:
    """One process that the platform started."""

    name: str
    pid: int
    started_at: float
    """Start time by the kernel, seconds since the epoch; with the id it names one process only."""

    def process(self) -> psutil.Process | None:
        """The process if it runs still."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.started_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


@dataclass(frozen=True)
class Platform:
    """What `ganymede up` started."""

    ray_address: str
    dashboard_url: str
    mlflow_url: str
    processes: tuple[ServiceProcess, ...]
    endpoint_url: str | None = None
    endpoint_model: str | None = None
    """What was last served on it, as it was asked for."""


@dataclass(frozen=True)
class Service:
    """One service of the platform as it is now."""

    name: str
    state: Literal["running", "silent", "ended"]
    """`silent`: its process lives and its address does not answer."""
    url: str


def _file(home: Path) -> Path:
    return home / "platform.json"


def recorded_platform(home: Path) -> Platform | None:
    """The platform on record, running or not."""
    try:
        data = json.loads(_file(home).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"{_file(home)} is not the record of a platform: {error}",
            next_step="end its processes by hand, then remove the file",
        ) from error
    return Platform(**{**data, "processes": tuple(ServiceProcess(**p) for p in data["processes"])})


def running_platform(home: Path) -> Platform | None:
    """The platform on record if its Ray head runs."""
    platform = recorded_platform(home)
    head = next((p for p in platform.processes if p.name == "ray"), None) if platform else None
    return platform if head is not None and head.process() is not None else None


def services(platform: Platform | None) -> list[Service]:
    """The services of a platform, each asked over HTTP; none if there is no platform."""
    if platform is None:
        return []
    ended = {p.name for p in platform.processes if p.process() is None}
    found = [("ray", "ray", platform.dashboard_url, "/api/version")]
    found += [("mlflow", "mlflow", platform.mlflow_url, "/health")]
    if platform.endpoint_url is not None:
        found += [(f"endpoint of {platform.endpoint_model}", "ray", platform.endpoint_url, "/models")]
    return [
        Service(name, "ended" if process in ended else "running" if answers(url + path) else "silent", url)
        for name, process, url, path in found
    ]


def record_endpoint(home: Path, url: str, model: str) -> None:
    """Notes what is served on the running platform."""
    platform = running_platform(home)
    if platform is not None:
        _record(home, replace(platform, endpoint_url=url, endpoint_model=model))


def _record(home: Path, platform: Platform) -> None:
    fresh = _file(home).with_suffix(".json.new")
    fresh.write_text(json.dumps(asdict(platform), indent=2), "utf-8")
    fresh.replace(_file(home))


def start(
    home: Path,
    *,
    dashboard_port: int,
    mlflow_port: int,
    tracking: str,
    cpus: int,
    object_store_bytes: int,
    say: Callable[[str], None],
) -> Platform:
    """Starts Ray and MLflow and returns once both answer; what was started is ended again if one does not.

    Args:
        tracking: MLflow's tracking URI: a database gets a server in front of it, a server is taken as it is.
        say: told what is being waited for.

    Raises:
        InputError: a platform runs already, or a port is taken.
        GanymedeError: a service does not come up.
    """
    if running_platform(home) is not None:
        raise InputError(f"a platform of {home} runs already", next_step="ganymede status, or ganymede down")
    stop(home)
    require_free_port(dashboard_port, "--dashboard-port")
    own_mlflow = not tracking.startswith("http")
    if own_mlflow:
        require_free_port(mlflow_port, "--mlflow-port")
    _ensure_token(home)
    gcs, agent, agent_grpc, client, runtime_env = free_ports(5)
    platform = Platform(
        ray_address=f"{LOOPBACK}:{gcs}",
        dashboard_url=f"http://{LOOPBACK}:{dashboard_port}",
        mlflow_url=f"http://{LOOPBACK}:{mlflow_port}" if own_mlflow else tracking,
        processes=(),
    )
    commands = {
        "ray": _ray_command(gcs, dashboard_port, (agent, agent_grpc, client, runtime_env), cpus, object_store_bytes)
    }
    if own_mlflow:
        create_database(tracking)
        commands["mlflow"] = _mlflow_command(home, mlflow_port, tracking)
    try:
        for name, command in commands.items():
            platform = replace(platform, processes=(*platform.processes, _spawn(home, name, command)))
            _record(home, platform)
        urls = {"ray": f"{platform.dashboard_url}/api/version", "mlflow": f"{platform.mlflow_url}/health"}
        for process in platform.processes:
            say(f"waiting for {process.name} at {urls[process.name]}")
            _wait_for(home, process, urls[process.name])
    except BaseException:
        stop(home)
        raise
    return platform


def stop(home: Path) -> int:
    """Ends every process of the platform on record and forgets it; the number of processes ended.

    Returns only when all of them, children included, are gone.

    Raises:
        GanymedeError: a process outlives SIGKILL by ten seconds.
    """
    platform = recorded_platform(home)
    if platform is None:
        return 0
    roots = [process for p in platform.processes if (process := p.process()) is not None]
    family = _with_children(roots)
    _signal(roots, psutil.Process.terminate)
    _, alive = psutil.wait_procs(family, timeout=10)
    late = _with_children(alive)
    _signal(late, psutil.Process.kill)
    _, alive = psutil.wait_procs(late, timeout=10)
    if alive:
        raise GanymedeError(f"processes do not end: {', '.join(str(p.pid) for p in alive)}")
    _file(home).unlink(missing_ok=True)
    return len(family)


def require_free_port(port: int, option: str, host: str = LOOPBACK) -> None:
    """Raises `InputError` if something listens on `port` already."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{option}: {host}:{port} cannot be listened on: {error.strerror}",
                received=port,
                allowed="a free port",
                next_step=f"end what listens there, or choose another port with {option}",
            ) from error


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that nothing listens on now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """True if an HTTP server answers at `url`, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _ensure_token(home: Path) -> None:
    """Makes the token (`~/.ray/auth_token`) that a Ray head on a shared machine asks of its clients, if missing."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)
    if done.returncode:
        raise GanymedeError(
            f"Ray cannot make its access token: {done.stderr.strip()}",
            next_step="make ~/.ray writable, or set RAY_AUTH_TOKEN",
        )


def _ray_command(
    gcs: int, dashboard: int, internal: tuple[int, int, int, int], cpus: int, store_bytes: int
) -> list[str]:
    """A Ray head in the foreground, whose processes the kernel ends with it."""
    agent, agent_grpc, client, runtime_env = internal
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--node-ip-address={LOOPBACK}"),
        *(f"--port={gcs}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}", "--include-dashboard=true"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--ray-client-server-port={client}", f"--runtime-env-agent-port={runtime_env}"),
        *("--min-worker-port=0", "--max-worker-port=0"),  # any free port; Ray's default range may hold the others
        *(f"--num-cpus={cpus}", f"--object-store-memory={store_bytes}"),
    ]


def _mlflow_command(home: Path, port: int, store: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", f"--host={LOOPBACK}", f"--port={port}", "--workers=1"),
        *(f"--backend-store-uri={store}", f"--default-artifact-root={home / 'mlflow' / 'artifacts'}"),
    ]


def _spawn(home: Path, name: str, command: list[str]) -> ServiceProcess:
    """Starts a service in a session of its own, with its output in `<home>/logs/<name>.log`."""
    with (home / "logs" / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home,
            env=_environment(),
            start_new_session=True,
        )
    return ServiceProcess(name, child.pid, psutil.Process(child.pid).create_time())


def _environment() -> Mapping[str, str]:
    """Ours, without the address of another Ray, and without MLflow's job runners (seven idle processes)."""
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return {**kept, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _wait_for(home: Path, service: ServiceProcess, url: str, timeout_seconds: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not answers(url):
        log = home / "logs" / f"{service.name}.log"
        if service.process() is None:
            raise GanymedeError(f"{service.name} ended while starting: {_last_line(log)}", next_step=f"see {log}")
        if time.monotonic() > deadline:
            raise GanymedeError(
                f"{service.name} does not answer at {url} after {timeout_seconds:.0f} s", next_step=f"see {log}"
            )
        time.sleep(0.25)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _with_children(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and everything below them, each once."""
    family: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            for process in (root, *root.children(recursive=True)):
                family[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return list(family.values())


def _signal(processes: Iterable[psutil.Process], send: Callable[[psutil.Process], Any]) -> None:
    for process in processes:
        try:
            send(process)
        except psutil.NoSuchProcess:
            continue
