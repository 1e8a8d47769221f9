"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from pipelines.evaluation.metrics import bits_per_byte, chrf, mean_with_interval, rouge_l, signatures


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words():
    # Common subsequence "return sum of numbers": precision 4/4, recall 4/6, F1 = 2 * 1 * (2/3) / (5/3) = 0.8.
    assert rouge_l("return the sum of two numbers", "Return sum of numbers") == pytest.approx(80.0)
    assert rouge_l("a b c d", "a c d e") == pytest.approx(75.0)
    assert rouge_l("a b", "b a") == pytest.approx(50.0), "the order counts"
    assert rouge_l("something", "") == 0.0
    assert rouge_l("same words", "same words") == 100.0


def test_chrf_is_the_f2_over_character_n_grams():
    assert chrf("def f(a):", "def f(a):") == pytest.approx(100.0)
    assert chrf("abc", "xyz") == 0.0
    assert chrf("def f():", "") == 0.0
    # n-grams of "abcd" and "abce": precision = recall = 3/4, 2/3, 1/2, 0/1 for n = 1 to 4, so F2 is their mean.
    assert chrf("abce", "abcd") == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_chrf_weighs_recall_over_precision():
    assert chrf("abcdef", "abc") < chrf("abc", "abcdef")


def test_the_interval_holds_the_mean_and_is_the_same_every_time():
    values = [0.0, 25.0, 50.0, 75.0, 100.0] * 10
    first, again = mean_with_interval(values), mean_with_interval(values)
    assert first == again
    assert first.value == 50.0
    # The mean of 50 draws has standard deviation sqrt(1250 / 50) = 5, so the interval is about 50 +- 9.8.
    assert first.low == pytest.approx(40.2, abs=1.0)
    assert first.high == pytest.approx(59.8, abs=1.0)


def test_one_value_has_no_spread():
    interval = mean_with_interval([42.0])
    assert (interval.low, interval.value, interval.high) == (42.0, 42.0, 42.0)


def test_bits_per_byte():
    # 4 bits a token, 2 bytes a token.
    assert bits_per_byte(4 * math.log(2), 2.0) == 2.0


def test_signatures_name_the_metrics_settings():
    assert "rougeL" in signatures()["rouge_l"]
    assert "nc:6|nw:0" in signatures()["chrf"]
