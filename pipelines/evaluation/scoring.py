"""From an item and a response to the vectors that metrics sum up, and from sums to scores.

Accuracies, exact match of `generation`, F1 of spans and classes, ECE and pass@k are from 0 to 1; SQuAD's two, BLEU,
chrF and ROUGE from 0 to 100, as their authors publish them. BLEU, chrF, ROUGE, the spans of tags and the rules of
SQuAD are those of sacrebleu, rouge-score, seqeval and the official script; scores equal theirs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from configs.schema.tasks import Metric, Task
from pipelines.evaluation.items import Item
from pipelines.evaluation.metrics import rouge
from pipelines.evaluation.resampling import Combine, Sums, mean
from pipelines.evaluation.responses import Response

Vectors = dict[str, list[float]]
"""By metric, what one item adds to its sum."""

LOWER_IS_BETTER: frozenset[str] = frozenset({"perplexity", "word_perplexity", "bits_per_byte", "ece"})
OF_HUNDRED: frozenset[str] = frozenset({"squad_exact", "squad_f1", "bleu", "chrf", "rouge1", "rouge2", "rouge_l"})
"""Scores that are published from 0 to 100; the others are shares, or have no highest."""
ECE_BINS = 15
"""Bins of equal width (Guo et al., "On Calibration of Modern Neural Networks", 2017)."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*(-?\$?\s*[\d,]+(?:\.\d+)?)")


def vectors(task: Task, item: Item, response: Response, passed: Sequence[bool] = ()) -> Vectors:
    """What an item adds to the sum of each of the task's metrics; `passed` says which programs ran well."""
    if task.kind == "language_modelling":
        found = _of_text(item, response)
    elif task.kind in ("multiple_choice", "classification"):
        found = _of_choice(task, item, response)
    elif task.kind == "preference":
        found = _of_preference(item, response)
    elif task.kind == "entities":
        found = _of_tags(item, response)
    elif task.kind == "code":
        found = {m: [pass_at_k(len(passed), sum(passed), int(m.removeprefix("pass@"))), 1.0] for m in task.scores}
    else:
        text = response.texts[0] if response.texts else ""
        return {metric: _GENERATION[metric](text, item.references) for metric in task.scores}
    return {metric: found[metric] for metric in task.scores}


def prediction(task: Task, item: Item, response: Response) -> str:
    """What the model answered, in words."""
    if task.kind in ("multiple_choice", "preference", "classification"):
        chosen = chosen_class(task, item, response)
        return "" if chosen is None else item.choices[chosen]
    if task.kind == "entities":
        return " ".join(response.tags)
    return response.texts[0] if response.texts else ""


def goodness(task: Task, vectors: Vectors) -> float:
    """How good an item's answer is by the headline metric, more being better; for sorting and showing, not a score.

    Of corpus metrics it is the score of the item alone.
    """
    metric = task.scores[0]
    value = combine(metric)(np.asarray(vectors[metric]))
    return -value if metric in LOWER_IS_BETTER else value


def combine(metric: str) -> Combine:
    """The score of a metric from the sum of its vectors."""
    return _COMBINE.get(metric, mean)


def stack(rows: Sequence[Vectors], metric: str) -> Sums:
    """The vectors of one metric, [N, D]."""
    return np.asarray([row[metric] for row in rows], dtype=np.float64)


def signature(metric: str) -> str:
    """How a score is made, in the words of its package; numbers compare only where these are equal."""
    if metric == "bleu":
        return f"BLEU|{_signature(_bleu())}"
    if metric == "chrf":
        return f"chrF2|{_signature(_chrf())}"
    if metric.startswith("rouge"):
        version = importlib.metadata.version("rouge-score")
        return f"{metric} f-measure|stemmer:no|rouge-score:{version}|mean of answers, best reference"
    return _SIGNATURES[metric]


def chosen_class(task: Task, item: Item, response: Response) -> int | None:
    """Which choice a response means: the likeliest, or the one that a generated answer begins with."""
    if response.logprobs:
        return int(np.argmax(response.logprobs))
    answer = response.texts[0].strip().casefold() if response.texts else ""
    begun = [n for n, choice in enumerate(item.choices) if answer.startswith(choice.strip().casefold())]
    return max(begun, key=lambda n: len(item.choices[n])) if begun else None


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of `k` of the answers is right, without bias (Chen et al., "Evaluating Large Language Models
    Trained on Code", 2021): 1 - C(samples - right, k) / C(samples, k).
    """
    if samples < k:
        return 0.0  # the model failed to answer
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def squad_words(text: str) -> list[str]:
    """Words of an answer by SQuAD's rules: lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def last_number(text: str) -> Decimal | None:
    """The number after the first `####`, or else the last number there is; `$` and commas left out."""
    marked = _MARKED.search(text)
    found = [marked[1]] if marked else _NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[$,\s]", "", found[-1])) if found else None
    except InvalidOperation:
        return None


def _of_text(item: Item, response: Response) -> Vectors:
    nats = -sum(response.logprobs)
    text = item.prompt
    return {
        "perplexity": [nats, response.tokens],
        "word_perplexity": [nats, len(text.split()) + text.count("\n")],
        "bits_per_byte": [nats, len(text.encode())],
    }


def _of_choice(task: Task, item: Item, response: Response) -> Vectors:
    chosen = chosen_class(task, item, response)
    right = float(chosen == item.label)
    found = {"acc": [right, 1.0], "accuracy": [right, 1.0], "acc_norm": [0.0, 1.0], "ece": [0.0] * (3 * ECE_BINS)}
    if response.logprobs:
        lengths = [max(1, len(choice.encode())) for choice in item.choices]
        found["acc_norm"] = [float(int(np.argmax(np.divide(response.logprobs, lengths))) == item.label), 1.0]
        shares = np.exp(np.asarray(response.logprobs) - max(response.logprobs))
        confidence = float(shares.max() / shares.sum())
        # The first bin is closed below, all are closed above.
        place = max(0, math.ceil(confidence * ECE_BINS) - 1)
        found["ece"][3 * place : 3 * place + 3] = [1.0, confidence, right]
    counts = [[0.0, 0.0, 0.0] for _ in item.choices]  # true positives, false positives, false negatives
    if chosen is not None:
        counts[chosen][0 if right else 1] += 1
    if not right and item.label is not None:
        counts[item.label][2] += 1
    return {**found, "macro_f1": [count for each in counts for count in each]}


def _of_preference(item: Item, response: Response) -> Vectors:
    """1 if the first answer is the likelier one, a half if both are as likely, 0 if there is no answer."""
    if not response.logprobs:
        return {"preferred": [0.0, 1.0], "preferred_norm": [0.0, 1.0]}
    whole = np.asarray(response.logprobs)
    by_byte = whole / [max(1, len(choice.encode())) for choice in item.choices]
    shares = {"preferred": whole, "preferred_norm": by_byte}
    return {metric: [float(np.sign(liked - other) + 1) / 2, 1.0] for metric, (liked, other) in shares.items()}


def _of_tags(item: Item, response: Response) -> Vectors:
    from seqeval.metrics.sequence_labeling import get_entities  # two seconds to import

    true = list(item.fields["tags"])
    said = [*response.tags, *["O"] * (len(true) - len(response.tags))]
    expected, predicted = set(get_entities(true)), set(get_entities(said))
    counts = [float(len(expected & predicted)), float(len(predicted)), float(len(expected))]
    return dict.fromkeys(("span_f1", "span_precision", "span_recall"), counts)


def _best(score: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], list[float]]:
    return lambda text, references: [max(score(text, reference) for reference in references), 1.0]


def _squad_exact(text: str, reference: str) -> float:
    return 100.0 * (squad_words(text) == squad_words(reference))


def _squad_f1(text: str, reference: str) -> float:
    said, right = squad_words(text), squad_words(reference)
    if not said or not right:
        return 100.0 * (said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 200.0 * common / (len(said) + len(right))


def _number_match(text: str, reference: str) -> float:
    right = last_number(reference)
    return float(right is not None and last_number(text) == right)


def _rouge(kind: str) -> Callable[[str, str], float]:
    return lambda text, reference: rouge(kind, reference, text)


@functools.cache
def _bleu() -> BLEU:
    return BLEU()


@functools.cache
def _chrf() -> CHRF:
    return CHRF()


def _sacrebleu(scorer: Callable[[], BLEU | CHRF]) -> Callable[[str, Sequence[str]], list[float]]:
    """The counts that sacrebleu sums up itself, for the score of a corpus and for its own bootstrap."""
    return lambda text, references: [
        float(count) for count in scorer()._extract_corpus_statistics([text.strip()], [[r] for r in references])[0]
    ]


def _signature(scorer: BLEU | CHRF) -> str:
    scorer.corpus_score(["x"], [["x"]])
    return str(scorer.get_signature())


def _macro_f1(total: Sums) -> float:
    right, wrong, missed = total.reshape(-1, 3).T
    return float(np.mean(2 * right / np.maximum(2 * right + wrong + missed, 1e-9)))


def _ece(total: Sums) -> float:
    count, confidence, right = total.reshape(-1, 3).T
    return float(np.abs(confidence - right).sum() / max(1.0, count.sum()))


def _bleu_score(total: Sums) -> float:
    return float(_bleu()._compute_score_from_stats([int(count) for count in total]).score)


def _chrf_score(total: Sums) -> float:
    return float(_chrf()._compute_score_from_stats([int(count) for count in total]).score)


_GENERATION: Mapping[Metric, Callable[[str, Sequence[str]], list[float]]] = {
    "exact_match": _best(lambda text, reference: float(text.strip() == reference.strip())),
    "squad_exact": _best(_squad_exact),
    "squad_f1": _best(_squad_f1),
    "number_match": lambda text, references: [_number_match(text, references[0]), 1.0],
    "bleu": _sacrebleu(_bleu),
    "chrf": _sacrebleu(_chrf),
    "rouge1": _best(_rouge("rouge1")),
    "rouge2": _best(_rouge("rouge2")),
    "rouge_l": _best(_rouge("rougeL")),
}
_COMBINE: Mapping[str, Combine] = {
    "perplexity": lambda total: math.exp(min(700.0, total[0] / total[1])),
    "word_perplexity": lambda total: math.exp(min(700.0, total[0] / total[1])),
    "bits_per_byte": lambda total: float(total[0] / math.log(2) / total[1]),
    "macro_f1": _macro_f1,
    "ece": _ece,
    "span_f1": lambda total: float(2 * total[0] / max(1.0, total[1] + total[2])),
    "span_precision": lambda total: float(total[0] / max(1.0, total[1])),
    "span_recall": lambda total: float(total[0] / max(1.0, total[2])),
    "bleu": _bleu_score,
    "chrf": _chrf_score,
}
_SIGNATURES: Mapping[str, str] = {
    "perplexity": "exp of the mean nats a token, the first one after the token that ends texts",
    "word_perplexity": "exp of the mean nats a word: what stands between blanks, and one end for every line",
    "bits_per_byte": "bits for each byte of UTF-8",
    "acc": "share of items whose right choice is the likeliest",
    "acc_norm": "the same, likelihoods divided by bytes of the choice (lm-eval's acc_bytes)",
    "preferred": "share of pairs whose answer that people like more is the likelier one, a tie being half",
    "preferred_norm": "the same, likelihoods divided by bytes of the answer",
    "accuracy": "share of items with the right class",
    "macro_f1": "F1 averaged over classes (scikit-learn's)",
    "ece": f"expected calibration error, {ECE_BINS} bins of equal width",
    "span_f1": "F1 over spans of all types together (seqeval's)",
    "span_precision": "precision over spans (seqeval's)",
    "span_recall": "recall over spans (seqeval's)",
    "exact_match": "share of answers equal to a reference, blanks around them left out",
    "squad_exact": "exact match by the official script of SQuAD 1.1",
    "squad_f1": "F1 over words by the official script of SQuAD 1.1",
    "number_match": "share of answers whose number (after ####, or else the last) is the reference's",
    **{f"pass@{k}": f"unbiased pass@{k} (Chen et al. 2021)" for k in (1, 5, 10, 100)},
}
