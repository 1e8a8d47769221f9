"""What is minimised, as strategies: each gives the rows of a step and the loss of some rows.

Rows are a pure function of (data, seed, step); the rows of all ranks together do not depend on how many there are.
Losses are sums over target tokens, never means, so that a batch may be split over ranks and micro-batches in any way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.schema.training import TrainingConfig
from pipelines.corpus.loader import Loader
from pipelines.corpus.packing import PackedRows
from pipelines.training.cross_entropy import linear_cross_entropy
from pipelines.training.models import hidden_states
from pipelines.training.ordering import Epochs
from pipelines.training.pairs import PairRows
from pipelines.training.samples import PROMPT_TOKENS, PROMPTS

_BUCKET_TOKENS = 32
"""Padded rows are a multiple of this long, so that few different shapes occur."""


class Batch(Protocol):
    """Rows that a model is trained on; what is in them is between their objective and its model."""

    def __len__(self) -> int: ...

    @property
    def target_count(self) -> Tensor:
        """What is predicted in them, a scalar."""
        ...

    @property
    def positions(self) -> int:
        """Places that the model runs over, padding included."""
        ...

    def part(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`, without columns that are padding in all of them."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same rows on `device`."""
        ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Rows:
    """Token rows and which of their tokens are learned."""

    tokens: Tensor
    """[rows, length + 1], int64; position t predicts position t + 1."""
    targets: Tensor
    """[rows, length], bool: whether the prediction at t counts."""
    position_ids: Tensor | None = None
    """[rows, length], int64, of rows that hold several sequences: 0 where one begins. None is one a row."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def target_count(self) -> Tensor:
        """Tokens that are learned, a scalar."""
        return self.targets.sum()

    @property
    def positions(self) -> int:
        """Places that a model runs over, padding included."""
        return self.targets.numel()

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, without columns that are padding in all of them."""
        targets = self.targets[start:stop]
        used = int(targets.any(0).nonzero().max()) + 1 if bool(targets.any()) else 1
        length = min(-(-used // _BUCKET_TOKENS) * _BUCKET_TOKENS, targets.shape[1])
        position_ids = None if self.position_ids is None else self.position_ids[start:stop, :length]
        return Rows(self.tokens[start:stop, : length + 1], targets[:, :length], position_ids)

    def to(self, device: torch.device) -> Rows:
        """The same rows on `device`."""
        position_ids = None if self.position_ids is None else self.position_ids.to(device)
        return Rows(self.tokens.to(device), self.targets.to(device), position_ids)


class Objective(Protocol[B]):
    """What a training run minimises."""

    row_tokens: int
    """Longest row, in positions."""

    @property
    def tallies(self) -> int:
        """How many sums `measure` gives."""
        ...

    def batch(self, step: int, rank: int, world_size: int) -> B:
        """This rank's rows of the global batch of `step`."""
        ...

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """What the rows of `batch` are called in the data, in their order."""
        ...

    def validation(self) -> Mapping[str, B]:
        """The validation rows by source, the same at every call; one source needs no name."""
        ...

    def prompts(self) -> Sequence[Sequence[int]]:
        """Token ids that the model goes on with at each evaluation, for people to read; none if it writes no texts."""
        ...

    def loss(self, model: nn.Module, rows: B) -> Tensor:
        """Loss summed over the targets of `rows`, in nats."""
        ...

    def measure(self, model: nn.Module, rows: B) -> Tensor:
        """Sums that metrics are made of, [tallies]: loss and targets first. They add up over any split of rows."""
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics of the validation rows, from the sums over all of them; `validation_loss` in nats is one."""
        ...


class LanguageObjective:
    """What objectives that predict the next token share."""

    tallies: int = 2
    bytes_per_token: float
    """UTF-8 bytes of text per target token in the validation data."""
    z_loss: float = 0.0
    """See `linear_cross_entropy`; in training only."""

    def prompts(self) -> Sequence[Sequence[int]]:
        """See `Objective`; none unless a subclass has some."""
        return ()

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """See `Objective`."""
        return token_loss(model, rows, self.z_loss)

    def measure(self, model: nn.Module, rows: Rows) -> Tensor:
        """See `Objective`."""
        return torch.stack([token_loss(model, rows).double(), rows.target_count.double()])

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Nats per token, and bits per byte, which can be compared between tokenizers."""
        nats = sums[0] / sums[1]
        return {"validation_loss": nats, "bits_per_byte": nats / log(2) / self.bytes_per_token}


class CausalLanguageModel(LanguageObjective):
    """Next-token prediction over packed rows of one corpus or several.

    Every token is a target; `within_documents`, every token but the first of a document, which nothing before it says
    anything about, and no token attends to another document.
    """

    def __init__(
        self,
        train: Loader,
        validation: Mapping[str, Loader],
        *,
        row_tokens: int,
        validation_rows: int,
        within_documents: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        self.row_tokens = row_tokens
        self.z_loss = z_loss
        self._train = train
        self._validation = validation
        self._validation_rows = -(-validation_rows // len(validation))
        self._within_documents = within_documents
        targets = {name: int(rows.targets.sum()) for name, rows in self.validation().items()}
        text_bytes = sum(count * validation[name].bytes_per_token for name, count in targets.items())
        self.bytes_per_token = text_bytes / sum(targets.values())

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        """See `Objective`."""
        if self._within_documents:
            return _within_documents(self._train.packed(step, rank, world_size))
        return _all_targets(self._train.batch(step, rank, world_size))

    def validation(self) -> Mapping[str, Rows]:
        """Validation rows spread evenly over each source."""
        count = self._validation_rows
        if self._within_documents:
            return {name: _within_documents(loader.packed_rows(count)) for name, loader in self._validation.items()}
        return {name: _all_targets(loader.rows(count)) for name, loader in self._validation.items()}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""
        return name_samples(self._train, step, rank, world_size)

    def prompts(self) -> list[list[int]]:
        """The beginnings of validation rows."""
        first = next(iter(self._validation.values()))
        return first.rows(PROMPTS)[:, : min(PROMPT_TOKENS, self.row_tokens // 2)].tolist()


class SupervisedPairs(LanguageObjective):
    """Completions given prompts: a row is one rendered conversation, the completion's tokens are the targets."""

    def __init__(
        self,
        train: PairRows,
        validation: PairRows,
        *,
        batch_rows: int,
        seed: int,
        validation_rows: int,
        z_loss: float = 0.0,
    ) -> None:
        self.z_loss = z_loss
        self.row_tokens = max(train.longest, validation.longest) - 1
        self.bytes_per_token = validation.bytes_per_target
        self._train = train
        self._validation = validation
        self._epochs = Epochs(len(train), batch_rows=batch_rows, seed=seed)
        self._validation_rows = validation_rows

    def batch(self, step: int, rank: int, world_size: int) -> Rows:
        """See `Objective`."""
        return padded_rows(self._train, self._epochs.batch(step, rank, world_size, self._train.length))

    def validation(self) -> Mapping[str, Rows]:
        """The first held-out pairs."""
        return {"": padded_rows(self._validation, range(min(self._validation_rows, len(self._validation))))}

    def prompts(self) -> list[list[int]]:
        """The prompts of the first held-out pairs."""
        pairs = (self._validation[index] for index in range(min(PROMPTS, len(self._validation))))
        return [ids[:length].tolist() for ids, length in pairs]

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""
        return [f"pair {i}" for i in self._epochs.batch(step, rank, world_size, self._train.length)]


def check_no_z_loss(config: TrainingConfig, what: str) -> None:
    """Raises `ConfigError` if a z-loss is asked for where `what` is trained."""
    if config.z_loss:
        raise ConfigError(
            f"training.z_loss is for models that predict the next token, not for {what}",
            received=config.z_loss,
            allowed="0",
            next_step="leave training.z_loss out",
        )


def name_samples(loader: Loader, step: int, rank: int, world_size: int) -> list[str]:
    """What the rows of a batch are called: the row of a source's split, and how often that was gone through before."""
    ledger = loader.ledger(step, rank, world_size).tolist()
    return [f"source {source} row {row} (epoch {epoch})" for source, epoch, row in ledger]


def token_loss(model: nn.Module, rows: Rows, z_loss: float = 0.0) -> Tensor:
    """Negative log-likelihood of the targets of `rows` under `model`, summed, in nats; `z_loss` adds its term."""
    hidden = hidden_states(model, rows.tokens[:, :-1], rows.position_ids)
    wanted = rows.targets
    output = model.get_output_embeddings().weight
    return linear_cross_entropy(hidden[wanted], output, rows.tokens[:, 1:][wanted], z_loss)


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


def _within_documents(packed: PackedRows) -> Rows:
    position_ids = torch.from_numpy(packed.positions)[:, :-1]
    return Rows(torch.from_numpy(packed.tokens), torch.from_numpy(packed.targets), position_ids)
