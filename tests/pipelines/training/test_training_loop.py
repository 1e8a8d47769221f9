"""One process trains; what must hold however the work is split, stopped or damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from configs.errors import ConfigError, CorruptArtifactError, StageError
from configs.schema.model import ModelConfig
from configs.schema.training import OptimConfig, TrainingConfig
from pipelines.training.checkpoint import Checkpoint, Checkpoints
from pipelines.training.hardware import Hardware
from pipelines.training.loop import Hooks, Outcome, Trainer
from pipelines.training.models import build_model, recompute_activations
from pipelines.training.objectives import LanguageObjective, Rows
from pipelines.training.parallel import Ranks

CPU = Hardware(torch.device("cpu"), "fp32", compile=False)
MODEL = ModelConfig(hidden_size=32, layers=2, heads=2, context_length=32)
TRAINING = TrainingConfig(
    steps=12, batch_rows=4, micro_batch_rows=2, eval_every_steps=6, log_every_steps=1, workers=1,
    checkpoint_every_seconds=1e9,
)  # fmt: skip


class Noise(LanguageObjective):
    """Rows of seeded noise; some targets are left out."""

    row_tokens = 16
    bytes_per_token = 2.0

    def __init__(self, batch_rows: int = 4) -> None:
        self._rows = batch_rows

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        rows = self._make(step, self._rows)
        share = self._rows // world_size
        return Rows(rows.tokens[rank * share :][:share], rows.targets[rank * share :][:share])

    def validation(self) -> Mapping[str, Rows]:
        return {"": self._make(1_000_000, 5)}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        share = self._rows // world_size
        return [f"noise {step}/{rank * share + i}" for i in range(share)]

    def _make(self, seed: int, count: int) -> Rows:
        random = np.random.default_rng(seed)
        tokens = torch.from_numpy(random.integers(0, 8, (count, self.row_tokens + 1)))
        return Rows(tokens, torch.from_numpy(random.random((count, self.row_tokens)) < 0.7))


def trainer(
    folder: Path,
    *,
    config: TrainingConfig = TRAINING,
    objective: Any = None,
    lines: list[Mapping[str, float]] | None = None,
    notices: list[str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> tuple[nn.Module, Trainer]:
    model = build_model(MODEL, vocab_size=64, eos_token_id=0, seed=3)
    hooks = Hooks(
        report=(lines if lines is not None else []).append,
        resumed=lambda step: None,
        arrived=lambda step: None,
        notice=(notices if notices is not None else []).append,
        should_stop=should_stop,
    )
    made = Trainer(
        model, objective or Noise(), config, hardware=CPU, ranks=ranks, checkpoints=Checkpoints(folder), hooks=hooks
    )
    return model, made


def stopping_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 1_000_000))
    return lambda: next(asked) == steps


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "ema_decay"), [("adamw", None), ("muon", None), ("muon", 0.9)])
def test_a_run_that_stopped_and_resumed_has_the_same_bits(tmp_path: Path, name: Any, ema_decay: float | None) -> None:
    config = TRAINING.model_copy(update={"optim": OptimConfig(name=name), "ema_decay": ema_decay})
    lines: list[Mapping[str, float]] = []
    whole, run = trainer(tmp_path / "whole", config=config, lines=lines)
    assert run.run() == Outcome(12, int(lines[-1]["tokens_seen"]), finished=True)
    _, first = trainer(tmp_path / "parts", config=config, should_stop=stopping_after(5))
    assert first.run().step == 5
    resumed_lines: list[Mapping[str, float]] = []
    resumed, second = trainer(tmp_path / "parts", config=config, lines=resumed_lines)
    assert second.run().finished
    assert equal(whole, resumed)
    ends = (Checkpoints(tmp_path / folder).load(12).tensors for folder in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))
    deterministic = ("step", "loss", "tokens_seen", "grad_norm", "lr")
    assert [[line[k] for k in deterministic] for line in resumed_lines] == [
        [line[k] for k in deterministic] for line in lines[5:]
    ]


def test_training_lowers_loss_and_bits_per_byte(tmp_path: Path) -> None:
    lines: list[Mapping[str, float]] = []
    config = TRAINING.model_copy(update={"steps": 40, "eval_every_steps": 20})
    _, run = trainer(tmp_path, config=config, lines=lines)
    run.run()
    scored = [line for line in lines if "bits_per_byte" in line]
    assert [line["step"] for line in scored] == [20, 40]
    assert scored[-1]["validation_loss"] < 2.4 < lines[0]["loss"]
    assert scored[-1]["bits_per_byte"] == pytest.approx(scored[-1]["validation_loss"] / np.log(2) / 2.0)


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)])
def test_any_split_of_a_batch_gives_the_same_gradient(tmp_path: Path, world_size: int, micro_batch_rows: int) -> None:
    def gradient(ranks: int, micro: int) -> torch.Tensor:
        total = torch.zeros(0)
        for rank in range(ranks):
            config = TRAINING.model_copy(update={"micro_batch_rows": micro})
            _, part = trainer(tmp_path, config=config, ranks=Ranks(rank, ranks))
            part.accumulate(Noise().batch(7, rank, ranks))
            total = torch.cat([part.buffer.extra[:1], part.buffer.gradients]) + (total if rank else 0)
        return total[1:] / total[0]

    torch.testing.assert_close(gradient(world_size, micro_batch_rows), gradient(1, 4), rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_no_number_names_step_and_rows(tmp_path: Path) -> None:
    class Poisoned(Noise):
        def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
            bad = bool((rows.tokens[0] == self.batch(3, 0, 1).tokens[2][: rows.tokens.shape[1]]).all())
            return super().loss(model, rows) * (float("nan") if bad else 1.0)

    model, run = trainer(tmp_path, objective=Poisoned())
    with pytest.raises(StageError, match=r"step 4: the loss is no.*rows \[2, 3\] of the batch: noise 3/2, noise 3/3"):
        run.run()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class Shouting(Noise):
    """From step `at` on the loss of row 1 is that of a model gone wrong."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at
        self._step = 0

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        self._step = step
        return super().batch(step, rank, world_size)

    def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
        louder = self._step >= self._at and torch.equal(rows.tokens[0], self._make(self._step, 4).tokens[1])
        return super().loss(model, rows) * (40.0 if louder else 1.0)


def test_a_loss_that_leaps_up_stops_before_the_weights_take_it_and_names_the_sample(tmp_path: Path) -> None:
    config = TRAINING.model_copy(update={"steps": 40, "micro_batch_rows": 1, "eval_every_steps": 40})
    _, before = trainer(tmp_path / "run", config=config, should_stop=stopping_after(34))
    assert before.run().step == 34
    model, run = trainer(tmp_path / "run", config=config, objective=Shouting(at=34))
    with pytest.raises(
        StageError, match=r"step 35: the loss leapt to .*rows \[1\] of the batch: noise 34/1;"
    ) as caught:
        run.run()
    assert "the last checkpoint stands" in str(caught.value)
    kept = Checkpoints(tmp_path / "run").load(34)
    assert all(torch.equal(p, kept.tensors[f"model/{name}"]) for name, p in model.named_parameters())
    unguarded = config.model_copy(update={"spike_nats": None})
    _, run = trainer(tmp_path / "run", config=unguarded, objective=Shouting(at=34))
    assert run.run().finished


def test_a_stopped_and_resumed_run_drops_out_the_same(tmp_path: Path) -> None:
    def run(folder: str, dropout: float, **more: Any) -> Any:
        model, made = trainer(tmp_path / folder, **more)
        for layer in model.get_decoder().layers:
            layer.self_attn.attention_dropout = dropout
        made.run()
        return model

    whole = run("whole", 0.3)
    run("parts", 0.3, should_stop=stopping_after(5))
    assert equal(whole, run("parts", 0.3))
    assert not equal(whole, run("plain", 0.0))


def test_the_average_follows_the_weights_and_is_what_is_evaluated(tmp_path: Path) -> None:
    def run(name: str, steps: int, **settings: Any) -> tuple[dict[str, torch.Tensor], float]:
        lines: list[Mapping[str, float]] = []
        config = TRAINING.model_copy(update={"steps": steps, "eval_every_steps": steps, **settings})
        _, made = trainer(tmp_path / name, config=config, lines=lines)
        made.run()
        return Checkpoints(tmp_path / name).load(steps).tensors, lines[-1]["validation_loss"]

    constant = OptimConfig(name="adamw", schedule="linear", warmup_fraction=0.0, final_fraction=1.0)
    expected = dict(build_model(MODEL, vocab_size=64, eos_token_id=0, seed=3).named_parameters())
    for steps in (1, 2, 3):
        tensors, loss = run(f"plain-{steps}", steps, optim=constant)
        decay = min(0.5, (1 + steps) / (10 + steps))
        expected = {name: decay * e.detach() + (1 - decay) * tensors[f"model/{name}"] for name, e in expected.items()}
    averaged, averaged_loss = run("averaged", 3, optim=constant, ema_decay=0.5)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[f"average/{name}"], value)
        assert torch.equal(averaged[f"model/{name}"], tensors[f"model/{name}"])
    assert averaged_loss != loss


def test_layers_that_run_again_in_the_backward_pass_train_the_same_bits(tmp_path: Path) -> None:
    def run(folder: str, *, again: bool) -> nn.Module:
        config = TRAINING.model_copy(update={"activation_checkpointing": again})
        model, made = trainer(tmp_path / folder, config=config)
        for layer in model.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.3
        made.run()
        assert all(getattr(layer, "gradient_checkpointing", again) == again for layer in model.get_decoder().layers)
        return model

    assert equal(run("kept", again=False), run("again", again=True))


def test_an_architecture_that_cannot_run_its_layers_again_is_refused() -> None:
    lstm = build_model(
        ModelConfig(architecture="lstm", hidden_size=16, layers=1), vocab_size=64, eos_token_id=0, seed=1
    )
    with pytest.raises(ConfigError, match=r"activation_checkpointing: a ganymede_lstm model.*allowed: false"):
        recompute_activations(lstm)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    _, run = trainer(tmp_path / "whole")
    run.run()
    for steps in (3, 2):
        _, part = trainer(tmp_path / "parts", should_stop=stopping_after(steps))
        part.run()
    checkpoints = Checkpoints(tmp_path / "parts")
    assert checkpoints.steps() == [5, 3]
    tensors = tmp_path / "parts" / "step-00000005" / "shard-00000-of-00001.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="step-00000005"):
        checkpoints.load(5)
    notices: list[str] = []
    resumed, last = trainer(tmp_path / "parts", notices=notices)
    assert last.run().finished
    assert len(notices) == 1
    assert "step-00000005" in notices[0]
    whole = Checkpoints(tmp_path / "whole").load(12)
    assert all(torch.equal(p, whole.tensors[f"model/{name}"]) for name, p in resumed.named_parameters())


def test_a_half_written_checkpoint_is_never_seen_and_two_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.77").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(Checkpoint(step, step * 10, {"a": torch.full((2,), float(step))}))
    assert checkpoints.steps() == [3, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert checkpoints.newest(lambda error: None) == 3
    found = checkpoints.load(3)
    assert (found.step, found.tokens_seen, found.tensors["a"].tolist()) == (3, 30, [3.0, 3.0])


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"state": {"step": 3}, "blake3": "00"}'])
def test_a_damaged_state_file_is_found(tmp_path: Path, damage: bytes) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Checkpoint(3, 30, {"a": torch.zeros(2)}))
    (tmp_path / "step-00000003" / "state.json").write_bytes(damage)
    with pytest.raises(CorruptArtifactError, match="step-00000003"):
        checkpoints.load(3)
