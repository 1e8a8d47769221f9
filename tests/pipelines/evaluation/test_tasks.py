"""Which held-out pairs are asked."""

from __future__ import annotations

import pytest

from configs.errors import CorruptArtifactError, DataError
from pipelines.corpus.instructions import Pair
from pipelines.evaluation.tasks import load_pairs, select


def _pairs(task, count):
    return [Pair(id=f"{task}{n}", task=task, prompt="p" * n, completion="c", source="m:f") for n in range(count)]


def test_each_task_gives_its_share_whatever_the_order_of_the_file():
    pairs = [*_pairs("summary", 20), *_pairs("signature", 3)]
    chosen = select(pairs, 5, lambda pair: True)
    assert (len(chosen.of("summary")), len(chosen.of("signature"))) == (5, 3)
    assert select(pairs[::-1], 5, lambda pair: True) == chosen


def test_a_larger_count_only_adds_pairs():
    pairs = _pairs("summary", 20)
    assert set(select(pairs, 5, lambda p: True).pairs) < set(select(pairs, 9, lambda p: True).pairs)


def test_pairs_that_do_not_fit_are_passed_over_and_counted():
    chosen = select(_pairs("summary", 10), 10, lambda pair: len(pair.prompt) < 4)
    assert len(chosen.pairs) == 4
    assert chosen.too_long["summary"] == 6


def test_a_task_without_a_pair_that_fits_is_an_error():
    with pytest.raises(DataError, match=r"summary.*max_new_tokens"):
        select(_pairs("summary", 3), 5, lambda pair: False)


def test_an_empty_dataset_is_an_error():
    with pytest.raises(DataError, match="no held-out pair"):
        select([], 5, lambda pair: True)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(_pairs("summary", 1)[0].model_dump_json() + "\n{broken\n")
    with pytest.raises(CorruptArtifactError, match="line 2"):
        load_pairs(path)
