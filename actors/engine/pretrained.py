"""A model folder opened through `transformers`, whole or not at all; where and in which precision it runs.

The engine's modules import `transformers` where they need it: that takes 4 s, and a Llama on the lean decoder needs
none of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from actors.engine.precision import has_bf16
from configs.errors import ArtifactError, ContractError, CorruptArtifactError

Precision = Literal["auto", "bf16", "fp32", "int8"]

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "intermediate_size",
)  # fmt: skip


def placement(precision: Precision, device: str) -> tuple[torch.dtype, torch.device]:
    """Type of arithmetic and place: `auto` is the first GPU if there is one, and bf16 where there is arithmetic for it.

    `int8` is about weights: products are fp32 then. Which models can have them is for `modules.load_decoder` to say.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if precision == "auto":
        precision = "bf16" if has_bf16(where) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32, where


def refuse_int8(precision: Precision, folder: Path, reason: str) -> None:
    """Raises `ArtifactError` with that reason if weights were to be int8."""
    if precision == "int8":
        raise ArtifactError(
            f"{folder}: this model cannot have int8 weights",
            received=reason,
            allowed="decoders shaped like Llama, on a CPU with a C compiler",
            next_step="choose precision auto, fp32 or bf16",
        )


def read_config(folder: Path) -> Any:
    """The config of a model folder, with the attributes that `transformers` gives it.

    A Llama's that leaves nothing to a default is read as it stands, any other by `transformers`.

    Raises `ArtifactError` if there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(
            f"no config.json in {folder}", allowed="a model folder", next_step="ganymede artifacts list"
        )
    complete = _complete_llama(path)
    if complete is not None:
        return complete
    from transformers import AutoConfig

    import actors.recurrent  # noqa: F401 - makes `transformers` know the LSTM baseline

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} is no model config: {error}") from error


def _complete_llama(path: Path) -> SimpleNamespace | None:
    """What the file says, if that is all that running a Llama takes; None if `transformers` has to complete it."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or said.get("model_type") != "llama":
        return None
    rope = said.get("rope_parameters")
    complete = (
        all(type(said.get(key)) is int for key in _SIZES)
        and type(said.get("rms_norm_eps")) is float
        and isinstance(said.get("hidden_act"), str)
        and type(said.get("tie_word_embeddings")) is bool
        and isinstance(said.get("architectures"), list)
        and isinstance(rope, dict)
        and rope.keys() == {"rope_type", "rope_theta"}
        and rope["rope_type"] == "default"
        and isinstance(rope["rope_theta"], int | float)
    )
    return SimpleNamespace(**{"is_encoder_decoder": False, **said}) if complete else None


def check_vocabulary(folder: Path, tokens: int, config: Any) -> None:
    """Raises `ContractError` if the tokenizer of a folder has more tokens than the model."""
    if tokens > config.vocab_size:
        raise ContractError(
            f"the tokenizer in {folder} has more tokens than the model",
            received=tokens,
            allowed=f"at most {config.vocab_size}",
            next_step="use the tokenizer files that were published with the model",
        )


def load_modules(
    folder: Path,
    auto_class: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    optional: Collection[str] = (),
) -> Any:
    """The model of a folder as `auto_class` builds it, for inference; `attention` as `transformers` names it.

    `transformers` gives weights that a file does not hold random values; here they are an error, but for modules
    whose names begin with one of `optional`. Raises `ArtifactError` if there are no safetensors weights or no such
    model, `CorruptArtifactError` if the weights cannot be read or are not all there.
    """
    if not any(folder.glob("*.safetensors")):
        raise ArtifactError(f"no *.safetensors in {folder}", allowed="a model folder with safetensors weights")
    try:
        model, info = auto_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(
            f"the weights in {folder} cannot be read: {error}", next_step="ganymede artifacts verify"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder} is no model that transformers can build: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(tuple(optional)))
    if missing:
        raise CorruptArtifactError(
            f"{folder}: the weights hold no {missing[0]}",
            received=f"{len(missing)} tensors missing",
            next_step="ganymede artifacts verify",
        )
    return model.to(device).eval()
