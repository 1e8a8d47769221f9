"""AdamW alone needs nothing of the other ranks: their gradients are summed before."""

from __future__ import annotations

import torch
from torch import nn

from configs.schema.model import ModelConfig
from configs.schema.training import OptimConfig
from pipelines.training.models import build_model
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import Ranks
from pipelines.training.sharding import held_weights


def stepped(ranks: Ranks) -> nn.Module:
    dials = ModelConfig(architecture="bert", hidden_size=32, layers=1, heads=2, context_length=16)
    model = build_model(dials, vocab_size=50, eos_token_id=0, seed=1, head="classify", labels=["a", "b"])
    config = OptimConfig(name="adamw", learning_rate=0.01)
    optimizer = Optimizer(model, held_weights(model), config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, ranks)
    return model


def test_one_of_two_ranks_takes_the_step_of_a_single_one() -> None:
    alone, one_of_two = stepped(Ranks()).state_dict(), stepped(Ranks(rank=1, world_size=2)).state_dict()
    assert all(torch.equal(alone[name], one_of_two[name]) for name in alone)
