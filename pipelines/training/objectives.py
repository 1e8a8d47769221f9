"""What is minimised, as strategies: each gives the rows of a step and the loss of some rows.

Rows are a pure function of (data, seed, step); the rows of all ranks together do not depend on how many there are.
Losses are sums over target tokens, never means, so that a batch may be split over ranks and micro-batches in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from pipelines.corpus.loader import Loader
from pipelines.training.cross_entropy import linear_cross_entropy
from pipelines.training.models import hidden_states
from pipelines.training.pairs import PairRows

_BUCKET_TOKENS = 32
"""Padded rows are a multiple of this long, so that few different shapes occur."""


@dataclass(frozen=True)
class Rows:
    """Token rows and which of their tokens are learned."""

    tokens: Tensor
    """[rows, length + 1], int64; position t predicts position t + 1."""
    targets: Tensor
    """[rows, length], bool: whether the prediction at t counts."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, without columns that are padding in all of them."""
        targets = self.targets[start:stop]
        used = int(targets.any(0).nonzero().max()) + 1 if bool(targets.any()) else 1
        length = min(-(-used // _BUCKET_TOKENS) * _BUCKET_TOKENS, targets.shape[1])
        return Rows(self.tokens[start:stop, : length + 1], targets[:, :length])

    def to(self, device: torch.device) -> Rows:
        """The same rows on `device`."""
        return Rows(self.tokens.to(device), self.targets.to(device))


class Objective(Protocol):
    """What a training run minimises."""

    row_tokens: int
    """Longest row, in predicted positions."""
    bytes_per_token: float
    """UTF-8 bytes of text per target token in the validation data."""

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        """This rank's rows of the global batch of `step`."""
        ...

    def validation(self) -> Rows:
        """The validation rows, the same at every call."""
        ...

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """Loss summed over the targets of `rows`, in nats."""
        ...


class CausalLanguageModel:
    """Next-token prediction over packed rows of a corpus; every token is a target."""

    def __init__(self, train: Loader, validation: Loader, *, row_tokens: int, validation_rows: int) -> None:
        self.row_tokens = row_tokens
        self.bytes_per_token = validation.bytes_per_token
        self._train = train
        self._validation = validation
        self._validation_rows = validation_rows

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        """See `Objective`."""
        return _all_targets(self._train.batch(step, rank, world_size))

    def validation(self) -> Rows:
        """The first validation rows in document order."""
        return _all_targets(self._validation.rows(self._validation_rows))

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """See `Objective`."""
        return token_loss(model, rows)


class SupervisedPairs:
    """Completions given prompts: a row is one rendered conversation, the completion's tokens are the targets."""

    def __init__(
        self, train: PairRows, validation: PairRows, *, batch_rows: int, seed: int, validation_rows: int
    ) -> None:
        self.row_tokens = max(train.longest, validation.longest) - 1
        self.bytes_per_token = validation.bytes_per_target
        self._train = train
        self._validation = validation
        self._batch_rows = batch_rows
        self._seed = seed
        self._validation_rows = validation_rows

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        """See `Objective`. Every epoch is a new permutation; rows are dealt to ranks by length, to even out work."""
        if self._batch_rows % world_size:
            raise ConfigError(
                "batch_rows cannot be divided among the workers",
                received=self._batch_rows,
                allowed=f"a multiple of {world_size}",
            )
        places = range(step * self._batch_rows, (step + 1) * self._batch_rows)
        count = len(self._train)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        chosen = [int(orders[place // count][place % count]) for place in places]
        chosen.sort(key=self._train.length)
        return padded_rows(self._train, chosen[rank::world_size])

    def validation(self) -> Rows:
        """The first held-out pairs."""
        return padded_rows(self._validation, range(min(self._validation_rows, len(self._validation))))

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """See `Objective`."""
        return token_loss(model, rows)

    def _order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._train))


def token_loss(model: nn.Module, rows: Rows) -> Tensor:
    """Negative log-likelihood of the targets of `rows` under `model`, summed, in nats."""
    hidden = hidden_states(model, rows.tokens[:, :-1])
    wanted = rows.targets
    return linear_cross_entropy(hidden[wanted], model.get_output_embeddings().weight, rows.tokens[:, 1:][wanted])


def padded_rows(pairs: PairRows, chosen: range | list[int]) -> Rows:
    """The `chosen` pairs as one batch, padded to the longest of them, rounded up to a bucket."""
    longest = max(pairs.length(i) for i in chosen) - 1
    length = -(-longest // _BUCKET_TOKENS) * _BUCKET_TOKENS
    tokens = torch.zeros((len(chosen), length + 1), dtype=torch.int64)
    targets = torch.zeros((len(chosen), length), dtype=torch.bool)
    for row, index in enumerate(chosen):
        ids, prompt_length = pairs[index]
        tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        targets[row, prompt_length - 1 : len(ids) - 1] = True
    return Rows(tokens, targets)


def _all_targets(tokens: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Rows:
    held = torch.from_numpy(tokens)
    return Rows(held, torch.ones((held.shape[0], held.shape[1] - 1), dtype=torch.bool))
