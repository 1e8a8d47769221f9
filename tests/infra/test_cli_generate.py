"""`ganymede generate` with every kind of model, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from actors.engine.loading import load_engine
from actors.engine.request import Request
from actors.recurrent import LstmConfig, LstmForCausalLM
from configs.schema.generation import Sampling
from infra.cli.main import app

ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(
        vocab_size=257, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        initializer_factor=20.0, pad_token_id=0, eos_token_id=None)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, **ENDS)),
    "lstm": lambda: LstmForCausalLM(LstmConfig(vocab_size=257, hidden_size=16, eos_token_id=None)),
    "bert": lambda: BertModel(BertConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)),
}  # fmt: skip


def folder(name: str, where: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(["<pad>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(where)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(where)
    return where


def generate(model: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setenv("GANYMEDE_HOME", str(model / "home"))
    return CliRunner().invoke(app, ["generate", str(model), "--prompt", "def f(x):", *arguments])


@pytest.mark.parametrize("name", ["t5", "llama", "lstm"])
def test_text_of_any_generating_model_is_the_engines(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(name, tmp_path)
    done = generate(model, monkeypatch, "--max-tokens", "12", "--json")
    assert done.exit_code == 0, done.output
    engine = load_engine(model)
    ids = tuple(engine.text.encode("def f(x):"))
    (expected,) = engine.generate([Request("a", ids, Sampling(max_new_tokens=12, temperature=0))])
    said = json.loads(done.stdout)
    assert said["text"] == expected.text
    assert (said["prompt_tokens"], said["completion_tokens"]) == (9, 12)


def test_an_encoder_is_refused_as_it_generates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = generate(folder("bert", tmp_path), monkeypatch)
    assert done.exit_code != 0
    assert "generates no text" in str(done.exception) + done.output
