"""Denoising for encoder-decoders: spans of a row are replaced by masks, and the decoder restores them.

`spans` is T5's span corruption (Raffel et al. 2020): 15 % of the tokens in spans of 3 on average, each replaced by a
mask of its own, and the decoder writes each mask with the tokens behind it. `whole` is BART's text infilling (Lewis et
al. 2020): 30 % of the tokens, each span replaced by the one mask, and the decoder writes the whole row; where BART
draws lengths from a Poisson distribution, spans here are cut as T5 cuts them. What is hidden in a row of a batch
depends on (seed, step, row) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor, nn

from configs.errors import ContractError
from pipelines.corpus.loader import Loader
from pipelines.training.labelled import Ints, LabelledObjective, LabelledRows, pad_rows, predict_targets
from pipelines.training.objectives import name_samples

Style = Literal["spans", "whole"]

_DENSITY: dict[Style, float] = {"spans": 0.15, "whole": 0.3}
_MEAN_SPAN = 3.0


class Denoising(LabelledObjective):
    """Restoring what was hidden in packed rows of a corpus."""

    def __init__(
        self, train: Loader, validation: Mapping[str, Loader], *, style: Style, row_tokens: int, validation_rows: int,
        seed: int, mask_ids: Sequence[int], end_of_text_id: int,
    ) -> None:  # fmt: skip
        self.row_tokens = row_tokens
        self._train = train
        self._validation = validation
        self._style: Style = style
        self._validation_rows = -(-validation_rows // len(validation))
        self._seed = seed
        self._mask_ids = mask_ids
        self._end = end_of_text_id
        needed = _span_count(row_tokens - 1, _DENSITY[style])[1] if style == "spans" else 1
        if len(mask_ids) < needed:
            raise ContractError(
                f"rows of {row_tokens} tokens have {needed} hidden spans, and each needs a mask token of its own",
                received=f"{len(mask_ids)} mask tokens in the tokenizer",
                allowed=f"at least {needed}",
                next_step="raise masks of the recipe's tokenizer stage, or shorten context_length",
            )

    def batch(self, step: int, rank: int, world_size: int) -> LabelledRows:
        """See `Objective`."""
        tokens = self._train.batch(step, rank, world_size)
        return self._hide(tokens, step + 1, first=rank * len(tokens))

    def validation(self) -> Mapping[str, LabelledRows]:
        """Rows spread over the validation split of each source, the same tokens hidden in them at every call."""
        count = self._validation_rows
        return {name: self._hide(rows.rows(count), 0, first=0) for name, rows in self._validation.items()}

    def samples(self, step: int, rank: int, world_size: int) -> list[str]:
        """See `Objective`."""
        return name_samples(self._train, step, rank, world_size)

    def predict(self, model: nn.Module, rows: LabelledRows) -> tuple[Tensor, Tensor]:
        """See `LabelledObjective`."""
        return predict_targets(model, rows)

    def _hide(self, tokens: Ints, draw: int, *, first: int) -> LabelledRows:
        """One place of either side is kept for the end of the text."""
        hidden = [
            corrupt(
                row[: self.row_tokens - 1],
                np.random.default_rng([self._seed, draw, first + number]),
                style=self._style,
                mask_ids=self._mask_ids,
                end=self._end,
            )
            for number, row in enumerate(tokens)
        ]
        shown, labels = ([pair[side] for pair in hidden] for side in (0, 1))
        return pad_rows(shown, labels, pad=self._end, written=True)


def corrupt(
    tokens: Ints, random: np.random.Generator, *, style: Style, mask_ids: Sequence[int], end: int
) -> tuple[Ints, Ints]:
    """What the encoder is shown of `tokens`, and what the decoder has to write; both closed by `end`."""
    shown: list[Ints] = []
    targets: list[Ints] = []
    spans = _cut(len(tokens), random, _DENSITY[style])
    for number, (keep, hide) in enumerate(spans):
        mask = np.array([mask_ids[number if style == "spans" else 0]], dtype=np.int64)
        shown += [tokens[keep], mask]
        targets += [mask, tokens[hide]]
    closing = np.array([end], dtype=np.int64)
    return np.concatenate([*shown, closing]), np.concatenate([*(targets if style == "spans" else [tokens]), closing])


def _span_count(length: int, density: float) -> tuple[int, int]:
    """Hidden tokens of a row, and the spans they make."""
    hidden = min(max(round(length * density), 1), length - 1)
    return hidden, min(max(round(hidden / _MEAN_SPAN), 1), hidden, length - hidden)


def _cut(length: int, random: np.random.Generator, density: float) -> list[tuple[slice, slice]]:
    """A row as runs that are kept and spans that are hidden, in turn; the lengths of both are drawn evenly."""
    hidden, spans = _span_count(length, density)
    kept_lengths, hidden_lengths = (_parts(total, spans, random) for total in (length - hidden, hidden))
    edges = np.cumsum(np.stack([kept_lengths, hidden_lengths], axis=1).ravel())
    starts = np.concatenate([[0], edges[:-1]])
    slices = [slice(int(a), int(b)) for a, b in zip(starts, edges, strict=True)]
    return list(zip(slices[::2], slices[1::2], strict=True))


def _parts(total: int, count: int, random: np.random.Generator) -> Ints:
    """`total` as a sum of `count` numbers from 1 on."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)
