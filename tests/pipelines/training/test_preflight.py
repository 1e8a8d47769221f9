"""What a run is told to need before it starts, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.schema.model import ModelConfig
from configs.schema.training import LoraConfig, OptimConfig, TrainingConfig
from pipelines.training.adapters import Adapters
from pipelines.training.hardware import Hardware
from pipelines.training.models import Head, build_model, save_model
from pipelines.training.objectives import LanguageObjective, Rows
from pipelines.training.preflight import Facts, Trial, can_try, check, plan, survey, trial
from pipelines.training.start import Start

CPU = Hardware(torch.device("cpu"), "fp32", compile=False)
TRAINING = TrainingConfig(steps=100, batch_rows=8, micro_batch_rows=4, workers=2, optim=OptimConfig(name="adamw"))
FACTS = Facts(
    parameters=1000, trained=1000, trained_by_muon=0, gathered=150, flops_per_position=6000.0, row_positions=32,
    memory_bytes=2_000_000_000, workers_on_machine=2,
)  # fmt: skip


class Lengths(LanguageObjective):
    """Rows of 32 places of which all steps but the first use half."""

    row_tokens = 32
    bytes_per_token = 1.0

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        tokens = torch.arange(4 * 65).view(4, 65) % 60
        targets = torch.ones((4, 64), dtype=torch.bool)
        targets[:, 32 if step else 64 :] = False
        return Rows(tokens, targets)

    def validation(self) -> Mapping[str, Rows]:
        return {"": self.batch(0, 0, 1)}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        return ["row"] * 4


def test_a_plan_multiplies_out() -> None:
    planned = plan(FACTS, TRAINING)
    assert planned.positions == 100 * 8 * 32
    assert planned.flops == planned.positions * 6000.0
    assert planned.compute_optimal_tokens == 20_000
    assert planned.tokens_per_second is planned.seconds is planned.cost is None
    assert "speed unknown" in planned.describe()
    # Weights, gradients, two numbers of AdamW, and a copy of weights and numbers for the checkpoint.
    assert planned.worker_bytes - plan(dataclasses.replace(FACTS, parameters=0, trained=0), TRAINING).worker_bytes == (
        4 * 1000 * (1 + 1 + 2 + 3)
    )


def test_muon_needs_its_directions_beside_the_copy_and_a_gpu_holds_no_copy() -> None:
    facts = dataclasses.replace(FACTS, trained_by_muon=600)
    nothing = dataclasses.replace(FACTS, parameters=0, trained=0)
    numbers = {False: 2 * 1000 + 1400 + 2 * 600 + 2400, True: 2 * 1000 + 1400 + 2 * 600}
    for use_gpu, expected in numbers.items():
        config = TRAINING.model_copy(update={"optim": OptimConfig(name="muon"), "use_gpu": use_gpu})
        assert plan(facts, config).worker_bytes - plan(nothing, config).worker_bytes == 4 * expected


@pytest.mark.parametrize(("workers", "numbers"), [(1, 7 * 1000), (2, 7 * 1000 / 2 + 2 * 150), (8, 7 * 125 + 2 * 150)])
def test_a_sharded_worker_needs_its_part_and_what_it_gathers(workers: int, numbers: float) -> None:
    config = TRAINING.model_copy(update={"sharding": "full", "workers": workers})
    nothing = dataclasses.replace(FACTS, parameters=0, trained=0, gathered=0)
    assert plan(FACTS, config).worker_bytes - plan(nothing, config).worker_bytes == 4 * numbers
    only_built = dataclasses.replace(FACTS, trained=0, gathered=0)
    built = plan(only_built, config).worker_bytes - plan(nothing, config).worker_bytes
    assert built == 4 * 1000  # whole in the machine's memory before it is cut


def test_of_a_model_its_layers_are_gathered_one_at_a_time() -> None:
    config = ModelConfig(hidden_size=32, layers=3, heads=2, context_length=32, tie_embeddings=True)
    skeleton = Start(config, None, None).skeleton("causal", vocab_size=300, eos_token_id=0)
    facts = survey(skeleton, 32, TRAINING, memory_bytes=1, workers_on_machine=1)
    layer = sum(p.numel() for p in skeleton.get_decoder().layers[0].parameters())
    assert facts.gathered == facts.parameters - 2 * layer == 300 * 32 + 32 + layer


def test_a_trial_gives_time_memory_and_cost() -> None:
    tried = dataclasses.replace(
        FACTS, trial=Trial(0.001, row_positions=16, activation_bytes=10_000_000, optimizer_seconds=0.016)
    )
    config = TRAINING.model_copy(update={"price_per_hour": 9.0})
    planned = plan(tried, config)
    assert planned.positions == 100 * 8 * 16
    assert planned.seconds == pytest.approx(100 * (8 * 16 * 0.001 / 2 + 0.016))
    assert planned.tokens_per_second == pytest.approx(1600)
    assert planned.cost == pytest.approx(8.0 / 3600 * 9)
    assert planned.worker_bytes == plan(FACTS, config).worker_bytes + 10_000_000
    assert "about 1,600 tokens/s, 0.1 min, cost 0.02" in planned.describe()


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    config = ModelConfig(hidden_size=16_384, layers=96, heads=128)
    skeleton = Start(config, None, None).skeleton("causal", vocab_size=50_000, eos_token_id=0)
    facts = survey(skeleton, 256, TRAINING, memory_bytes=8_000_000_000, workers_on_machine=2)
    assert facts.parameters > 3e11
    with pytest.raises(ConfigError, match=r"2 workers x .* GB.*8\.00 GB, which are free.*micro_batch_rows \(now 4\)"):
        check(plan(facts, TRAINING), facts, TRAINING)
    assert not can_try(facts)
    check(plan(FACTS, TRAINING), FACTS, TRAINING)
    unknown = dataclasses.replace(facts, memory_bytes=None)
    check(plan(unknown, TRAINING), unknown, TRAINING)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("llama", "causal"), ("t5", "seq2seq"), ("modernbert", "masked"), ("bert", "tag"), ("lstm", "causal")],
)
def test_a_model_without_weights_counts_like_the_model(architecture: Any, head: Head, tmp_path: Path) -> None:
    config = ModelConfig(architecture=architecture, hidden_size=32, layers=2, heads=2, context_length=32)
    labels = ("O", "B-X") if head == "tag" else ()
    model = build_model(config, vocab_size=300, eos_token_id=0, seed=1, head=head, labels=labels)
    save_model(model, tmp_path, eos_token_ids=[0], pad_token_id=0)
    for start in (Start(config, None, None), Start(ModelConfig.model_validate({"from": "x@1"}), tmp_path, "digest")):
        skeleton = start.skeleton(head, vocab_size=300, eos_token_id=0, labels=labels)
        assert all(weight.is_meta for weight in skeleton.parameters())
        muon = TRAINING.model_copy(update={"optim": OptimConfig()})
        facts, expected = (
            survey(one, 32, muon, memory_bytes=1, workers_on_machine=1) for one in (skeleton, model)
        )  # fmt: skip
        assert facts == expected
        assert 0 < facts.trained_by_muon < facts.trained == facts.parameters


def test_adapters_need_less() -> None:
    config = ModelConfig(hidden_size=32, layers=2, heads=2, context_length=32)
    skeleton = Start(config, None, None).skeleton("causal", vocab_size=300, eos_token_id=0)
    Adapters.attach(skeleton, LoraConfig(rank=2), head="causal", seed=1)
    facts = survey(skeleton, 32, TRAINING, memory_bytes=1, workers_on_machine=1)
    assert facts.trained == 2 * 2 * (4 * 2 * 32 + 3 * (32 + 96))
    assert "trained)" in plan(facts, TRAINING).describe()


def test_the_trial_runs_the_largest_of_the_first_micro_batches() -> None:
    made: list[nn.Module] = []

    def assemble() -> tuple[nn.Module, Lengths]:
        config = ModelConfig(hidden_size=32, layers=2, heads=2, context_length=64)
        made.append(build_model(config, vocab_size=64, eos_token_id=0, seed=1))
        return made[0], Lengths()

    threads = torch.get_num_threads()
    found = trial(assemble, TRAINING, CPU)
    assert found.row_positions == (64 + 3 * 32) / 4
    assert 0 < found.seconds_per_position < 0.1
    assert 0 < found.optimizer_seconds < 10
    inputs = 4 * 64 * 32 * 4  # of one linear layer
    assert 10 * inputs < found.activation_bytes < 200 * inputs
    assert torch.get_num_threads() == threads
