"""The decoders of `transformers`' T5 and BART, laid out for `seq2seq_decoder`."""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: N token, C hidden, H head, L distance in positions

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from actors.engine.linear import LayerNorm, Linear, RmsNorm
from actors.engine.seq2seq_decoder import Layer, Norm, Seq2SeqDecoder, Shape


def t5(model: Any, target_length: int) -> Seq2SeqDecoder:
    """Of a `T5ForConditionalGeneration`, for targets of at most `target_length` tokens."""
    config, stack = model.config, model.decoder
    to = {"dtype": model.shared.weight.dtype, "device": model.shared.weight.device}
    blocks = [block.layer for block in stack.block]
    attention = blocks[0][0].SelfAttention
    back_L = torch.arange(target_length, device=to["device"])
    buckets_L = attention._relative_position_bucket(
        -back_L,
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    gated = config.is_gated_act
    shape = Shape(
        vocab=config.vocab_size,
        layers=len(blocks),
        heads=config.num_heads,
        head_dim=config.d_kv,
        pre_norm=True,
        gated=gated,
        activation=config.dense_act_fn,
    )

    def layer(own: Any, cross: Any, dense: Any) -> Layer:
        attention, mlp = own.SelfAttention, dense.DenseReluDense
        return Layer(
            qkv=Linear.fused([attention.q, attention.k, attention.v], **to),
            out=Linear.fused([attention.o], **to),
            attention_norm=_rms(own.layer_norm, to),
            cross_query=Linear.fused([cross.EncDecAttention.q], **to),
            cross_out=Linear.fused([cross.EncDecAttention.o], **to),
            cross_norm=_rms(cross.layer_norm, to),
            up=Linear.fused([mlp.wi_0, mlp.wi_1] if gated else [mlp.wi], **to),
            down=Linear.fused([mlp.wo], **to),
            mlp_norm=_rms(dense.layer_norm, to),
        )

    cross = [part for block in blocks for part in (block[1].EncDecAttention.k, block[1].EncDecAttention.v)]
    scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
    embedding = stack.embed_tokens.weight
    return Seq2SeqDecoder(
        shape,
        layers=[layer(*block) for block in blocks],
        cross=Linear.fused(cross, **to),
        embed=lambda tokens_N, positions_N: F.embedding(tokens_N, embedding),
        norm=_rms(stack.final_layer_norm, to),
        head=Linear.fused([model.lm_head], [scale], **to),
        bias_HL=attention.relative_attention_bias.weight[buckets_L].t().to(**to),
    )


def bart(model: Any, target_length: int) -> Seq2SeqDecoder:
    """Of a `BartForConditionalGeneration`, for targets of at most `target_length` tokens."""
    config, stack = model.config, model.model.decoder
    to = {"dtype": stack.embed_tokens.weight.dtype, "device": stack.embed_tokens.weight.device}
    shape = Shape(
        vocab=config.vocab_size,
        layers=len(stack.layers),
        heads=config.decoder_attention_heads,
        head_dim=config.d_model // config.decoder_attention_heads,
        pre_norm=False,
        gated=False,
        activation=config.activation_function,
    )

    def layer(module: Any) -> Layer:
        own, cross = module.self_attn, module.encoder_attn
        return Layer(
            qkv=Linear.fused([own.q_proj, own.k_proj, own.v_proj], [own.scaling, 1.0, 1.0], **to),
            out=Linear.fused([own.out_proj], **to),
            attention_norm=_layer_norm(module.self_attn_layer_norm, to),
            cross_query=Linear.fused([cross.q_proj], [cross.scaling], **to),
            cross_out=Linear.fused([cross.out_proj], **to),
            cross_norm=_layer_norm(module.encoder_attn_layer_norm, to),
            up=Linear.fused([module.fc1], **to),
            down=Linear.fused([module.fc2], **to),
            mlp_norm=_layer_norm(module.final_layer_norm, to),
        )

    embedding, positions = stack.embed_tokens.weight, stack.embed_positions
    # BART's table of positions begins with two that are never used.
    table, scale = positions.weight[positions.offset :], math.sqrt(config.d_model) if config.scale_embedding else 1.0
    embedding_norm = _layer_norm(stack.layernorm_embedding, to)

    def embed(tokens_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        return embedding_norm(F.embedding(tokens_N, embedding) * scale + table[positions_N])

    cross = [part for module in stack.layers for part in (module.encoder_attn.k_proj, module.encoder_attn.v_proj)]
    return Seq2SeqDecoder(
        shape,
        layers=[layer(module) for module in stack.layers],
        cross=Linear.fused(cross, **to),
        embed=embed,
        norm=lambda x_NC: x_NC,
        head=Linear.of([(model.lm_head.weight, model.final_logits_bias[0])], **to),
        bias_HL=torch.zeros(1, target_length, **to),
    )


def _rms(module: Any, to: dict[str, Any]) -> Norm:
    return RmsNorm(module.weight.to(**to), module.variance_epsilon)


def _layer_norm(module: Any, to: dict[str, Any]) -> Norm:
    return LayerNorm(module.weight.to(**to), module.bias.to(**to), module.eps)
