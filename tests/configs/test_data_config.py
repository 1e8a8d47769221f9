"""What a recipe may say of corpora, their mixture and their packing, and what a person is told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import ConfigError
from configs.load import load_recipe
from configs.schema.base import references
from configs.schema.training import PretrainConfig

SOURCE = {"path": "python:stdlib"}
STAGES: dict[str, Any] = {
    "tokenizer": {"source": SOURCE},
    "prose": {"kind": "corpus", "tokenizer": "tokenizer", "source": SOURCE},
    "code": {"kind": "corpus", "tokenizer": "tokenizer", "source": SOURCE},
}
TWO = {"a": "prose", "b": "code"}


def load(tmp_path: Path, corpus: Any, data: dict[str, Any]) -> PretrainConfig:
    pretrain = {"corpus": corpus, "data": data, "training": {"steps": 100}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "two", "stages": {**STAGES, "pretrain": pretrain}}))
    stage = load_recipe(str(path)).stages["pretrain"]
    assert isinstance(stage, PretrainConfig)
    return stage


def test_one_corpus_needs_nothing_more(tmp_path: Path) -> None:
    stage = load(tmp_path, "prose", {})
    assert dict(references(stage)) == {"corpus": "prose"}
    assert (stage.data.packing, stage.data.within_documents, stage.data.mixture) == ("concat", False, None)
    assert load(tmp_path, "prose", {"packing": "best_fit"}).data.within_documents
    assert load(tmp_path, "prose", {"attention": "document"}).data.within_documents


def test_several_corpora_have_weights_that_may_change(tmp_path: Path) -> None:
    stage = load(tmp_path, TWO, {"mixture": {"a": 3, "b": 1}})
    assert dict(references(stage)) == {"corpus.a": "prose", "corpus.b": "code"}
    assert stage.data.mixture is not None
    assert [(phase.from_step, phase.weights) for phase in stage.data.mixture] == [(0, {"a": 3, "b": 1})]
    phases = [{"weights": {"a": 1, "b": 0}}, {"from_step": 50, "weights": {"a": 1, "b": 1}}]
    staged = load(tmp_path, TWO, {"mixture": phases}).data.mixture
    assert staged is not None
    assert [phase.from_step for phase in staged] == [0, 50]


@pytest.mark.parametrize(
    ("corpus", "data", "message"),
    [
        (TWO, {}, "several corpora need weights: set data.mixture for a, b"),
        ("prose", {"mixture": {"a": 1}}, "data.mixture is for corpora with names"),
        (TWO, {"mixture": {"a": 1, "c": 1}}, "received a, c; allowed: a, b"),
        (TWO, {"mixture": {"a": 1}}, "received a; allowed: a, b; weight 0 leaves a corpus out"),
        (TWO, {"mixture": {"a": 0, "b": 0}}, "no weight above 0"),
        (TWO, {"mixture": {"a": 1, "b": 0}}, "never takes from b"),
        (TWO, {"mixture": {"a": -1, "b": 2}}, r"mixture.*weights\.a"),
        (TWO, {"mixture": {"a": 0.5, "b": 2}}, r"mixture.*weights\.a"),
        (TWO, {"mixture": [{"from_step": 5, "weights": {"a": 1, "b": 1}}]}, "rising steps from 0"),
        (
            TWO,
            {"mixture": [{"weights": {"a": 1, "b": 1}}, {"from_step": 100, "weights": {"a": 1, "b": 2}}]},
            "changes at step 100, which is never reached",
        ),
        ({"a": "prose", "b": "poems"}, {"mixture": {"a": 1, "b": 1}}, "names no stage: received 'poems'"),
        ({"a b": "prose"}, {}, "corpus"),
        ("prose", {"packing": "best-fit"}, "best_fit"),
        ("prose", {"packing": "best_fit", "attention": "row"}, "attention row is for packing concat"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_runs(
    tmp_path: Path, corpus: Any, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, corpus, data)
