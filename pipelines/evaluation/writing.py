"""Texts that an encoder-decoder writes, and the scores of all of them together.

BLEU and chrF are those of `sacrebleu` over the whole set, ROUGE-L the mean over its texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import nn

from pipelines.evaluation.metrics import rouge_l

_BATCH = 64
"""Texts written together; decides nothing but the speed and the rounding of ties."""


@torch.inference_mode()
def write_texts(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    *,
    pad: int,
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """What `model` writes for each of `sources`, token by token the most likely, in their order.

    `progress` is told how many are done.
    """
    model.eval()
    written: list[list[int]] = [[]] * len(sources)
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    for begin in range(0, len(order), _BATCH):
        chosen = order[begin : begin + _BATCH]
        longest = max(len(sources[index]) for index in chosen)
        tokens = torch.full((len(chosen), longest), pad)
        mask = torch.zeros_like(tokens)
        for row, index in enumerate(chosen):
            tokens[row, : len(sources[index])] = torch.tensor(sources[index])
            mask[row, : len(sources[index])] = 1
        output = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
        for index, ids in zip(chosen, output[:, 1:].tolist(), strict=True):
            written[index] = ids
        progress(min(begin + _BATCH, len(order)))
    return written


def text_scores(expected: Sequence[str], written: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """BLEU, chrF and ROUGE-L from 0 to 100; and how `sacrebleu` made the first two, in its own words."""
    bleu, chrf = BLEU(), CHRF()
    scores = {
        "bleu": float(bleu.corpus_score(written, [expected]).score),
        "chrf": float(chrf.corpus_score(written, [expected]).score),
        "rouge_l": statistics.fmean(rouge_l(e, w) for e, w in zip(expected, written, strict=True)),
    }
    return scores, {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
