"""Tiny random encoders and encoder-decoders, made once a session."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

TEXT = [Path(json.__file__).read_text(encoding="utf-8")]
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {}, "distilbert": {}, "modernbert": {"local_attention": 8}, "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
}  # fmt: skip
NAMES = {"bert": "Bert", "distilbert": "DistilBert", "modernbert": "ModernBert", "roberta": "Roberta",
         "xlm-roberta": "XLMRoberta"}  # fmt: skip
T5_SHAPE = {
    "vocab_size": 512, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "initializer_factor": 1.5,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 4,
}  # fmt: skip
BART_SHAPE = {
    "vocab_size": 512, "d_model": 48, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
    "init_std": 0.3, "decoder_start_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 4,
    "forced_eos_token_id": None,
}  # fmt: skip
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {"feed_forward_proj": "relu"}),
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", {}),
    "bart-forced": ("bart", {"forced_bos_token_id": 1, "forced_eos_token_id": 4, "scale_embedding": True}),
}
MakeEncoder = Callable[..., Path]


MakeSeq2Seq = Callable[..., Path]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    """Folder of a random encoder: model type, head ("" is none) and config keys."""

    @cache
    def make(kind: str, head: str = "", labels: tuple[str, ...] = LABELS, **config: Any) -> Path:
        torch.manual_seed(0)
        roberta = "roberta" in kind
        shape = {
            "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.3, "type_vocab_size": 2,
            "pad_token_id": 1 if roberta else 0, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 2,
            "sep_token_id": 3, "id2label": dict(enumerate(labels)),
        }  # fmt: skip
        if kind == "distilbert":
            shape |= {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "sinusoidal_pos_embds": False}
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                del shape[key]
        made = AutoConfig.for_model(kind, **(shape | SHAPES[kind] | config))
        model = getattr(transformers, NAMES[kind] + (head or "Model"))(made)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        specials = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"} if roberta else {
            "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}  # fmt: skip
        tokenizer = byte_level() if roberta else wordpiece()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_seq2seq(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeSeq2Seq:
    """Folder of a random model, named as in `SEQ2SEQ`, with the session's tokenizer."""

    @cache
    def make(name: str) -> Path:
        torch.manual_seed(0)
        kind, config = SEQ2SEQ[name]
        if kind == "t5":
            model = T5ForConditionalGeneration(T5Config(**(T5_SHAPE | config)))
        else:
            model = BartForConditionalGeneration(BartConfig(**(BART_SHAPE | config)))
        model.generation_config.eos_token_id = None if name != "bart-forced" else 4
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make
