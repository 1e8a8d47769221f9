"""The servers under test, started and ended: ours on an embedded Ray, and `transformers serve`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from configs.schema.serving import ServingConfig
from infra.deploy import serve_model
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from serving.calls import ServedModel

NAME = "bench"


@contextlib.contextmanager
def ours(folder: Path, work: Path, *, max_sequences: int, max_queued: int) -> Iterator[int]:
    """Our endpoint with one replica; its port."""
    quiet_environment()
    home = work / "home"
    (home / "logs").mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    config = ServingConfig(
        port=port,
        replicas_max=1,
        max_sequences=max_sequences,
        max_queued=max_queued,
        precision="fp32",
        cpus_per_replica=os.cpu_count() or 1,
        queue_limit_seconds=3600,
    )
    served = ServedModel(NAME, str(folder), f"model/{NAME}@1", digest="0" * 64)
    with ray_session(home):
        serve_model(served, config, say=lambda _: None)
        yield port


@contextlib.contextmanager
def transformers_serve(folder: Path, work: Path) -> Iterator[int]:
    """`transformers serve` with continuous batching, on the same cores; its port."""
    (port,) = free_ports(1)
    command = [
        *(str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--continuous-batching"),
        *("--device", "cpu", "--dtype", "float32", "--port", str(port), "--host", "127.0.0.1"),
        # Those of `engine_decoding._continuous`, the fastest found on a CPU; the default takes 9 GB for its cache.
        *("--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"),
    ]
    with (work / "transformers-serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(server, f"http://127.0.0.1:{port}/health")
            yield port
        finally:
            for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"transformers serve does not answer at {url}; its log is in the work folder")


def serving_memory_bytes() -> dict[str, int]:
    """Memory of our own (USS) of the processes that carry requests: proxy, ingress, replica."""
    names = {"haproxy": "haproxy", ":ingress": "ingress", ":engine": "replica"}
    found: dict[str, int] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            for part, name in names.items():
                if part in line:
                    found[name] = found.get(name, 0) + process.memory_full_info().uss
    return found
