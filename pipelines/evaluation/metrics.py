"""Scores of answers, and how sure they are.

ROUGE-L and chrF come from the packages that published numbers are made with, from 0 to 100 for one answer; the score
of a model is the mean over its answers, with a percentile bootstrap interval (Efron, "Bootstrap Methods", 1979).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from configs.schema.evaluation import Metric

_RESAMPLES = 2000
_SEED = 20240229
_CONFIDENCE = 0.95
_DECIMALS = 4
"""Fewer than the digits that the order of a floating-point sum can change."""


class Interval(BaseModel):
    """A mean with its 95 % confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(reference: str, answer: str) -> float:
    """F1 over the longest common subsequence of lower-case words (Lin, 2004), 0 to 100."""
    return 100.0 * float(_rouge().score(reference, answer)["rougeL"].fmeasure)


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


def mean_with_interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with the interval that resampling the values with a fixed seed gives."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(0, len(sample), size=(_RESAMPLES, len(sample)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(sample[drawn].mean(axis=1), [tail, 1 - tail])
    return Interval(value=_round(sample.mean()), low=_round(low), high=_round(high))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits for each byte of text: comparable between tokenizers."""
    return _round(nats_per_token / math.log(2) / bytes_per_token)


def _round(value: float) -> float:
    return round(float(value), _DECIMALS)
