"""Random models and inputs for the engine's benchmark; their speed is that of trained ones of the same shape."""

from __future__ import annotations

import ast
import json
import random
import textwrap
import typing
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 8192
_TOKENS = 4096
_SPECIALS = ["<pad>", "<s>", "</s>"]


def _llama(hidden: int, layers: int, heads: int, inner: int, vocab: int) -> Any:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0))  # fmt: skip


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCAB, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None))  # fmt: skip


def _bart() -> Any:
    return BartForConditionalGeneration(BartConfig(
        vocab_size=VOCAB, d_model=512, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        encoder_attention_heads=8, decoder_attention_heads=8, max_position_embeddings=512, decoder_start_token_id=2,
        bos_token_id=1, pad_token_id=0, eos_token_id=None, forced_eos_token_id=None))  # fmt: skip


def _bert(kind: Any) -> Any:
    return kind(BertConfig(vocab_size=VOCAB, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                           intermediate_size=1536, max_position_embeddings=512))  # fmt: skip


MODELS: dict[str, Any] = {
    "17m": lambda: _llama(384, 8, 6, 1024, VOCAB),
    "100m": lambda: _llama(768, 12, 12, 2048, 2 * VOCAB),
    "t5": _t5,
    "bart": _bart,
    "classifier": lambda: _bert(BertForSequenceClassification),
    "embedder": lambda: _bert(BertModel),
}


def model_folder(name: str, work: Path) -> Path:
    """A folder with the model and a byte-level tokenizer, made if it is not there."""
    folder = work / name
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=_TOKENS, special_tokens=_SPECIALS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([_source()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>", model_max_length=512
    )


def _source() -> str:
    return "".join(Path(module.__file__ or "").read_text() for module in (ast, json, random, textwrap, typing))


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids drawn at random."""
    draw = random.Random(seed)
    return [[draw.randrange(len(_SPECIALS), _TOKENS) for _ in range(length)] for _ in range(count)]


def texts(count: int, seed: int = 0) -> list[str]:
    """Lines of Python of very different lengths, from about 5 to 150 tokens."""
    draw = random.Random(seed)
    lines = [line.strip() for line in _source().splitlines() if line.strip()]
    starts = [draw.randrange(len(lines) - 20) for _ in range(count)]
    return [" ".join(lines[start : start + draw.choice([1, 1, 2, 3, 5, 8])])[:400] for start in starts]
