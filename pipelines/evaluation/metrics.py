"""Scores of answers, and how sure they are.

ROUGE-L and chrF come from the packages that published numbers are made with, from 0 to 100 for one answer; the score
of a model is the mean over its answers, with a bootstrap interval.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF

from configs.schema.evaluation import Metric
from pipelines.evaluation.resampling import Estimate, estimate, mean

_DECIMALS = 4
"""Fewer than the digits that the order of a floating-point sum can change."""


@functools.cache
def _rouge(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # a second to import

    return RougeScorer([kind], use_stemmer=False)


def rouge(kind: str, reference: str, answer: str) -> float:
    """F1 of `rouge1` or `rouge2` (words, pairs of them) or `rougeL` (the longest common subsequence) over lower-case
    words (Lin, 2004), 0 to 100."""
    return 100.0 * float(_rouge(kind).score(reference, answer)[kind].fmeasure)


def rouge_l(reference: str, answer: str) -> float:
    """The F1 of the longest common subsequence."""
    return rouge("rougeL", reference, answer)


def chrf(reference: str, answer: str) -> float:
    """F2 over character 1- to 6-grams (Popovic, 2015), 0 to 100."""
    return float(CHRF().sentence_score(answer, [reference]).score)


METRICS: Mapping[Metric, Callable[[str, str], float]] = {"rouge_l": rouge_l, "chrf": chrf}


def signatures() -> dict[Metric, str]:
    """How each score is made, in the words of the packages; numbers compare only where these are equal."""
    scorer = CHRF()
    scorer.sentence_score("", [""])
    rouge = importlib.metadata.version("rouge-score")
    return {
        "rouge_l": f"rougeL f-measure|stemmer:no|rouge-score:{rouge}|mean of answers",
        "chrf": f"chrF2|{scorer.get_signature()}|mean of answers",
    }


def mean_with_interval(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with the interval that resampling the values gives."""
    return estimate(np.column_stack([values, np.ones(len(values))]), mean)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits for each byte of text: comparable between tokenizers."""
    return _round(nats_per_token / math.log(2) / bytes_per_token)


def _round(value: float) -> float:
    return round(float(value), _DECIMALS)
