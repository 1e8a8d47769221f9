"""This machine: the state folder, a quiet environment, log files, and the Ray that a command works on.

Which Ray is used, first match wins: `RAY_ADDRESS` (set by hand, or by Ray inside a job); the platform that `ganymede
up` started from the same state folder; otherwise an embedded Ray on loopback that ends with the process, killed or
not. Nothing that Ray, MLflow or transformers say reaches the terminal: it is in `<home>/logs`.

This module imports none of them before `quiet_environment()` can have run.
"""

from __future__ import annotations

import logging
import logging.handlers
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from configs.errors import GanymedeError, InputError, StorageError
from infra.platform import running_platform
from infra.reaper import mark_children, watch_children

QUIET: Mapping[str, str] = {
    # usage statistics and telemetry
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # nothing is fetched unless the user says so (HF_HUB_OFFLINE=0)
    "HF_HUB_OFFLINE": "1",
    # log routing
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of every process of ours, on this machine and in jobs; what the user has set himself is kept."""

LOCAL_RAY: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",
    # Ray's switch between clusters and one machine (0: every port on loopback), named after where it defaults to 0
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Environment of a Ray on this machine: reached over loopback only, and only by who can read the user's token."""

OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray at most; text and tokens go through files, so this is plenty."""


def quiet_environment() -> None:
    """Turns telemetry off and routes logs, for this process and its children.

    Call before ray, mlflow or transformers are imported: they read these variables at import.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def local_ray_environment() -> None:
    """Keeps a Ray of this machine to this machine and this user; call before ray is imported."""
    for name, value in LOCAL_RAY.items():
        os.environ.setdefault(name, value)


def state_home() -> Path:
    """The absolute folder that holds all state: `GANYMEDE_HOME`, or `.ganymede` in the working directory; made if
    missing.

    Raises:
        StorageError: it cannot be made or written.
    """
    home = Path(os.environ.get("GANYMEDE_HOME") or ".ganymede").absolute()
    try:
        (home / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the state folder {home} cannot be made: {error.strerror}",
            next_step="set GANYMEDE_HOME to a folder that can be written",
        ) from error
    if not os.access(home, os.W_OK):
        raise StorageError(
            f"the state folder {home} cannot be written", next_step="set GANYMEDE_HOME to a folder that can be written"
        )
    return home


def route_logs(home: Path) -> Path:
    """Sends everything logged in this process, warnings included, to `<home>/logs/ganymede.log`; returns its path."""
    path = home / "logs" / "ganymede.log"
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=8 << 20, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _adopt_loggers()
    return path


def _adopt_loggers() -> None:
    """Loggers that brought a terminal handler of their own write to the root logger's file instead."""
    for name in list(logging.Logger.manager.loggerDict):
        logger = logging.getLogger(name)
        if any(type(h) is not logging.NullHandler for h in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster this process is connected to."""

    address: str
    """GCS address, host:port."""
    embedded: bool
    """Started by this process, and gone with it."""


@contextmanager
def ray_session(home: Path, *, least_cpus: float = 0) -> Iterator[Cluster]:
    """Connects this process to Ray, or starts an embedded one; disconnects, or ends it, on the way out.

    Call from the main thread: the kernel ties the embedded Ray's life to the thread that started it. An embedded Ray
    offers `least_cpus` even where there are fewer cores, which are shared then.

    Raises:
        InputError: `RAY_ADDRESS` is not the address of a Ray head that answers.
        GanymedeError: an embedded Ray does not start.
    """
    cluster = _connect(home, least_cpus)

    import ray

    _adopt_loggers()
    watcher = watch_children() if cluster.embedded else None
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield cluster
    finally:
        ray.shutdown()
        if watcher is not None:
            watcher.communicate()
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: cleanly, resumable, without orphans."""
    raise KeyboardInterrupt


def _connect(home: Path, least_cpus: float) -> Cluster:
    given = os.environ.get("RAY_ADDRESS")
    if given and given != "local":
        if given.startswith(("http://", "https://")):
            raise InputError(
                "RAY_ADDRESS names a dashboard, not a Ray head",
                received=given,
                allowed="host:port of the head, or unset",
                next_step=f"ganymede submit RECIPE --address {given}",
            )
        return Cluster(_init(home, given), embedded=False)
    local_ray_environment()
    platform = running_platform(home)
    if platform is not None:
        return Cluster(_init(home, platform.ray_address), embedded=False)
    mark_children()
    return Cluster(_init(home, "local", least_cpus), embedded=True)


def _init(home: Path, address: str, least_cpus: float = 0) -> str:
    """`ray.init` with everything of it that talks turned down; returns the GCS address."""
    import ray

    _adopt_loggers()
    # What Ray's node process reports (a worker was killed) is printed to the driver's standard output, where a JSON
    # document may be expected. `log_to_driver` does not cover it, and no public option does; Ray's own logs have it.
    ray._private.worker._worker_logs_enabled = False
    options: dict[str, object] = {"address": address, "namespace": "ganymede", "log_to_driver": False}
    if address == "local":
        options |= {
            "include_dashboard": False,
            "num_cpus": max(logical_cpus(), math.ceil(least_cpus)),
            "object_store_memory": object_store_bytes(),
            "_node_ip_address": "127.0.0.1",
        }
    try:
        context = ray.init(configure_logging=False, **options)
    except Exception as error:  # a node that is not up in time raises just that
        if address == "local":
            raise GanymedeError(
                f"Ray did not start on this machine: {error}", next_step=f"ganymede doctor; logs: {home / 'logs'}"
            ) from error
        raise InputError(
            f"no Ray head answers: {error}",
            received=address,
            allowed="host:port of a running head",
            next_step="unset RAY_ADDRESS for an embedded Ray, or start a head with `ganymede up`",
        ) from error
    _link_logs(home, context.address_info.get("session_dir"))
    return str(context.address_info["gcs_address"])


def _link_logs(home: Path, session: str | None) -> None:
    """`<home>/logs/ray` points at the logs of the Ray session in use."""
    if session is None:
        return
    link = home / "logs" / "ray"
    fresh = link.with_name(f"ray.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(session) / "logs", target_is_directory=True)
    fresh.replace(link)


def cores() -> int:
    """Processor cores this process may use: affinity and cgroup quota counted in."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return affinity
    return affinity if quota == "max" else max(1, min(affinity, int(quota) // int(period)))


def logical_cpus() -> int:
    """CPUs that a local Ray offers: the cores, and at least two, because training runs two workers by default."""
    return max(2, cores())


def object_store_bytes() -> int:
    """Size of a local Ray's object store: a tenth of the memory, between 128 MiB and `OBJECT_STORE_BYTES`."""
    return max(128 << 20, min(OBJECT_STORE_BYTES, psutil.virtual_memory().total // 10))
