"""Every architecture from scratch, out to a folder and back in; the recurrent one against plain reference code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from actors.store.artifacts import model_digest
from configs.errors import ArtifactError, ConfigError
from configs.schema.base import content_literals, references
from configs.schema.model import Architecture, ModelConfig
from configs.schema.training import FinetuneConfig
from pipelines.training.models import (
    AUTO_CLASSES,
    LANGUAGE_HEADS,
    build_model,
    context_length,
    hidden_matrices,
    load_model,
    pretraining_head,
    save_model,
    training_flops,
)

ARCHITECTURES = get_args(Architecture)
TOKENS = torch.arange(3, 19)[None]


def tiny(architecture: Any, **dials: Any) -> ModelConfig:
    shape = {"hidden_size": 32, "layers": 2, "heads": 2, "context_length": 32}
    return ModelConfig(architecture=architecture, **{**shape, **dials})


def build(config: ModelConfig, seed: int = 1) -> Any:
    return build_model(config, vocab_size=100, eos_token_id=0, seed=seed).eval()


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_from_scratch_opens_with_plain_transformers(architecture: Architecture, tmp_path: Path) -> None:
    config = tiny(architecture)
    model = build(config)
    save_model(model, tmp_path, eos_token_ids=(0,), pad_token_id=0)
    head = LANGUAGE_HEADS[config.family]
    opened = AUTO_CLASSES[head].from_pretrained(tmp_path).eval()
    assert torch.equal(logits(opened), logits(model))
    assert torch.equal(logits(build(config)), logits(model))
    assert not torch.equal(logits(build(config, seed=2)), logits(model))
    assert (context_length(tmp_path), pretraining_head(tmp_path)) == (32, head)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_and_heads_are_no_hidden_matrices(architecture: Architecture) -> None:
    model = build(tiny(architecture))
    sizes = {tuple(p.shape) for p in hidden_matrices(model).values()}
    assert sizes
    assert all(100 not in size and 2 not in size for size in sizes)


def test_a_new_head_on_a_model_that_stands_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_model(build(tiny("bert")), tmp_path, eos_token_ids=(0,), pad_token_id=0)
    one, same, other = (load_model(tmp_path, "classify", labels=["no", "yes"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert one.config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(ConfigError, match="a bert model cannot be trained this way"):
        load_model(tmp_path, "seq2seq")


def test_dropout_is_what_the_config_says_whatever_the_folder_says(tmp_path: Path) -> None:
    save_model(build(tiny("bert", dropout=0.3)), tmp_path, eos_token_ids=(0,), pad_token_id=0)
    assert load_model(tmp_path, "masked").config.hidden_dropout_prob == 0.0
    assert load_model(tmp_path, "masked", dropout=0.2).config.hidden_dropout_prob == 0.2


def test_width_and_depth_follow_the_size_and_yield_to_what_is_set() -> None:
    small = ModelConfig(architecture="bert", size="small")
    assert (small.width, small.depth, small.head_count, small.feed_forward) == (512, 4, 8, 2048)
    llama = ModelConfig(size="tiny", layers=3)
    assert (llama.width, llama.depth, llama.head_count, llama.feed_forward) == (128, 3, 2, 352)


@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ({"hidden_size": 36, "heads": 4}, "multiple of 2 x heads"),
        ({"architecture": "bert", "kv_heads": 1}, "kv_heads is for llama"),
        ({"from": "pretrain", "layers": 2}, "leave out layers, or from"),
    ],
)
def test_dials_that_cannot_be_are_refused(dials: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate(dials)


def test_a_folder_to_start_from_is_content_by_its_files_and_not_by_its_path(tmp_path: Path) -> None:
    def finetune(model: Any) -> FinetuneConfig:
        return FinetuneConfig.model_validate({"model": model, "data": "pairs", "training": {"steps": 1}})

    assert dict(references(finetune("pretrain"))) == {"model.from": "pretrain", "data": "pairs"}
    assert dict(references(finetune({"from": "/some/folder"}))) == {"data": "pairs"}
    assert content_literals(finetune("/a")) == content_literals(finetune("~/b")) == content_literals(finetune("c"))
    with pytest.raises(ArtifactError, match="is no model folder"):
        model_digest(tmp_path)
    save_model(build(tiny("bert")), tmp_path, eos_token_ids=(0,), pad_token_id=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    digest = model_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert model_digest(tmp_path) == digest
    (tmp_path / "tokenizer.json").write_text("[]")
    assert model_digest(tmp_path) != digest


def test_the_recurrent_model_is_the_textbook_lstm() -> None:
    model = build(tiny("lstm", layers=1))
    recurrence = model.model.recurrence
    hidden = cell = torch.zeros(32)
    for position, token in enumerate(TOKENS[0]):
        gates = (
            recurrence.weight_ih_l0 @ model.model.embedding.weight[token]
            + recurrence.bias_ih_l0
            + recurrence.weight_hh_l0 @ hidden
            + recurrence.bias_hh_l0
        )
        into, forget, new, out = gates.chunk(4)
        cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
        hidden = out.sigmoid() * cell.tanh()
        torch.testing.assert_close(logits(model)[0, position], F.linear(hidden, model.lm_head.weight))


def test_recurrent_generation_carries_the_state_and_equals_reading_everything_again() -> None:
    model = build(tiny("lstm"))
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    generated = model.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert lengths == [16] + [1] * 11
    text = TOKENS
    for _ in range(12):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, text)


def test_recurrent_generation_does_not_read_the_padding_of_a_batch() -> None:
    model = build(tiny("lstm"))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = [model.generate(TOKENS[:, :n], **settings)[0, n:] for n in (5, 16)]
    padded = torch.cat([F.pad(TOKENS[:, :5], (11, 0)), TOKENS])
    mask = torch.ones_like(padded)
    mask[0, :11] = 0
    together = model.generate(padded, attention_mask=mask, **settings)[:, 16:]
    assert torch.equal(together, torch.stack(alone))


def test_another_process_opens_the_recurrent_model_after_importing_its_module(tmp_path: Path) -> None:
    save_model(build(tiny("lstm")), tmp_path, eos_token_ids=(0,), pad_token_id=0)
    code = (
        "import sys, actors.recurrent; from transformers import AutoModelForCausalLM;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LstmForCausalLM"


@pytest.mark.parametrize("architecture", ["llama", "modernbert", "lstm"])
def test_the_arithmetic_of_a_step_counts_the_output_matrix_for_targets_alone(architecture: Architecture) -> None:
    model = build_model(tiny(architecture, intermediate_size=64), vocab_size=100, eos_token_id=0, seed=1)
    body = {"llama": 4 * 32 * 32 + 3 * 32 * 64, "modernbert": 4 * 32 * 32 + 3 * 32 * 64, "lstm": 2 * 4 * 32 * 32}
    attention = {"llama": 6 * 2 * 32 * 16, "modernbert": 12 * 2 * 32 * 16, "lstm": 0}
    head = {"llama": 0, "modernbert": 32 * 32, "lstm": 0}
    per_position, per_target = training_flops(model, 16)
    assert per_position == 6 * 2 * body[architecture] + attention[architecture]
    assert per_target == 6 * (100 * 32 + head[architecture])
