"""Low-rank adapters (LoRA; Hu et al. 2021) through `peft`: attached to a model, saved in peft's format, merged.

The model stays the `transformers` model it was, with layers exchanged in place, so loop and objectives need not know.
All that is trained are the factors and, of a model that classifies, what lies behind its body: that is new.
`peft` is imported only by the processes of a run that has adapters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from configs.artifacts import canonical_json
from configs.errors import ConfigError
from configs.schema.training import LoraConfig
from pipelines.training.models import Head, read_shape

ADAPTER = "adapter"
"""Folder of a model artifact that holds the adapters."""
_TASKS: dict[Head, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classify": "SEQ_CLS",
    "tag": "TOKEN_CLS",
}
"""What peft calls the tasks."""
_POOLER = "pooler"


class Adapters:
    """The adapters of one model; made by `attach`."""

    def __init__(self, wrapper: Any, config: LoraConfig) -> None:
        self.config = config
        self._wrapper = wrapper

    @classmethod
    def attach(cls, model: nn.Module, config: LoraConfig, *, head: Head, seed: int) -> Self:
        """Exchanges the layers that `config.targets` names in `model` and freezes the rest; equal for equal seeds.

        Until the first step the model computes what it did before.

        Raises:
            ConfigError: a target names no linear layer of the model's body.
        """
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        heads = _outside_body(model) if head in ("classify", "tag") else []
        settings = PeftConfig(
            task_type=_TASKS[head],
            r=config.rank,
            lora_alpha=config.scale,
            lora_dropout=config.dropout,
            target_modules=_targets(model, config),
            modules_to_save=heads or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(get_peft_model(model, settings), config)

    def describe(self) -> str:
        """One line for people."""
        config = self.config
        layers = "all linear layers" if config.targets is None else ", ".join(config.targets)
        merged = "merged into the weights" if config.merge else "not merged"
        return f"LoRA of rank {config.rank}, alpha {config.scale:g}, on {layers}; {merged}"

    def save(self, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, equal for equal weights."""
        from peft import get_peft_model_state_dict

        folder.mkdir()
        state = get_peft_model_state_dict(self._wrapper, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        described = self._wrapper.peft_config["default"].to_dict() | {
            "inference_mode": True,
            # It would be the path of a folder here.
            "base_model_name_or_path": None,
        }
        ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
        (folder / "adapter_config.json").write_bytes(canonical_json(json.loads(json.dumps(ordered))))

    def merge(self) -> nn.Module:
        """The plain model whose matrices hold what the adapters added; the adapters are gone afterwards."""
        merged: nn.Module = self._wrapper.merge_and_unload(safe_merge=True)
        return merged


def check_base(folder: Path, config: LoraConfig) -> None:
    """Raises `ConfigError` if adapters would be merged into the quantised weights of the model in `folder`."""
    if config.merge and getattr(read_shape(folder), "quantization_config", None) is not None:
        raise ConfigError(
            "lora.merge: the base model is quantised, and adapters are never merged into quantised weights",
            received=True,
            allowed="false",
            next_step="set lora.merge=false to keep the adapters beside the base model",
        )


def _targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the linear layers of the body that get adapters."""
    inner = {id(module) for module in model.base_model.modules()} - {id(model.get_output_embeddings())}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inner and _POOLER not in name.split(".")
    ]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [target for target in config.targets or () if target not in kinds]
    if unknown or not linear:
        raise ConfigError(
            f"lora.targets: a {model.config.model_type} model has no such linear layers",
            received=unknown or None,
            allowed=", ".join(kinds) or "no adapters: none of its layers is linear",
            next_step="leave lora.targets out for all linear layers, or leave lora out",
        )
    return [name for name in linear if config.targets is None or name.rpartition(".")[2] in config.targets]


def _outside_body(model: nn.Module) -> list[str]:
    """Parts with weights that a model which was no classifier before does not bring along."""
    children = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    parts = [name for name, child in children.items() if any(True for _ in child.parameters())]
    return parts + ([_POOLER] if getattr(model.base_model, _POOLER, None) is not None else [])
