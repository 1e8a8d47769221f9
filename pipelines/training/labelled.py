"""Objectives whose rows carry labels: token rows in, classes out, cross-entropy and accuracy over the labels.

A subclass says where rows come from and what the model predicts at each label; everything here is a sum over labels,
so a batch may be split over ranks and micro-batches in any way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Ints = npt.NDArray[np.int64]

IGNORED = -100
"""Label of a place that nothing is predicted at, as in `transformers`."""
_BUCKET_TOKENS = 8
"""Padded rows are a multiple of this long, so that few different shapes occur."""


@dataclass(frozen=True)
class LabelledRows:
    """Token rows, padded to the right, and their labels."""

    tokens: Tensor
    """[rows, length], int64."""
    visible: Tensor
    """[rows, length], bool: False where a row is padded."""
    labels: Tensor
    """[rows, labels], int64, `IGNORED` where nothing is predicted: of each token, of the row, or tokens themselves."""
    written: bool = False
    """Whether labels are tokens that a decoder writes."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def target_count(self) -> Tensor:
        """Labels that are predicted, a scalar."""
        return (self.labels != IGNORED).sum()

    @property
    def positions(self) -> int:
        """Places that a model runs over, padding included."""
        return self.tokens.numel() + (self.labels.numel() if self.written else 0)

    def part(self, start: int, stop: int) -> LabelledRows:
        """Rows `start` to `stop`, without columns that are padding in all of them."""
        visible, labels = self.visible[start:stop], self.labels[start:stop]
        length, width = _used(visible), _used(labels != IGNORED)
        return LabelledRows(self.tokens[start:stop, :length], visible[:, :length], labels[:, :width], self.written)

    def to(self, device: torch.device) -> LabelledRows:
        """The same rows on `device`."""
        return LabelledRows(self.tokens.to(device), self.visible.to(device), self.labels.to(device), self.written)


class LabelledObjective(ABC):
    """An objective over labelled rows; see `pipelines.training.objectives.Objective`."""

    row_tokens: int
    tallies: int = 3
    """Loss, labels, labels predicted right; a subclass may add its own."""

    @abstractmethod
    def batch(self, step: int, rank: int, world_size: int) -> LabelledRows:
        """See `Objective`."""

    @abstractmethod
    def validation(self) -> Mapping[str, LabelledRows]:
        """See `Objective`."""

    @abstractmethod
    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""

    def prompts(self) -> Sequence[Sequence[int]]:
        """See `Objective`; none unless a subclass has some."""
        return ()

    @abstractmethod
    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """Logits [labels, classes] and classes [labels] of the labels of `rows` that are predicted, in their order."""

    def loss(self, model: nn.Module, rows: LabelledRows) -> Tensor:
        """See `Objective`."""
        logits, labels = self.predict(model, rows)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def measure(self, model: nn.Module, rows: LabelledRows) -> Tensor:
        """See `Objective`."""
        logits, labels = self.predict(model, rows)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        predicted = logits.argmax(1)
        counts = torch.stack([rows.target_count, (predicted == labels).sum()])
        sums = torch.cat([loss[None].double(), counts.double()])
        return torch.cat([sums, self.tally(rows, predicted).to(sums)])

    def tally(self, rows: LabelledRows, predicted: Tensor) -> Tensor:
        """Further sums that metrics need, from the `predicted` class of each label."""
        return torch.zeros(0)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """See `Objective`."""
        loss, count, right = sums[:3]
        return {"validation_loss": loss / count, "validation_accuracy": right / count}


def predict_targets(model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
    """Logits of an encoder-decoder at each target token, given the source and the targets before it; and the targets.

    See `LabelledObjective.predict`.
    """
    wanted = rows.labels != IGNORED
    logits = model(
        input_ids=rows.tokens,
        attention_mask=rows.visible.long(),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(rows.labels),
        use_cache=False,
    ).logits
    return logits[wanted], rows.labels[wanted]


def pad_rows(tokens: Sequence[Ints], labels: Sequence[Ints], *, pad: int, written: bool = False) -> LabelledRows:
    """Rows and their labels, filled up to the longest, rounded up to a bucket."""
    visible = _filled([np.ones_like(row) for row in tokens], 0).bool()
    return LabelledRows(_filled(tokens, pad), visible, _filled(labels, IGNORED), written)


def _filled(rows: Sequence[Ints], value: int) -> Tensor:
    """[rows, longest]; a single column stays one."""
    longest = max(map(len, rows))
    width = longest if longest == 1 else -(-longest // _BUCKET_TOKENS) * _BUCKET_TOKENS
    filled = np.full((len(rows), width), value, dtype=np.int64)
    for number, row in enumerate(rows):
        filled[number, : len(row)] = row
    return torch.from_numpy(filled)


def _used(marked: Tensor) -> int:
    """Columns up to the last that is marked in any row, rounded up to a bucket; at least one."""
    last = int(marked.any(0).nonzero().max()) + 1 if bool(marked.any()) else 1
    return min(-(-last // _BUCKET_TOKENS) * _BUCKET_TOKENS, marked.shape[1])
