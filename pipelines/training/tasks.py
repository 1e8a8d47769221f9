"""Objectives over labelled examples: classes of texts, tags of words, and texts from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipelines.training.examples import ExampleRows
from pipelines.training.labelled import IGNORED, LabelledObjective, LabelledRows, pad_rows, predict_targets
from pipelines.training.ordering import Epochs
from pipelines.training.samples import PROMPTS

_GROUP = 16
"""Batches that are drawn together and cut by length."""


class ExampleObjective(LabelledObjective):
    """Examples of a dataset: each comes once an epoch, and batches of like lengths are padded little."""

    written: ClassVar[bool] = False
    """Whether the labels of an example are a text that a decoder writes."""

    def __init__(
        self, train: ExampleRows, validation: ExampleRows, *, labels: Sequence[str], batch_rows: int, seed: int,
        validation_rows: int, pad: int,
    ) -> None:  # fmt: skip
        self.row_tokens = max(train.longest, validation.longest)
        self.labels = tuple(labels)
        self._train = train
        self._validation = validation
        self._epochs = Epochs(len(train), batch_rows=batch_rows, seed=seed, group=_GROUP)
        self._validation_rows = validation_rows
        self._pad = pad

    def batch(self, step: int, rank: int, world_size: int) -> LabelledRows:
        """See `Objective`."""
        return self._collate(self._train, self._epochs.batch(step, rank, world_size, self._train.length))

    def validation(self) -> Mapping[str, LabelledRows]:
        """The first held-out examples."""
        count = min(self._validation_rows, len(self._validation))
        return {"": self._collate(self._validation, range(count))}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""
        chosen = self._epochs.batch(step, rank, world_size, self._train.length)
        return [f"train.jsonl line {self._train.line(index)}" for index in chosen]

    def _collate(self, rows: ExampleRows, chosen: Sequence[int]) -> LabelledRows:
        pairs = [rows[index] for index in chosen]
        tokens, labels = ([pair[side] for pair in pairs] for side in (0, 1))
        return pad_rows(tokens, labels, pad=self._pad, written=self.written)


class Classification(ExampleObjective):
    """One class for each text."""

    @property
    def tallies(self) -> int:  # type: ignore[override]
        """Three, and how often each class was taken for each."""
        return 3 + len(self.labels) ** 2

    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """See `LabelledObjective`."""
        logits = model(input_ids=rows.tokens, attention_mask=rows.visible.long()).logits
        return logits, rows.labels[:, 0]

    def tally(self, rows: LabelledRows, predicted: Tensor) -> Tensor:
        """Rows by (true class, predicted class)."""
        size = len(self.labels)
        return torch.bincount(rows.labels[:, 0] * size + predicted, minlength=size * size)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Accuracy, and F1 averaged over the classes that occur or were predicted."""
        size = len(self.labels)
        confusion = torch.tensor(sums[3:]).view(size, size)
        there = confusion.sum(0) + confusion.sum(1)
        f1 = 2 * confusion.diagonal() / there.clamp(min=1)
        return {**super().figures(sums), "validation_macro_f1": float(f1[there > 0].mean())}


class Tagging(ExampleObjective):
    """One tag for each word, predicted at its first token; scored by whole spans as `seqeval` does."""

    tallies = 6

    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """See `LabelledObjective`."""
        logits = model(input_ids=rows.tokens, attention_mask=rows.visible.long()).logits
        wanted = rows.labels != IGNORED
        return logits[:, : wanted.shape[1]][wanted], rows.labels[wanted]

    def tally(self, rows: LabelledRows, predicted: Tensor) -> Tensor:
        """Spans that were found with their type, that were predicted, and that there are."""
        wanted = rows.labels != IGNORED
        lengths = wanted.sum(1).tolist()
        true, found = (self._spans(ids, lengths) for ids in (rows.labels[wanted], predicted))
        return torch.tensor([len(true & found), len(found), len(true)])

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Accuracy over words; precision, recall and F1 over spans of all types together."""
        right, found, true = sums[3:]
        return {
            **super().figures(sums),
            "validation_span_precision": right / max(found, 1.0),
            "validation_span_recall": right / max(true, 1.0),
            "validation_span_f1": 2 * right / max(found + true, 1.0),
        }

    def _spans(self, ids: Tensor, lengths: Sequence[int]) -> set[tuple[int, str, int, int]]:
        # Here and not above: it takes 3 s to import, which every worker of every other objective would spend.
        from seqeval.metrics.sequence_labeling import get_entities

        rows = ids.split(list(lengths))
        tags = ([self.labels[i] for i in row.tolist()] for row in rows)
        return {(number, *span) for number, row in enumerate(tags) for span in get_entities(row)}


class Sequences(ExampleObjective):
    """A text from a text: translation, summaries."""

    written = True

    def prompts(self) -> list[list[int]]:
        """The sources of the first held-out examples."""
        return [self._validation[index][0].tolist() for index in range(min(PROMPTS, len(self._validation)))]

    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """See `LabelledObjective`."""
        return predict_targets(model, rows)
