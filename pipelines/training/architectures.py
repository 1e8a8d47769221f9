"""Models from scratch: what a few dials come to in each architecture of `transformers`, freshly initialised.

Initialisation is a function of the config and the seed alone. Every token id that a model needs (padding, begin, end)
is the one that ends a text: the tokenizers made here have no other, and padding is masked out wherever it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
)

from actors.recurrent import LstmConfig
from configs.schema.model import Architecture, ModelConfig

_INIT_STD = 0.02
_SLIDING_WINDOW = 128


def architecture_config(config: ModelConfig, *, vocab_size: int, eos_token_id: int) -> PretrainedConfig:
    """The `transformers` config of a model from scratch."""
    return _BUILDERS[config.architecture](
        config, {"vocab_size": vocab_size, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id}
    )


def _llama(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return LlamaConfig(
        **common,
        hidden_size=config.width,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.depth,
        num_attention_heads=config.head_count,
        num_key_value_heads=config.kv_heads or config.head_count,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        initializer_range=_INIT_STD,
        attention_dropout=config.dropout,
    )


def _gpt2(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return GPT2Config(
        **common,
        n_embd=config.width,
        n_inner=config.feed_forward,
        n_layer=config.depth,
        n_head=config.head_count,
        n_positions=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
    )


def _encoder(config: ModelConfig, common: dict[str, Any]) -> dict[str, Any]:
    return {
        **common,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.head_count,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
    }


def _bert(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return BertConfig(
        **_encoder(config, common),
        max_position_embeddings=config.context_length,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )


def _roberta(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return RobertaConfig(
        **_encoder(config, common),
        # Positions are counted from the padding id on.
        max_position_embeddings=config.context_length + common["pad_token_id"] + 1,
        type_vocab_size=1,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )


def _modernbert(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return ModernBertConfig(
        **_encoder(config, common),
        max_position_embeddings=config.context_length,
        local_attention=_SLIDING_WINDOW,
        cls_token_id=common["eos_token_id"],
        sep_token_id=common["eos_token_id"],
        # Masked language modelling teaches the first token nothing about the text, as it stands before every document.
        classifier_pooling="mean",
        attention_dropout=config.dropout,
        embedding_dropout=config.dropout,
        mlp_dropout=config.dropout,
    )


def _t5(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return T5Config(
        **common,
        d_model=config.width,
        d_kv=config.width // config.head_count,
        d_ff=config.feed_forward,
        num_layers=config.depth,
        num_heads=config.head_count,
        decoder_start_token_id=common["pad_token_id"],
        dropout_rate=config.dropout,
        tie_word_embeddings=config.tie_embeddings,
        # Positions are relative, so nothing in the model bounds them; the rows it is trained on do.
        max_position_embeddings=config.context_length,
    )


def _bart(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", config.depth),
            ("attention_heads", config.head_count),
            ("ffn_dim", config.feed_forward),
        )
    }
    return BartConfig(
        **common,
        **sides,
        d_model=config.width,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        decoder_start_token_id=common["eos_token_id"],
        forced_eos_token_id=None,
        dropout=config.dropout,
    )


def _lstm(config: ModelConfig, common: dict[str, Any]) -> PretrainedConfig:
    return LstmConfig(
        **common,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        dropout=config.dropout,
    )


_BUILDERS: dict[Architecture, Callable[[ModelConfig, dict[str, Any]], PretrainedConfig]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _roberta,
    "modernbert": _modernbert,
    "t5": _t5,
    "bart": _bart,
    "lstm": _lstm,
}


@torch.no_grad()
def initialise_llama(model: nn.Module, seed: int) -> None:
    """Normal weights whose width is 0.02, or 0.02 / sqrt(2 x layers) where they write to the residual stream.

    The stream's variance then does not grow with depth (GPT-2, Radford et al. 2019). The other architectures are
    initialised by `transformers` the way their authors did.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = _INIT_STD / (2 * model.config.num_hidden_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0)
        else:
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
            parameter.normal_(0.0, std, generator=generator)
