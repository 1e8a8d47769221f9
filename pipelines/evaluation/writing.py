"""Texts that an encoder-decoder writes, and the scores of all of them together.

BLEU and chrF are those of `sacrebleu` over the whole set; ROUGE-1, -2 and -L (Lin 2004) are means of `rouge-score`'s F1
over its texts.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from torch import nn

_BATCH = 64
"""Texts written together; decides nothing but the speed and the rounding of ties."""
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Scores by what `rouge-score` calls them."""


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
    """BLEU, chrF and ROUGE from 0 to 100; and how each was made, in the words of its package."""
    bleu, chrf = BLEU(), CHRF()
    scores = {
        "bleu": float(bleu.corpus_score(written, [expected]).score),
        "chrf": float(chrf.corpus_score(written, [expected]).score),
    }
    rouge = RougeScorer(list(_ROUGE.values()), use_stemmer=False)
    each = [rouge.score(e, w) for e, w in zip(expected, written, strict=True)]
    scores |= {
        name: 100.0 * statistics.fmean(float(score[kind].fmeasure) for score in each) for name, kind in _ROUGE.items()
    }
    version = importlib.metadata.version("rouge-score")
    return scores, {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge": f"F1|stemmer:no|mean of texts|rouge-score:{version}",
    }
