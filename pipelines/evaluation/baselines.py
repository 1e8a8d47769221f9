"""What simple methods reach, so that a model's score can be judged.

All are what the field compares with first: a linear classifier over weighted words, a table of words, and the beginning
of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from seqeval.metrics import f1_score, precision_score, recall_score
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as class_f1_score
from sklearn.pipeline import make_pipeline

OUTSIDE = "O"
_LEAD_LINES = 3
_STRENGTHS = (1.0, 3.0, 10.0, 30.0)
"""Inverse regularisations tried; what does best on a tenth of the training examples is taken."""


def classify_words(
    texts: Sequence[str], labels: Sequence[str], heldout: Sequence[str]
) -> tuple[list[str], dict[str, float]]:
    """Classes of the `heldout` texts by logistic regression over TF-IDF of words and pairs of words.

    Returns them and the settings that were chosen; the choice sees training examples only.
    """
    cut = max(1, len(texts) // 10)

    def right(strength: float) -> float:
        return float(accuracy_score(labels[:cut], _fitted(texts[cut:], labels[cut:], strength, texts[:cut])))

    best = max(_STRENGTHS, key=right)
    return _fitted(texts, labels, best, heldout), {"inverse_regularisation": best}


def _fitted(texts: Sequence[str], labels: Sequence[str], strength: float, asked: Sequence[str]) -> list[str]:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    model = make_pipeline(words, LogisticRegression(C=strength, max_iter=1000))
    return list(model.fit(texts, labels).predict(asked))


def class_scores(true: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Accuracy and F1 averaged over classes."""
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(class_f1_score(true, predicted, average="macro")),
    }


def most_frequent_tags(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], heldout: Sequence[Sequence[str]]
) -> list[list[str]]:
    """For each word of `heldout` the tag it had most often (of equals the first by name), `O` if it never occurred."""
    counts: dict[str, Counter[str]] = {}
    for sentence, its in zip(words, tags, strict=True):
        for word, tag in zip(sentence, its, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    table = {word: min((-count, tag) for tag, count in seen.items())[1] for word, seen in counts.items()}
    return [[table.get(word, OUTSIDE) for word in sentence] for sentence in heldout]


def tag_scores(true: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over spans of all types together."""
    return {
        "span_precision": float(precision_score(true, predicted, zero_division=0)),
        "span_recall": float(recall_score(true, predicted, zero_division=0)),
        "span_f1": float(f1_score(true, predicted, zero_division=0)),
    }


def lead(texts: Sequence[str]) -> list[str]:
    """The first three lines of each text, as one: LEAD-3, which summaries of news are hard put to beat."""
    return [" ".join(text.splitlines()[:_LEAD_LINES]) for text in texts]
