"""What the hardware under a training process can do: device, precision, compilation, matrix-product rate."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from actors.engine.precision import has_bf16
from configs.errors import ConfigError
from configs.schema.training import TrainingConfig
from pipelines.training.parallel import Ranks

_MEASURE_SECONDS = 0.2
_CPU_MATRIX = 768
_GPU_MATRIX = 8192


@dataclass(frozen=True)
class Hardware:
    """What `precision: auto` and `compile: auto` came to on this machine."""

    device: torch.device
    precision: Literal["bf16", "fp32"]
    compile: bool

    @classmethod
    def resolve(cls, config: TrainingConfig, device: torch.device) -> Hardware:
        """Settles `auto` settings for `device`.

        Raises:
            ConfigError: bf16 or compilation is asked for and not there.
        """
        on_gpu = device.type == "cuda"
        fast_bf16 = has_bf16(device)
        if config.precision == "bf16" and not fast_bf16:
            raise ConfigError(
                "training.precision: this processor has no bf16 arithmetic",
                received="bf16",
                allowed="auto or fp32",
                next_step="ganymede doctor",
            )
        can_compile = on_gpu or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        if config.compile == "on" and not can_compile:
            raise ConfigError(
                "training.compile: no C++ compiler is on the path",
                received="on",
                allowed="auto or off",
                next_step="install g++ or clang++",
            )
        precision: Literal["bf16", "fp32"] = "bf16" if fast_bf16 and config.precision != "fp32" else "fp32"
        return cls(device, precision, config.compile != "off" and can_compile)

    def describe(self) -> dict[str, str | bool]:
        """Device, precision and compilation, for people."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {"device": device, "precision": self.precision, "compiled": self.compile}

    @property
    def dtype(self) -> torch.dtype:
        """Type that matrix products are computed in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context forward passes run in."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def matmul_rate(self, ranks: Ranks) -> float:
        """Floating-point operations a second of large square matrix products in this precision, all ranks together.

        Measured on all ranks at once, so that processes that share cores share the rate too.
        """
        size = _GPU_MATRIX if self.device.type == "cuda" else _CPU_MATRIX
        a = torch.ones((size, size), dtype=self.dtype, device=self.device)
        product = torch.empty_like(a)
        ranks.sum(torch.zeros(1, device=self.device))
        rate = max(self._timed(lambda: torch.mm(a, a, out=product)) for _ in range(2))
        return float(ranks.sum(torch.tensor([2.0 * size**3 * rate], dtype=torch.float64, device=self.device)).item())

    def _timed(self, work: Callable[[], object]) -> float:
        """Calls of `work` a second."""
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < _MEASURE_SECONDS:
            work()
            calls += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return calls / (time.perf_counter() - start)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process held so far, on a GPU that torch allocated there."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
