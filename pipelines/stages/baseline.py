"""Stage `baseline`: what a simple method reaches on a dataset, for a model to be compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from configs.errors import DataError
from configs.schema.examples import BaselineConfig
from pipelines.corpus.examples import LABELS
from pipelines.evaluation.baselines import class_scores, classify_words, lead, most_frequent_tags, tag_scores
from pipelines.evaluation.writing import text_scores
from pipelines.stage import Progress, StageContext
from pipelines.training.examples import read_examples

_SPLITS = ("train", "heldout")
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class _Outcome:
    """What a method said of the held-out examples."""

    method: str
    expected: Sequence[Any]
    predicted: Sequence[Any]
    scores: Mapping[str, float]
    settings: Mapping[str, Any]
    """What the method chose, or how its scores were made."""


class BaselineStage:
    """Publishes report.json, with the scores, and predictions.jsonl."""

    kind: ClassVar[str] = "baseline"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 2

    def sources(self, config: BaselineConfig) -> Mapping[str, str]:
        """Everything comes from the store."""
        return {}

    def run(self, config: BaselineConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Learns from the training examples and scores the held-out ones.

        Raises:
            DataError: the dataset's task has no baseline.
        """
        data = inputs["data"]
        task = json.loads((data.path / LABELS).read_bytes())["task"] if (data.path / LABELS).exists() else "pairs"
        train, heldout = (_records(data, split) for split in _SPLITS)
        context.progress(Progress(0, len(heldout), "examples"))
        if task == "classify":
            outcome = _classify(train, heldout)
        elif task == "tag":
            outcome = _tag(train, heldout)
        elif task == "seq2seq":
            outcome = _lead(heldout)
        else:
            raise DataError(
                f"there is no baseline for {data.ref}", received=f"task {task}", allowed="classify, tag or seq2seq",
                next_step="leave the stage out, or give the dataset of another examples stage",
            )  # fmt: skip
        report = {
            "method": outcome.method,
            "task": task,
            "examples": len(heldout),
            "scores": outcome.scores,
            "settings": outcome.settings,
        }
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        lines = (
            json.dumps({"id": record["id"], "expected": expected, "predicted": answer}, ensure_ascii=False) + "\n"
            for record, expected, answer in zip(heldout, outcome.expected, outcome.predicted, strict=True)
        )
        (context.out / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        context.progress(Progress(len(heldout), len(heldout), "examples"))
        context.run.log_metrics({f"baseline/{name}": value for name, value in outcome.scores.items()}, step=0)
        return {"method": outcome.method, "examples": len(heldout), **outcome.scores}


def _classify(train: Records, heldout: Records) -> _Outcome:
    true = [record["label"] for record in heldout]
    predicted, settings = classify_words(
        [r["text"] for r in train], [r["label"] for r in train], [r["text"] for r in heldout]
    )
    return _Outcome("logistic regression over TF-IDF", true, predicted, class_scores(true, predicted), settings)


def _tag(train: Records, heldout: Records) -> _Outcome:
    true = [record["tags"] for record in heldout]
    predicted = most_frequent_tags(
        [r["words"] for r in train], [r["tags"] for r in train], [r["words"] for r in heldout]
    )
    return _Outcome("most frequent tag of each word", true, predicted, tag_scores(true, predicted), {})


def _lead(heldout: Records) -> _Outcome:
    true = [record["completion"] for record in heldout]
    predicted = lead([record["prompt"] for record in heldout])
    scores, signatures = text_scores(true, predicted)
    return _Outcome("first three lines of the source", true, predicted, scores, signatures)


def _records(data: Artifact, split: str) -> Records:
    return [record for _, record in read_examples(data.path / f"{split}.jsonl")]
