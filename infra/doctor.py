"""What this machine has, and what follows from it for training and serving.

Every finding is a pure function of a measured value; `examine` measures.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from infra.local import cores, object_store_bytes

Verdict = Literal["good", "note", "problem"]
_GIB = 1 << 30
_PACKAGES = ("ganymede", "ray", "torch", "transformers", "mlflow", "pyarrow", "tokenizers", "gigatoken")


@dataclass(frozen=True)
class Finding:
    """One fact about the machine. `problem` means that something of Ganymede cannot work."""

    topic: str
    fact: str
    verdict: Verdict
    consequence: str


def examine(home: Path) -> list[Finding]:
    """Everything worth knowing; imports torch, which takes seconds."""
    return [
        _python(),
        _cores(cores()),
        _memory(psutil.virtual_memory().total),
        _shared_memory(Path("/dev/shm")),
        _disk(home, shutil.disk_usage(home).free),
        *_torch(),
        _toolchain(_compiler()),
        *_loopback(),
        _versions(),
    ]


def _python() -> Finding:
    fact = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    return Finding("Python", fact, "good", "")


def _cores(count: int) -> Finding:
    if count < 2:
        return Finding(
            "cores", str(count), "note", "the two default training workers take turns: expect half the speed"
        )
    return Finding("cores", str(count), "good", f"up to {count} training workers of one core (training.workers)")


def _memory(total_bytes: int) -> Finding:
    fact = f"{total_bytes / _GIB:.1f} GiB"
    if total_bytes < 4 * _GIB:
        return Finding("memory", fact, "problem", "the demo needs 8 GiB to be comfortable and 4 GiB to run at all")
    if total_bytes < 7 * _GIB:
        return Finding("memory", fact, "note", "enough for the demo if little else runs")
    return Finding("memory", fact, "good", "enough for the demo")


def _shared_memory(folder: Path) -> Finding:
    wanted = object_store_bytes()
    if not folder.is_dir():
        return Finding("shared memory", "no /dev/shm", "good", "Ray's object store is kept in files")
    free = shutil.disk_usage(folder).free
    fact = f"{free / _GIB:.1f} GiB free in {folder}"
    if free < wanted:
        advice = f"Ray's object store ({wanted / _GIB:.1f} GiB) goes to slower files; in Docker: --shm-size=1g"
        return Finding("shared memory", fact, "note", advice)
    return Finding("shared memory", fact, "good", f"holds Ray's object store of {wanted / _GIB:.1f} GiB")


def _disk(home: Path, free_bytes: int) -> Finding:
    fact = f"{free_bytes / _GIB:.1f} GiB free at {home}"
    if free_bytes < _GIB:
        return Finding("disk", fact, "problem", "free at least 1 GiB, or set GANYMEDE_HOME to a larger disk")
    if free_bytes < 5 * _GIB:
        return Finding("disk", fact, "note", "enough for the demo, little for anything larger")
    return Finding("disk", fact, "good", "")


def _torch() -> Iterator[Finding]:
    """The processor's number formats and the accelerators, as torch sees them."""
    import torch

    from actors.engine.precision import has_bf16

    capability = torch.backends.cpu.get_cpu_capability()
    if has_bf16(torch.device("cpu")):
        yield Finding("processor", f"{capability}, bf16", "good", "bf16 on the CPU: about twice the speed of fp32")
    else:
        yield Finding("processor", f"{capability}, no bf16", "note", "fp32 on the CPU (precision: auto)")
    if not torch.cuda.is_available():
        yield Finding("GPU", "none", "good", "everything runs on the CPU; recipes with use_gpu need a cluster")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        fact = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, compute {capability}"
        yield Finding("GPU", fact, "good", "train on it with --set stages.pretrain.training.use_gpu=true")


def _compiler() -> str | None:
    """The C++ compiler that torch.compile would call."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _toolchain(compiler: str | None) -> Finding:
    if compiler is None:
        return Finding("C++ toolchain", "none", "note", "no torch.compile on the CPU; everything runs without it")
    return Finding("C++ toolchain", compiler, "good", "torch.compile can be used on the CPU (training.compile: auto)")


def _loopback() -> Iterator[Finding]:
    """Whether services can listen on loopback at all."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            yield Finding("loopback", str(error.strerror), "problem", "Ray, MLflow and the endpoint need 127.0.0.1")
            return
    yield Finding("loopback", "127.0.0.1 can be listened on", "good", "")


def _versions() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", ", ".join(found), "problem", f"missing: {', '.join(missing)}; run make setup")
    return Finding("packages", ", ".join(found), "good", "")
