"""Masked language modelling: some tokens of a row are hidden, and the encoder says what they were.

Devlin et al. 2019, "BERT": 15 % of the tokens are chosen; of these 80 % become the mask token, 10 % a random token and
10 % stay. What is chosen in a row of a batch depends on (seed, step, row) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.corpus.loader import Loader
from pipelines.training.labelled import IGNORED, Ints, LabelledObjective, LabelledRows
from pipelines.training.objectives import name_samples

_CHOSEN = 0.15
_MASKED, _REPLACED = 0.8, 0.1


class MaskedLanguageModel(LabelledObjective):
    """Hidden tokens over packed rows of a corpus; ends of text stay visible."""

    def __init__(
        self, train: Loader, validation: Mapping[str, Loader], *, row_tokens: int, validation_rows: int, seed: int,
        mask_id: int, end_of_text_id: int,
    ) -> None:  # fmt: skip
        self.row_tokens = row_tokens
        self._train = train
        self._validation = validation
        self._validation_rows = -(-validation_rows // len(validation))
        self._seed = seed
        self._mask_id = mask_id
        self._end_of_text_id = end_of_text_id

    def batch(self, step: int, rank: int, world_size: int) -> LabelledRows:
        """See `Objective`."""
        tokens = self._train.batch(step, rank, world_size)[:, :-1]
        return self._hide(tokens, step + 1, first=rank * len(tokens))

    def validation(self) -> Mapping[str, LabelledRows]:
        """Rows spread over the validation split of each source, the same tokens hidden in them at every call."""
        count = self._validation_rows
        return {name: self._hide(rows.rows(count)[:, :-1], 0, first=0) for name, rows in self._validation.items()}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""
        return name_samples(self._train, step, rank, world_size)

    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """See `LabelledObjective`; the output matrix sees the hidden places only."""
        wanted = rows.labels != IGNORED
        hidden = model.base_model(input_ids=rows.tokens).last_hidden_state
        return _head(model)(hidden[:, : wanted.shape[1]][wanted]), rows.labels[wanted]

    def _hide(self, tokens: Ints, draw: int, *, first: int) -> LabelledRows:
        shown: Ints = tokens.copy()
        labels: Ints = np.full(tokens.shape, IGNORED, dtype=np.int64)
        for row in range(len(tokens)):
            random = np.random.default_rng([self._seed, draw, first + row])
            chosen = (random.random(tokens.shape[1]) < _CHOSEN) & (tokens[row] != self._end_of_text_id)
            fate = random.random(tokens.shape[1])
            others = random.integers(0, self._train.vocab_size, size=(tokens.shape[1],))
            labels[row, chosen] = tokens[row, chosen]
            shown[row, chosen & (fate < _MASKED)] = self._mask_id
            replaced = chosen & (fate >= _MASKED) & (fate < _MASKED + _REPLACED)
            shown[row, replaced] = others[replaced]
        visible = torch.ones(tokens.shape, dtype=torch.bool)
        return LabelledRows(torch.from_numpy(shown), visible, torch.from_numpy(labels))


def _head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What makes logits of hidden states: the part of a masked language model after its encoder."""
    for name in ("cls", "lm_head"):
        if hasattr(model, name):
            return getattr(model, name)
    return lambda hidden: model.decoder(model.head(hidden))
