"""Two processes that share a model out between them, against processes that hold all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks_world import Run, figures
from safetensors.torch import load_file

from configs.errors import CorruptArtifactError
from configs.schema.training import OptimConfig, TrainingConfig
from pipelines.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow  # each case starts processes that import torch: 15 to 60 s

CONFIG = TrainingConfig(
    steps=6, batch_rows=4, micro_batch_rows=1, eval_every_steps=3, log_every_steps=1, checkpoint_every_seconds=1e9,
    optim=OptimConfig(learning_rate=3e-3, clip_norm=0.5), ema_decay=0.9,
)  # fmt: skip
ADAMW = {"optim": OptimConfig(name="adamw", clip_norm=0.5), "activation_checkpointing": True}


@pytest.mark.parametrize(
    ("architecture", "settings", "lora"),
    [
        ("llama", {}, False),
        ("bert", ADAMW, False),
        ("t5", {"activation_checkpointing": True}, False),
        ("lstm", {}, False),
        ("llama", {"optim": OptimConfig(name="adamw", learning_rate=1e-2)}, True),
    ],
)
def test_ranks_that_share_a_model_train_the_one_that_a_single_process_does(
    tmp_path: Path, architecture: Any, settings: dict[str, Any], lora: bool
) -> None:
    config = CONFIG.model_copy(update=settings)
    alone, whole, sharded = tmp_path / "alone", tmp_path / "whole", tmp_path / "sharded"
    model = Run(config, architecture, lora).alone(alone)
    assert Run(config, architecture, lora).on_two(whole) == [0, 0]
    assert Run(config.model_copy(update={"sharding": "full"}), architecture, lora).on_two(sharded) == [0, 0]
    expected = Checkpoints(alone).load(6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model/") for name in expected.tensors if name.startswith("model/")} == trained
    for folder in (whole, sharded):
        for name in ("loss", "grad_norm", "validation_loss"):
            np.testing.assert_allclose(figures(folder, name), figures(alone, name), rtol=1e-5)
        found = Checkpoints(folder).load(6)
        assert found.tokens_seen == expected.tokens_seen
        assert found.tensors.keys() == expected.tensors.keys()
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-5, atol=1e-5)
    (all_of_it,) = held_bytes(whole)
    parts = held_bytes(sharded)
    assert len(parts) == 2
    assert all(0.4 * all_of_it < part < 0.6 * all_of_it for part in parts)


def held_bytes(folder: Path) -> list[int]:
    """What each rank that writes holds of weights, their average and the optimizer's numbers after six steps."""
    shards = sorted((folder / "step-00000006").glob("shard-*"))
    return [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]


WHOLE = CONFIG.model_copy(update={"steps": 9})
SHARDED = WHOLE.model_copy(update={"sharding": "full"})


@pytest.mark.parametrize(("config", "lora"), [(SHARDED, False), (SHARDED, True), (WHOLE, True)])
def test_a_run_goes_on_bit_by_bit_after_a_kill(tmp_path: Path, config: TrainingConfig, lora: bool) -> None:
    assert Run(config, lora=lora).on_two(tmp_path / "whole") == [0, 0]
    often = config.model_copy(update={"checkpoint_every_seconds": 1e-9})
    killed = Run(often, lora=lora, killed_in=(5, 1)).on_two(tmp_path / "killed")
    assert killed[1] == -9
    assert Checkpoints(tmp_path / "killed").steps()[0] in (4, 5)
    assert Run(config, lora=lora).on_two(tmp_path / "killed") == [0, 0]
    assert figures(tmp_path / "killed", "step") == figures(tmp_path / "whole", "step")
    one, other = (Checkpoints(tmp_path / folder).load(9).tensors for folder in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_goes_on_with_another_number_of_ranks_sharded_or_not(tmp_path: Path) -> None:
    plain = CONFIG.model_copy(update={"steps": 9})
    Run(plain).alone(tmp_path / "alone")
    assert Run(SHARDED, stop_after=2).on_two(tmp_path / "moved") == [0, 0]
    Run(plain, stop_after=2).alone(tmp_path / "moved")
    assert Run(SHARDED, stop_after=2).on_two(tmp_path / "moved") == [0, 0]
    assert Run(plain, stop_after=2).on_two(tmp_path / "moved") == [0, 0]
    assert Run(SHARDED).on_two(tmp_path / "moved") == [0, 0]
    for name in ("step", "loss", "tokens_seen", "grad_norm", "validation_loss"):
        np.testing.assert_allclose(figures(tmp_path / "moved", name), figures(tmp_path / "alone", name), rtol=1e-4)


def test_a_damaged_shard_is_found_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    for steps in (3, 2):
        assert Run(SHARDED, stop_after=steps).on_two(tmp_path) == [0, 0]
    checkpoints = Checkpoints(tmp_path)
    shard = tmp_path / "step-00000005" / "shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptArtifactError, match="step-00000005 is damaged"):
        checkpoints.load(5)
    told: list[CorruptArtifactError] = []
    assert checkpoints.newest(told.append) == 3
    assert len(told) == 1
    assert checkpoints.steps() == [3]
