"""Models to train: built from a config, or opened from a model folder.

Everything is a `transformers` model in and out, so that a folder written here opens in any tool that reads that format.
Weights are kept in fp32; bf16 comes from autocast in the loop. Initialisation is a function of the config and the seed
alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from configs.errors import ArtifactError
from configs.schema.model import ModelConfig

_INIT_STD = 0.02
_FEED_FORWARD_MULTIPLE = 32


def build_model(config: ModelConfig, *, vocab_size: int, eos_token_id: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model in fp32 on the CPU; equal arguments give equal weights.

    Matrices that write to the residual stream start at 1/sqrt(2 x layers) of the scale of the others, so that the
    stream's variance does not grow with depth (GPT-2, Radford et al. 2019).
    """
    wide = 8 * config.hidden_size // 3
    multiple = _FEED_FORWARD_MULTIPLE
    hugging_face = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or -(-wide // multiple) * multiple,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        initializer_range=_INIT_STD,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(hugging_face)
    _initialise(model, seed)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residual_std = _INIT_STD / (2 * model.config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
            parameter.normal_(0.0, std, generator=generator)


def load_model(folder: Path) -> nn.Module:
    """The causal language model of a model folder, in fp32 on the CPU.

    Raises:
        ArtifactError: the folder holds no model that `transformers` can open.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"no causal language model can be opened in {folder}: {error}",
            allowed="a folder with config.json and model.safetensors",
            next_step="ganymede artifacts verify",
        ) from error


def context_length(folder: Path) -> int:
    """Longest sequence, in tokens, of the model in a model folder."""
    length: int = AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
    return length


def save_model(model: nn.Module, folder: Path, *, eos_token_ids: Iterable[int], pad_token_id: int) -> None:
    """Writes config.json, generation_config.json and model.safetensors; equal weights give equal bytes."""
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(eos_token_ids), pad_token_id=pad_token_id, bos_token_id=None
    )
    model.save_pretrained(folder)


def hidden_states(model: nn.Module, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Final hidden states [rows, length, width] of right-padded token rows [rows, length].

    No attention mask: behind a causal mask no token sees the padding to its right. Of `position_ids`, `transformers`
    takes it that a sequence of its own begins wherever they do not go on by one, and attends to nothing before.
    """
    output: Tensor = model.base_model(input_ids=tokens, position_ids=position_ids, use_cache=False).last_hidden_state
    return output


def parameter_count(model: nn.Module) -> int:
    """Trainable scalars; shared weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating-point operations of one training step per token, for rows of `length` tokens.

    Six per weight that takes part in a matrix product (the output matrix included, an embedding lookup not), and
    12 x layers x width x length / 2 for causal attention (Chowdhery et al. 2022, appendix B, with the masked half left
    out).
    """
    matrices = sum(p.numel() for p in hidden_matrices(model).values())
    head = model.get_output_embeddings().weight.numel()
    config = model.config
    return 6.0 * (matrices + head) + 6.0 * config.num_hidden_layers * config.hidden_size * length


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The two-dimensional weights between embedding and output, by name."""
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return {n: p for n, p in model.named_parameters() if p.ndim == 2 and p.requires_grad and id(p) not in outer}
