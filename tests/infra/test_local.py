"""An embedded Ray: quiet, on loopback, and gone with its driver."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local import LOCAL_RAY, QUIET, cores, quiet_environment
from tests.infra.conftest import command_environment

DRIVER = """
import json, os, sys, time, psutil
from infra.local import quiet_environment, ray_session, route_logs, state_home
quiet_environment()
home = state_home()
route_logs(home)
with ray_session(home):
    import ray

    @ray.remote(num_cpus=0)
    def probe():
        import configs.errors
        print("chatter")
        os.write(2, b"chatter")
        return os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["MLFLOW_DISABLE_TELEMETRY"]

    family = psutil.Process().children(recursive=True)
    addresses = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"}
    told = ray.get(probe.remote())
    print(json.dumps({"told": told, "addresses": sorted(addresses), "pids": [p.pid for p in family]}), flush=True)
    time.sleep(100)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        env=command_environment(tmp_path / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.ray
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_embedded_ray_is_quiet_on_loopback_and_ends_with_its_driver(
    driver: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    assert driver.stdout is not None
    assert driver.stderr is not None
    document = json.loads(driver.stdout.readline())
    family = [psutil.Process(pid) for pid in document["pids"] if psutil.pid_exists(pid)]
    family += psutil.Process(driver.pid).children(recursive=True)
    assert document["told"] == ["0", "true"]
    assert set(document["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    driver.send_signal(how)
    output, errors = driver.communicate(timeout=60)
    _, alive = psutil.wait_procs(set(family), timeout=15)
    assert not alive
    assert "chatter" not in output + errors
    assert (tmp_path / "home" / "logs" / "ray").is_symlink()


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {**QUIET, **LOCAL_RAY}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    quiet_environment()
    import os

    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    for name in QUIET:
        monkeypatch.setenv(name, os.environ[name])


def test_there_is_at_least_one_core() -> None:
    assert cores() >= 1
