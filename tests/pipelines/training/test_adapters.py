"""Fine-tuning with LoRA: what is trained, what is written, and what opens it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.store.artifacts import ArtifactStore
from actors.store.tracker import NoTracker
from actors.text import Text
from configs.errors import ArtifactError, ConfigError
from configs.schema.model import ModelConfig
from configs.schema.training import FinetuneConfig, LoraConfig
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage import StageContext
from pipelines.stages.finetune import assemble_finetuning, finetuned_model
from pipelines.training.adapters import ADAPTER, Adapters, check_base
from pipelines.training.examples import Framing, encode_examples
from pipelines.training.models import Head, build_model, load_model, parameter_count, save_model
from pipelines.training.pairs import render_pairs
from pipelines.training.parallel import Ranks
from pipelines.training.publication import Publication, write_model
from pipelines.training.start import Start
from pipelines.training.supervised import assemble_examples, make_model
from pipelines.training.worker import STOP, Task, clear_signals, read_failure, run

CPU = torch.device("cpu")
TRAINING = {
    "steps": 30, "batch_rows": 8, "workers": 1, "eval_every_steps": 10, "log_every_steps": 5,
    "optim": {"learning_rate": 0.01},
}  # fmt: skip
SHAPE: dict[str, Any] = {"hidden_size": 32, "layers": 2, "heads": 2, "context_length": 64}
WORDS = ["good", "bad"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models with a tokenizer, pairs rendered with it, and examples of two classes."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(["double 3 is 6, the film is good or bad\n" * 50], 300)
    for architecture in ("llama", "bert"):
        base = folder / architecture
        save_tokenizer(tokenizer, base)
        config = ModelConfig(architecture=architecture, **SHAPE)
        save_model(build_model(config, vocab_size=300, eos_token_id=0, seed=1), base, eos_token_ids=[0], pad_token_id=0)
    lines = [{"prompt": f"double {i}", "completion": f"{2 * i}"} for i in range(10)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [{"text": f"film {i} is {WORDS[i % 2]}", "label": WORDS[i % 2]} for i in range(24)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = folder / "rows"
    rows.mkdir()
    framing = Framing.load(folder / "bert", classified=True)
    for split in ("train", "heldout"):
        render_pairs(folder / "pairs.jsonl", rows / f"{split}.safetensors", Text.load(folder / "llama"), row_tokens=64)
        (folder / "labelled").mkdir(exist_ok=True)
        encode_examples(
            folder / "examples.jsonl", folder / "labelled" / f"{split}.safetensors", framing,
            task="classify", labels=WORDS, row_tokens=64,
        )  # fmt: skip
    return folder


def config(base: Path, **more: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"lora": {"rank": 4}, "training": TRAINING, **more}
    return FinetuneConfig.model_validate({"model": {"from": str(base)}, "data": "pairs", **settings})


def finetune(world: Path, work: Path, finetuning: FinetuneConfig, *, stopped: bool = False) -> tuple[Any, Path]:
    base = world / "llama"
    work.mkdir()
    task = Task(work, finetuning.training, functools.partial(assemble_finetuning, base, world / "rows", finetuning))
    if stopped:
        (work / STOP).touch()
        run(task, Ranks(), CPU)
        clear_signals(work)
    run(task, Ranks(), CPU)
    assert read_failure(work) is None
    return publish(task, base, "causal", finetuned_model(base, finetuning))


def publish(task: Task, base: Path, head: Head, made: tuple[nn.Module, Adapters | None]) -> tuple[Any, Path]:
    out = task.work / "out"
    out.mkdir()
    context = StageContext(
        name="finetune", work=task.work, out=out, run=NoTracker().run("k", "n"), progress=lambda progress: None,
        check_lease=lambda: None, store=ArtifactStore(task.work / "store"), home=task.work, acted={},
    )  # fmt: skip
    publication = Publication("Tiny", head, base, eos_token_ids=(0,), pad_token_id=0, facts={})
    return write_model(publication, made[0], task.config, context, adapters=made[1]), out


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits
    return found


def test_the_merged_model_is_the_base_with_its_adapters_and_less_is_trained(world: Path, tmp_path: Path) -> None:
    summary, out = finetune(world, tmp_path / "lora", config(world / "llama"))
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    before = logits(base)
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    beside = logits(PeftModel.from_pretrained(base, out / ADAPTER))
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 0.01
    assert summary["validation_loss"] < summary["first_validation_loss"] - 0.03
    layers, width, inner = SHAPE["layers"], SHAPE["hidden_size"], 96
    assert summary["trained_parameters"] == layers * 4 * (4 * 2 * width + 3 * (width + inner))
    assert summary["parameters"] == parameter_count(load_model(world / "llama"))
    assert f"| Parameters trained | {summary['trained_parameters']:,} |" in (out / "README.md").read_text()
    kept = load_model(out).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(kept, load_model(world / "llama").state_dict()["model.embed_tokens.weight"])


def test_a_stopped_and_resumed_run_publishes_the_same_adapters(world: Path, tmp_path: Path) -> None:
    settings = config(world / "llama", lora={"rank": 2, "dropout": 0.2, "targets": ["q_proj", "v_proj"]})
    _, whole = finetune(world, tmp_path / "whole", settings)
    _, parts = finetune(world, tmp_path / "parts", settings, stopped=True)
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert {Path(ADAPTER) / name for name in ("adapter_config.json", "adapter_model.safetensors")} <= set(files)
    assert files == {path.relative_to(parts): path.read_bytes() for path in parts.rglob("*") if path.is_file()}
    assert str(world) not in files[Path(ADAPTER) / "adapter_config.json"].decode()


def test_adapters_that_are_not_merged_lie_alone_in_the_artifact(world: Path, tmp_path: Path) -> None:
    _, out = finetune(world, tmp_path / "lora", config(world / "llama", lora={"rank": 2, "merge": False}))
    assert not (out / "model.safetensors").exists()
    assert "not merged" in (out / "README.md").read_text()
    with pytest.raises(ArtifactError, match="no model can be opened"):
        load_model(out)
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    before = logits(base)
    assert not torch.equal(before, logits(PeftModel.from_pretrained(base, out / ADAPTER)))


def test_a_new_head_is_trained_whole_and_saved_with_the_adapters(world: Path, tmp_path: Path) -> None:
    base = world / "bert"
    settings = config(base, task="classify", training={**TRAINING, "steps": 60})
    make = functools.partial(make_model, Start.find(settings.model, {}), settings, "classify", WORDS,
                             vocab_size=300, end=0)  # fmt: skip
    assemble = functools.partial(assemble_examples, make, world / "labelled", settings, "classify", WORDS, pad=0)
    task = Task(tmp_path, settings.training, assemble)
    run(task, Ranks(), CPU)
    assert read_failure(tmp_path) is None
    summary, out = publish(task, base, "classify", make())
    assert summary["validation_accuracy"] == 1.0
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.id2label == dict(enumerate(WORDS))
    fresh = load_model(base, "classify", labels=WORDS, seed=99)
    beside = logits(PeftModel.from_pretrained(fresh, out / ADAPTER))
    torch.testing.assert_close(logits(merged), beside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("architecture", "head"), [("gpt2", "causal"), ("t5", "seq2seq"), ("modernbert", "tag")])
def test_every_family_merges_into_what_it_computed(architecture: Any, head: Head) -> None:
    shape = ModelConfig(architecture=architecture, **SHAPE)
    model = build_model(shape, vocab_size=64, eos_token_id=0, seed=1, head=head, labels=WORDS if head == "tag" else ())
    tokens = torch.arange(5, 45).view(2, 20)
    more = {"decoder_input_ids": tokens} if head == "seq2seq" else {}
    before, size = model.eval()(input_ids=tokens, **more).logits, parameter_count(model)
    adapters = Adapters.attach(model, LoraConfig(rank=2), head=head, seed=1)
    torch.testing.assert_close(model.eval()(input_ids=tokens, **more).logits, before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    beside = model(input_ids=tokens, **more).logits
    merged = adapters.merge()
    torch.testing.assert_close(merged(input_ids=tokens, **more).logits, beside, rtol=1e-5, atol=1e-5)
    assert parameter_count(merged) == size
    assert not torch.allclose(beside, before)


def test_what_adapters_cannot_be_put_on_is_refused_by_name(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets.*received \['query'\]; allowed: .*q_proj"):
        Adapters.attach(load_model(world / "llama"), LoraConfig(targets=("query",)), head="causal", seed=1)
    lstm = build_model(ModelConfig(architecture="lstm", **SHAPE), vocab_size=64, eos_token_id=0, seed=1)
    with pytest.raises(ConfigError, match="none of its layers is linear"):
        Adapters.attach(lstm, LoraConfig(), head="causal", seed=1)
    described = json.loads((world / "llama" / "config.json").read_text())
    quantised = {**described, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ConfigError, match=r"never merged into quantised weights.*lora\.merge=false"):
        check_base(tmp_path, LoraConfig())
    check_base(tmp_path, LoraConfig(merge=False))
    with pytest.raises(ValidationError, match=r"lora needs a model that stands"):
        FinetuneConfig.model_validate(
            {"task": "classify", "tokenizer": "t", "data": "d", "model": {}, "lora": {}, "training": {"steps": 1}}
        )
