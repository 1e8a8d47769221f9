"""A Llama folder as a GGUF file, for llama.cpp's own benchmark: no vocabulary, and weights as they are or in Q8_0.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_TYPES = {torch.float32: 0, torch.int8: 8, torch.bfloat16: 30}
_BLOCK = 32
"""Weights of Q8_0 that have a scale together."""
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Writes the model in `folder` to `path`, int8 as Q8_0; vectors stay fp32, as llama.cpp has it."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring dimensions, transformers the two halves of a head.
            count = heads if "q_proj" in name else kv_heads
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        kept = dtype if tensor.dim() > 1 else torch.float32
        values = _q8_0(tensor) if kept == torch.int8 else tensor.to(kept).contiguous()
        tensors[_renamed(name)] = (tensor.shape, kept, values)
    meta: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "general.name": folder.name,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": config["hidden_size"] // heads,
        "tokenizer.ggml.model": "no_vocab",
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(_entry(key, value) for key, value in meta.items())
    offset = 0
    for name, (shape, kept, values) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], _TYPES[kept], offset)
        offset += _padded(values.nbytes)
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for _, _, values in tensors.values():
            file.write(values.view(torch.uint8).numpy().tobytes().ljust(_padded(values.nbytes), b"\0"))


def _q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of an fp16 scale and as many bytes as a block has weights."""
    blocks = weight.float().reshape(-1, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks / scales.clamp(min=1e-30)).round().to(torch.int8)
    return torch.cat([scales.half().view(torch.uint8), codes.view(torch.uint8)], dim=1)


def _renamed(name: str) -> str:
    known = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in known:
        return known[name] + ".weight"
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[module]}.weight"


def _entry(key: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return _text(key) + struct.pack("<If", _FLOAT32, value)
    return _text(key) + struct.pack("<II", _UINT32, value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
