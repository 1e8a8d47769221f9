"""A model is not scored on what its corpora are known to hold."""

from __future__ import annotations

import json

import pytest
from evaluation_world import CONFIG, World, publish, stage_context

from actors.store.artifacts import Artifact
from configs.errors import DataError
from pipelines.corpus.contamination import HELD_OUT, held_out_pairs, set_digest
from pipelines.corpus.shards import INDEX, CheckedSet
from pipelines.evaluation.lineage import check_overlaps
from pipelines.stages.evaluate import EvaluateStage


@pytest.fixture
def finetuned_on(world: World, tmp_path):
    """A model fine-tuned from one that learned from a corpus which was checked against the held-out pairs."""

    def make(name: str, **counts: int) -> Artifact:
        old, data = world.inputs["corpus"], world.inputs["data"]
        folder = tmp_path / name
        folder.mkdir()
        digest = set_digest(held_out_pairs(data.path / HELD_OUT))
        checked = CheckedSet(digest=digest, items=5, unchecked_items=0, ngrams=9, words=13, **counts)
        index = json.loads((old.path / INDEX).read_bytes())
        (folder / INDEX).write_text(json.dumps({**index, "checked": {"pairs": checked.model_dump()}}))
        corpus = publish(world.store, "corpus", name, folder, {})
        models = [world.inputs["models.pretrained"], world.inputs["models.finetuned"]]
        inputs = {"corpus": corpus}
        for stage, model in zip(("pretrain", "finetune"), models, strict=True):
            copy = tmp_path / f"{name}-{stage}"
            copy.mkdir()
            for record in model.manifest.files:
                (copy / record.path).write_bytes((model.path / record.path).read_bytes())
            made = publish(world.store, "model", f"{name}-{stage}", copy, inputs)
            inputs = {"model": made, "data": data}
        return made

    return make


def test_a_model_whose_corpus_kept_overlapping_documents_is_not_scored(world, finetuned_on, tmp_path):
    inputs = {**world.inputs, "models.finetuned": finetuned_on("kept", kept=7)}
    message = (
        r"models\.finetuned may not be scored on dataset/demo-instructions@1: .*corpus/kept@1, in which 7 documents"
    )
    with pytest.raises(DataError, match=message) as caught:
        EvaluateStage().run(CONFIG, inputs, stage_context(tmp_path / "stage", world.store))
    assert "evaluation set pairs" in str(caught.value)
    assert "drop and train again" in str(caught.value.next_step)


def test_a_model_whose_corpus_dropped_them_is_scored_and_what_is_not_known_is_said(world, finetuned_on, tmp_path):
    inputs = {**world.inputs, "models.finetuned": finetuned_on("dropped", dropped=7)}
    summary = EvaluateStage().run(CONFIG, inputs, stage_context(tmp_path / "stage", world.store))
    assert summary["overlaps"] == {
        "finetuned": {"corpus/dropped@1": "clean"},
        "pretrained": {"corpus/demo-corpus@1": "not checked"},
    }


def test_overlap_with_other_pairs_than_those_that_are_asked_is_no_reason(world, finetuned_on, tmp_path):
    model = finetuned_on("other", kept=3)
    (tmp_path / HELD_OUT).write_text('{"prompt": "Another question?", "completion": "Yes."}\n')
    data = Artifact(world.inputs["data"].manifest, tmp_path)
    assert check_overlaps({"m": model}, data, world.store) == {"m": {"corpus/other@1": "not checked"}}


def test_a_corpus_that_was_removed_from_the_store_is_named(world, finetuned_on):
    model = finetuned_on("gone", kept=1)
    (corpus,) = [m for m in world.store.list() if m.name == "gone"]
    world.store.remove(corpus.ref)
    assert check_overlaps({"m": model}, world.inputs["data"], world.store) == {"m": {"corpus/gone@1": "removed"}}
