"""Whether a device multiplies in bf16, rather than converting every operand to fp32 and back."""

from __future__ import annotations

import platform

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is arithmetic of `device` itself.

    oneDNN calls bf16 supported on any x86 processor with AVX-512, also where it emulates it: 768 x 768 products then
    run at 13 GFLOP/s instead of the 34 of fp32 (one thread of a busy Xeon without `avx512_bf16`).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
