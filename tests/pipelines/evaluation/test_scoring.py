"""Scores against values worked out by hand, and against the packages that publish them."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import f1_score as span_f1
from sklearn.metrics import accuracy_score, f1_score

from configs.schema.tasks import Task
from pipelines.evaluation.items import Item
from pipelines.evaluation.resampling import compare, estimate
from pipelines.evaluation.responses import Response
from pipelines.evaluation.scoring import combine, last_number, pass_at_k, prediction, signature, stack, vectors

DATA = {"format": "conll", "evaluation": "x", "get": "it"}


def task(kind: str, **rest: Any) -> Task:
    return Task.model_validate({"description": "", "kind": kind, "data": DATA, **rest})


def item(
    references: tuple[str, ...] = (), choices: tuple[str, ...] = (), label: int | None = None, **rest: Any
) -> Item:
    return Item("x", rest.pop("fields", {}), rest.pop("prompt", ""), choices, label, references)


def score(made: Task, metric: str, answered: list[tuple[Item, Response]], **rest: Any) -> float:
    rows = [vectors(made, one, response, **rest) for one, response in answered]
    return combine(metric)(stack(rows, metric).sum(0))


def said(metric: str, *pairs: tuple[str, tuple[str, ...]]) -> float:
    made = task("generation", metrics=[metric], answer="{a}")
    return score(made, metric, [(item(references), Response(texts=(text,))) for text, references in pairs])


def test_perplexities_and_bits_per_byte_are_those_of_the_sums() -> None:
    made = task("language_modelling")
    documents = [
        (item(prompt="a bb\n"), Response(logprobs=(-math.log(8),), tokens=3)),  # 2 words, 1 line end, 5 bytes
        (item(prompt="é\n"), Response(logprobs=(-math.log(4),), tokens=2)),  # 1 word, 1 line end, 3 bytes
    ]
    assert score(made, "perplexity", documents) == pytest.approx(2.0)  # 5 bits over 5 tokens
    assert score(made, "word_perplexity", documents) == pytest.approx(2.0)  # over 5 words and ends
    assert score(made, "bits_per_byte", documents) == pytest.approx(5 / 8)


def test_multiple_choice_takes_the_likeliest_and_the_likeliest_for_its_bytes() -> None:
    made = task("multiple_choice", choices=["{a}"], answer="{a}")
    one = item(choices=("no", "yes, of course"), label=1)
    answer = Response(logprobs=(math.log(0.6), math.log(0.2)))
    assert score(made, "acc", [(one, answer)]) == 0.0
    assert score(made, "acc_norm", [(one, answer)]) == 1.0  # -0.51 / 2 against -1.61 / 14
    # confidence 0.6 / 0.8 = 0.75, wrong: all of the error is 0.75
    assert score(made, "ece", [(one, answer)]) == pytest.approx(0.75)
    assert prediction(made, one, answer) == "no"


def test_choices_without_an_answer_are_wrong() -> None:
    made = task("multiple_choice", choices=["{a}"], answer="{a}")
    gone = (item(choices=("a", "b"), label=0), Response(error="HTTP 500"))
    assert score(made, "acc", [gone]) == score(made, "acc_norm", [gone]) == 0.0


def test_a_preference_is_for_the_likelier_answer_and_a_tie_is_half_of_one() -> None:
    made = task("preference", answer="{a}", rejected="{b}")
    pair = item(("good",), ("good", "bad and long"), 0)
    liked, other = Response(logprobs=(-4.0, -6.0)), Response(logprobs=(-4.0, -3.0))
    same, gone = Response(logprobs=(-4.0, -4.0)), Response(error="HTTP 500")
    answered = [(pair, response) for response in (liked, other, same, gone)]
    assert score(made, "preferred", answered) == (1 + 0 + 0.5 + 0) / 4
    # by bytes: -1 against -6 / 12, then -1 against -3 / 12, then -1 against -4 / 12: never the first one's
    assert score(made, "preferred_norm", answered) == 0.0
    assert prediction(made, pair, other) == "bad and long"


def test_classes_in_words_are_what_the_answer_begins_with_and_scores_are_scikit_learns() -> None:
    made = task("classification", choices=["good", "bad", "good enough"], answer="{a}", method="generate")
    texts = [" Good!", "bad", "good enough, really", "", "BAD\nmore", "perhaps good"]
    true = [0, 0, 2, 1, 1, 0]
    answered = [
        (item(choices=("good", "bad", "good enough"), label=label), Response(texts=(text,)))
        for text, label in zip(texts, true, strict=True)
    ]
    predicted = [0, 1, 2, -1, 1, -1]
    assert score(made, "accuracy", answered) == pytest.approx(3 / 6) == pytest.approx(accuracy_score(true, predicted))
    expected = f1_score(true, predicted, labels=[0, 1, 2], average="macro")
    # good: 2 * 1 / (2 + 0 + 2); bad: 2 * 1 / (2 + 1 + 1); good enough: 1
    assert score(made, "macro_f1", answered) == pytest.approx(expected) == pytest.approx(2 / 3)


def test_calibration_error_is_weighted_by_bins() -> None:
    made = task("classification", choices=["a", "b"], answer="{a}")

    def one(confidence: float, right: bool) -> tuple[Item, Response]:
        logprobs = (math.log(confidence), math.log(1 - confidence))
        return item(choices=("a", "b"), label=0 if right else 1), Response(logprobs=logprobs)

    # Bins are a fifteenth wide: 0.95 twice in the last, half of them right; 0.7 alone and right.
    answered = [one(0.95, True), one(0.95, False), one(0.7, True)]
    assert score(made, "ece", answered) == pytest.approx((2 * 0.45 + 0.3) / 3)


def test_spans_are_seqevals_and_words_behind_the_window_have_none() -> None:
    made = task("entities")
    true = [["B-per", "I-per", "O", "B-loc"], ["O", "B-org"]]
    tags = [["B-per", "I-per", "O", "B-org"], ["O"]]
    answered = [
        (item(fields={"tags": t}), Response(tags=tuple(p))) for t, p in zip(true, tags, strict=True)
    ]  # fmt: skip
    assert score(made, "span_precision", answered) == pytest.approx(1 / 2)
    assert score(made, "span_recall", answered) == pytest.approx(1 / 3)
    assert (
        score(made, "span_f1", answered) == pytest.approx(2 / 5) == pytest.approx(span_f1(true, [tags[0], ["O", "O"]]))
    )


def test_exact_match_takes_the_best_reference() -> None:
    assert said("exact_match", (" two\n", ("2", "two")), ("Two", ("two",))) == 0.5


def test_squad_leaves_out_case_articles_and_punctuation() -> None:
    assert said("squad_exact", ("The Denver Broncos!", ("denver broncos",)), ("", ("x",))) == 50.0
    # words: denver broncos team against denver broncos: 2 common of 3 and 2
    assert said("squad_f1", ("the Denver Broncos team", ("Denver Broncos", "Panthers"))) == pytest.approx(80.0)
    assert said("squad_f1", ("", ("the",))) == 100.0


def test_numbers_are_what_stands_after_the_marks_or_last() -> None:
    assert last_number("so 3 + 4 = 7\n#### $1,007.50 and 3") == Decimal("1007.50")
    assert last_number("first 3, then -7") == Decimal(-7)
    assert last_number("none") is None
    assert said("number_match", ("it is 72.0", ("48+24\n#### 72",)), ("no idea", ("#### 3",))) == 0.5


def test_bleu_and_chrf_of_a_set_are_sacrebleus_with_its_signature() -> None:
    answers = ["the cat sat on the mat today", "a dog runs", ""]
    references = [
        ("the cat sat on the mat", "a cat sat on a mat"),
        ("the dog runs fast", "a dog is running"),
        ("x", "y"),
    ]
    streams = [[r[n] for r in references] for n in range(2)]
    pairs = list(zip(answers, references, strict=True))
    assert said("bleu", *pairs) == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert said("chrf", *pairs) == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    assert said("bleu", ("the cat sat on the mat", ("the cat sat on the mat",))) == pytest.approx(100.0)
    # Of 5 words 4 are right, of 4 pairs 3, of 3 triples 2, of 2 quadruples 1; 5 words against 6 of the reference.
    precisions = 4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    by_hand = 100 * math.exp(1 - 6 / 5) * precisions ** (1 / 4)
    assert said("bleu", ("the cat sat on mats", ("the cat sat on the mat",))) == pytest.approx(by_hand)
    # Of "abcd" and "abce" 3 of 4 characters are the same, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruple; of "ab" and
    # "ab" 2 of 2 and 1 of 1. Counted together: precision = recall for every length, so that F2 is their mean.
    by_hand = 100 * (5 / 6 + 3 / 4 + 1 / 2 + 0) / 4
    assert said("chrf", ("abce", ("abcd",)), ("ab", ("ab",))) == pytest.approx(by_hand)
    assert signature("bleu").startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_is_rouge_scores() -> None:
    text, reference = "the cat is here", "the cat sat here"
    assert said("rouge1", (text, (reference,))) == pytest.approx(75.0)
    assert said("rouge2", (text, (reference,))) == pytest.approx(100 / 3)
    expected = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert said("rouge_l", (text, (reference,))) == pytest.approx(100 * expected) == pytest.approx(75.0)


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # of 10 choices of 3, one holds none of the 2
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0
    assert pass_at_k(0, 0, 1) == 0.0
    made = task("code", metrics=["pass@1", "pass@5", "pass@10", "pass@100"], answering={"samples": 100})
    passed = [True] + [False] * 99
    for k in (1, 5, 10, 100):  # of one right answer in a hundred, k of a hundred draws hold it
        assert score(made, f"pass@{k}", [(item(), Response())], passed=passed) == pytest.approx(k / 100)


def test_an_interval_holds_the_score_and_narrows_with_items() -> None:
    few, many = (np.array([[float(n % 2), 1.0] for n in range(count)]) for count in (20, 2000))
    narrow, wide = estimate(many, combine("acc")), estimate(few, combine("acc"))
    assert narrow.low < narrow.value == 0.5 < narrow.high
    # 1.96 standard errors of a share of a half: 0.022 of 2000 items, 0.219 of 20
    assert narrow.high - narrow.value == pytest.approx(0.022, abs=0.004)
    assert wide.high - wide.value == pytest.approx(0.219, abs=0.05)
    assert estimate(few, combine("acc")) == wide


def test_a_difference_is_told_from_noise() -> None:
    rng = np.random.default_rng(3)
    first = np.stack([(rng.random(400) < 0.5).astype(float), np.ones(400)], axis=1)
    better = first.copy()
    better[:40, 0] = 1.0
    shuffled = np.stack([rng.permutation(first[:, 0]), np.ones(400)], axis=1)
    gained = compare(first, better, combine("acc"))
    assert gained.verdict == "better"
    assert gained.p_value < 0.01
    assert gained.difference.low > 0
    assert compare(better, first, combine("acc")).verdict == "worse"
    assert compare(first, better, combine("perplexity"), lower_is_better=True).verdict == "worse"
    assert compare(first, shuffled, combine("acc")).verdict == "noise"
    same = compare(first, first, combine("acc"))
    assert (same.verdict, same.p_value, same.difference.value) == ("noise", 1.0, 0.0)


def test_the_p_value_of_one_item_that_changed_is_one() -> None:
    first = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    second = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    # Exchanged or not, the one item makes a difference of a third.
    assert compare(first, second, combine("acc")).p_value == 1.0
