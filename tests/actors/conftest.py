"""Tiny real tokenizers and models, made once a session."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 entries with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text(encoding="utf-8")], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return folder


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Folder of a random Llama with the session's tokenizer; config keys as keyword arguments."""

    @cache
    def make(*, kv_heads: int = 2, tied: bool = True, end: bool = True, **config: object) -> Path:
        torch.manual_seed(0)
        shape: dict[str, object] = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 96,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "pad_token_id": 0,
            "eos_token_id": [0, 4] if end else None,
        }
        model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make
