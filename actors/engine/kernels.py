"""The C functions of `native/` as functions of tensors: compiled when the first model is opened, in a second, and
kept for later processes.

For fp32 on a CPU. Against torch's own on one core with AVX2: products of 2 to 16 rows 1.5 to 2.8 times as fast, of 256
rows 1.1 times; attention of tokens over unlike lengths without a mask, and without reading past an end. Where there is
no C compiler, and in other precisions and places, callers do with torch; `kernels_for` says which, and a log line why.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: N token, H query head, K key/value head, D head dim

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args

import torch

KernelsKind = Literal["compiled", "torch"]
Activation = Literal["gelu", "silu", "gelu_new"]
"""By their names in `transformers`."""

_NATIVE = Path(__file__).with_name("native")
_KEPT = Path(__file__).with_name("__pycache__")
# No OpenMP library is linked: its functions are found in the one that torch has loaded, whose threads are shared.
_COMPILE = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-c")
_SMALL = 1 << 18
"""Multiplications that one thread has done before others have begun."""
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "panel_width": [],
    "product": [_POINTER] * 5 + [_INT] * 5,
    "attend": [_POINTER] * 9 + [_LONG] * 5 + [_INT] * 4 + [_FLOAT, _INT],
    "attention_room": [_LONG],
    "llama_room": [_POINTER, _INT, _LONG, _INT],
    "llama_step": [_POINTER] * 3 + [_LONG] + [_POINTER] * 2 + [_INT],
    "store": [_POINTER] * 3 + [_LONG] + [_INT] * 3,
    "rms_norm": [_POINTER] * 3 + [_INT] * 2 + [_FLOAT],
    "layer_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT],
    "activate": [_POINTER] * 3 + [_LONG, _INT, _LONG, _INT],
}
_RESULTS = {"panel_width": _INT, "attention_room": _LONG, "llama_room": _LONG, "llama_step": _INT}

_log = logging.getLogger(__name__)


class Kernels:
    """The compiled functions. All tensors are fp32 or int64 on the CPU."""

    def __init__(self, library: Any) -> None:
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = _RESULTS.get(name)
        self.library = library
        self.panel: int = library.panel_width()
        """Columns that lie side by side in a weight for `product`."""

    def product(
        self,
        x: torch.Tensor,
        panels: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        add: bool,
    ) -> None:
        """`out` [N, O] becomes `x` [N, C] times a weight, plus the bias, or has that added.

        Args:
            x: contiguous.
            panels: the weight, [ceil(O / panel), C, panel], fp32 or int8; columns beyond O are not used.
            scales: what each column is to be multiplied by if the weight is int8, else None; as many as columns.
            bias: of as many columns as the weight, or None.
            out: contiguous.
            add: whether what `out` holds counts.
        """
        (rows, inner), cols = x.shape, out.shape[1]
        threads = 1 if rows * inner * cols < _SMALL else torch.get_num_threads()
        self.library.product(
            x.data_ptr(), panels.data_ptr(), address(scales), address(bias), out.data_ptr(), rows, inner, cols, add,
            threads,
        )  # fmt: skip

    def attend(
        self,
        queries_NHD: torch.Tensor,
        keys_RKLD: torch.Tensor,
        values_RKLD: torch.Tensor,
        rows_N: torch.Tensor,
        lengths_N: torch.Tensor,
        longest: int,
        *,
        scale: float = 1.0,
        bias_HL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of tokens over rows of a cache, [N, H * D]; those of a row, side by side, read it together.

        Args:
            queries_NHD: fastest if each token's heads lie side by side.
            keys_RKLD: rows of a cache; keys and values are laid out alike.
            values_RKLD: likewise.
            rows_N: the row of each token.
            lengths_N: how many of its positions each token sees.
            longest: the largest of these.
            scale: of the scores.
            bias_HL: contiguous; added to a head's score by the distance from the token, 0 being its own.
        """
        queries_NHD = _side_by_side(queries_NHD)
        count, heads, size = queries_NHD.shape
        kv_heads = keys_RKLD.shape[1]
        out_NX = queries_NHD.new_empty(count, heads * size)
        threads = 1 if count * heads * longest * size < _SMALL else torch.get_num_threads()
        room = queries_NHD.new_empty(threads * self.library.attention_room(longest))
        first = rows_N.new_empty(count + 1, dtype=torch.int32)
        self.library.attend(
            queries_NHD.data_ptr(), keys_RKLD.data_ptr(), values_RKLD.data_ptr(),
            address(bias_HL), room.data_ptr(), out_NX.data_ptr(), rows_N.data_ptr(),
            lengths_N.data_ptr(), first.data_ptr(), longest, queries_NHD.stride(0), keys_RKLD.stride(0),
            keys_RKLD.stride(1), 0 if bias_HL is None else bias_HL.stride(0), count, kv_heads, heads // kv_heads, size,
            scale, threads,
        )  # fmt: skip
        return out_NX

    def store(self, vectors_NHD: torch.Tensor, cache: torch.Tensor, addresses: torch.Tensor) -> None:
        """Copies vectors to addresses [N * H] (in vectors) of a cache."""
        vectors_NHD = _side_by_side(vectors_NHD)
        count, heads, size = vectors_NHD.shape
        self.library.store(
            vectors_NHD.data_ptr(), cache.data_ptr(), addresses.data_ptr(), vectors_NHD.stride(0), count, heads, size
        )

    def rms_norm(self, x_NC: torch.Tensor, weight_C: torch.Tensor, epsilon: float) -> torch.Tensor:
        """As `torch.nn.functional.rms_norm` over the last dimension."""
        x_NC = x_NC.contiguous()
        out_NC, size = torch.empty_like(x_NC), len(weight_C)
        self.library.rms_norm(
            x_NC.data_ptr(), weight_C.data_ptr(), out_NC.data_ptr(), x_NC.numel() // size, size, epsilon
        )
        return out_NC

    def layer_norm(
        self, x_NC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """As `torch.nn.functional.layer_norm` over the last of two dimensions."""
        x_NC = x_NC.contiguous()
        out_NC = torch.empty_like(x_NC)
        self.library.layer_norm(
            x_NC.data_ptr(), weight_C.data_ptr(), bias_C.data_ptr(), out_NC.data_ptr(), *x_NC.shape, epsilon
        )
        return out_NC

    def activate(self, name: Activation, x_NX: torch.Tensor, *, gated: bool) -> torch.Tensor:
        """An activation of `x_NX`, contiguous, or if `gated` that of each row's first half times the second half."""
        count, stride = x_NX.shape
        size = stride // 2 if gated else stride
        out_NI = x_NX.new_empty(count, size)
        up = x_NX.data_ptr() + size * x_NX.itemsize if gated else None
        kind = get_args(Activation).index(name)
        self.library.activate(x_NX.data_ptr(), up, out_NI.data_ptr(), count, size, stride, kind)
        return out_NI


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None, which C takes for NULL, if there is none."""
    return None if tensor is None else tensor.data_ptr()


def _side_by_side(vectors_NHD: torch.Tensor) -> torch.Tensor:
    """With each token's vectors one after the other; tokens may lie further apart."""
    size = vectors_NHD.shape[2]
    adjacent = vectors_NHD.stride(2) == 1 and vectors_NHD.stride(1) == size
    return vectors_NHD if adjacent else vectors_NHD.contiguous()


def kernels_kind(dtype: torch.dtype, device: torch.device) -> KernelsKind:
    """What runs the products of a model: the compiled functions or `torch`."""
    return "torch" if kernels_for(dtype, device) is None else "compiled"


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The compiled functions, for fp32 on a CPU where there is a C compiler."""
    return _compiled() if dtype == torch.float32 and device.type == "cpu" else None


@cache
def _compiled() -> Kernels | None:
    """The sources as a library of this process; None, and a log line, where it cannot be compiled."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        _log.warning("no C compiler is installed: models in fp32 run on torch alone, which is slower on a CPU")
        return None
    try:
        return Kernels(_library(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", None) or error).strip()
        _log.warning("%s cannot compile native/, models in fp32 run on torch alone: %s", compiler, output)
        return None


def _library(compiler: str) -> ctypes.CDLL:
    """The compiled sources: kept where Python keeps its compiled modules, if that can be written."""
    try:
        _KEPT.mkdir(exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=_KEPT)
    except OSError as error:
        _log.info("kernels are compiled anew in each process: %s", error)
        with tempfile.TemporaryDirectory(prefix="ganymede-") as name:
            return ctypes.CDLL(str(_built(compiler, Path(name))))
    with scratch as name:
        return _kept_library(compiler, _KEPT / f"kernels-{_identity(compiler)}.so", Path(name))


def _kept_library(compiler: str, path: Path, scratch: Path) -> ctypes.CDLL:
    """The library at `path`, compiled first, in `scratch`, if it is not there or damaged."""
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            _log.warning("%s is compiled anew: %s", path, error)
    _built(compiler, scratch).replace(path)
    return ctypes.CDLL(str(path))


def _identity(compiler: str) -> str:
    """Of a compiled library: sources, flags, compiler and processor."""
    digest = blake2b(digest_size=16)
    for path in sorted(_NATIVE.glob("*.[ch]")):
        digest.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    digest.update(repr((_COMPILE, compiler, version, platform.machine(), processor or lines)).encode())
    return digest.hexdigest()


def _built(compiler: str, folder: Path) -> Path:
    """The sources, compiled side by side, as one library in `folder`."""

    def build(source: Path) -> str:
        built = str(folder / f"{source.stem}.o")
        command = [compiler, *_COMPILE, str(source), "-o", built]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return built

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(build, sorted(_NATIVE.glob("*.c"))))
    library = folder / "kernels.so"
    link = [compiler, "-shared", *objects, "-o", str(library), "-lm"]
    subprocess.run(link, check=True, capture_output=True, text=True, timeout=60)
    return library
