"""Adapters over one base: each answer is the merged model's, whatever else is in the batch or in the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engine.adapter_loading import ADAPTER, check_adapter
from actors.engine.engine import Engine
from actors.engine.request import Completion, Request
from configs.errors import ArtifactError, ContractError, CorruptArtifactError
from configs.schema.generation import Sampling
from configs.schema.training import LoraConfig
from pipelines.training.adapters import Adapters
from tests.actors.engine.test_engine import prompt

NARROW = LoraConfig(rank=3, targets=("q_proj", "v_proj"))
WIDE = LoraConfig(rank=8, alpha=4.0)
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)


def publish(base: Path, folder: Path, config: LoraConfig, seed: int) -> tuple[Path, Path]:
    """An adapter with random factors as `finetune` publishes it, and the model it is merged into."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters = Adapters.attach(model, config, head="causal", seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    alone, merged = folder / "alone", folder / "merged"
    alone.mkdir(parents=True)
    adapters.save(alone / ADAPTER)
    adapters.merge().save_pretrained(merged)
    for file in base.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, alone)
            shutil.copy(file, merged)
    return alone, merged


@pytest.fixture(scope="module")
def base(make_model: Callable[..., Path]) -> Path:
    return make_model(end=False)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    work = tmp_path_factory.mktemp("adapters")
    return [publish(base, work / "narrow", NARROW, 1), publish(base, work / "wide", WIDE, 2)]


def load(folder: Path, decoder: str = "auto") -> Engine:
    return Engine.load(folder, precision="fp32", max_sequences=8, decoder=decoder)


def asked(count: int = 6) -> list[Request]:
    return [Request(str(n), prompt(5 + 11 * n, n), GREEDY) for n in range(count)]


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("which", [0, 1])
def test_an_adapter_writes_what_the_merged_model_writes(
    base: Path, folders: list[tuple[Path, Path]], which: int
) -> None:
    alone, merged = folders[which]
    engine = load(base)
    adapter = engine.load_adapter(alone, "a")
    found = tokens(engine.generate([replace(request, adapter=adapter) for request in asked()]))
    assert found == tokens(load(merged).generate(asked()))
    assert found != tokens(load(base).generate(asked()))


def test_biased_and_normed_queries_have_adapters_too(make_model: Callable[..., Path], tmp_path: Path) -> None:
    for name, config in (("biased", {"attention_bias": True, "mlp_bias": True}), ("single", {"kv_heads": 1})):
        base = make_model(end=False, **config)
        alone, merged = publish(base, tmp_path / name, WIDE, 3)
        engine = load(base)
        adapter = engine.load_adapter(alone, "a")
        found = engine.generate([replace(request, adapter=adapter) for request in asked()])
        assert tokens(found) == tokens(load(merged).generate(asked()))


def test_adapters_and_the_base_in_one_batch_each_write_what_they_write_alone(
    base: Path, folders: list[tuple[Path, Path]]
) -> None:
    engine = load(base)
    adapters = [None, *(engine.load_adapter(alone, alone.parent.name) for alone, _ in folders)]
    alone = [load(folder).generate(asked()) for folder in (base, *(merged for _, merged in folders))]
    mixed = [replace(r, id=f"{r.id}/{n}", adapter=adapter) for r in asked() for n, adapter in enumerate(adapters)]
    found = tokens(engine.generate(mixed))
    assert [found[n::3] for n in range(3)] == [tokens(each) for each in alone]


def test_what_one_adapter_left_in_the_cache_is_of_no_use_to_another(
    base: Path, folders: list[tuple[Path, Path]]
) -> None:
    engine = load(base)
    adapters = [None, *(engine.load_adapter(alone, alone.parent.name) for alone, _ in folders)]
    question = Request("q", prompt(60, 7), GREEDY)
    first = [engine.generate([replace(question, adapter=adapter)])[0] for adapter in adapters]
    again = [engine.generate([replace(question, adapter=adapter)])[0] for adapter in adapters]
    together = engine.generate([replace(question, id=str(n), adapter=a) for n, a in enumerate(adapters)])
    assert [completion.cached_tokens for completion in first] == [0, 0, 0]
    assert all(completion.cached_tokens > 40 for completion in (*again, *together))
    assert tokens(first) == tokens(again) == tokens(together)
    assert len(set(tokens(first))) == 3


def test_an_adapter_that_is_loaded_anew_goes_on_with_what_it_left(base: Path, folders: list[tuple[Path, Path]]) -> None:
    engine = load(base)
    question = Request("q", prompt(60, 8), GREEDY)
    before = engine.generate([replace(question, adapter=engine.load_adapter(folders[0][0], "a"))])
    after = engine.generate([replace(question, adapter=engine.load_adapter(folders[0][0], "a"))])
    assert (tokens(after), after[0].cached_tokens) == (tokens(before), 59)


def test_models_that_are_not_run_lean_take_no_adapters(base: Path, folders: list[tuple[Path, Path]]) -> None:
    with pytest.raises(ArtifactError, match="lean decoder only"):
        load(base, "modules").load_adapter(folders[0][0], "a")


def test_an_adapter_of_another_shape_or_another_text_is_refused(
    make_model: Callable[..., Path], base: Path, folders: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    check_adapter(base, folders[0][0])
    narrow = make_model(hidden_size=32)
    with pytest.raises(ArtifactError, match="does not fit"):
        load(narrow).load_adapter(folders[0][0], "a")
    with pytest.raises(ArtifactError, match="does not fit"):
        check_adapter(narrow, folders[0][0])
    other = shutil.copytree(folders[0][0], tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ContractError, match="another tokenizer or chat template"):
        load(base).load_adapter(other, "a")
    with pytest.raises(ContractError, match="another tokenizer or chat template"):
        check_adapter(base, other)


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("bias", "all"), ("peft_type", "IA3"), ("modules_to_save", ["lm_head"])]
)
def test_what_is_more_than_factors_is_refused_by_name(
    base: Path, folders: list[tuple[Path, Path]], tmp_path: Path, key: str, value: object
) -> None:
    folder = shutil.copytree(folders[0][0], tmp_path / "changed")
    path = folder / ADAPTER / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=key):
        load(base).load_adapter(folder, "a")


def test_damaged_adapters_are_told(base: Path, folders: list[tuple[Path, Path]], tmp_path: Path) -> None:
    engine = load(base)
    path = shutil.copytree(folders[0][0], tmp_path / "changed") / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in sorted(tensors)[:2]:
        save_file({**tensors, name: tensors[name].clone().fill_(float("nan"))}, path)
        with pytest.raises(CorruptArtifactError, match="no number"):
            engine.load_adapter(path.parent.parent, "a")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_B" in name}, path)
    with pytest.raises(ArtifactError, match="lora_B"):
        engine.load_adapter(path.parent.parent, "a")
    path.write_bytes(b"no tensors")
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        engine.load_adapter(path.parent.parent, "a")
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        engine.load_adapter(path.parent.parent, "a")
