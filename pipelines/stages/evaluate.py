"""Stage `evaluate`: labelled models side by side on held-out rows and pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, write_durably
from actors.text import Text
from configs.errors import ContractError
from configs.schema.evaluation import EvaluateConfig, Metric
from pipelines.corpus.instructions import Pair
from pipelines.corpus.loader import Loader
from pipelines.corpus.shards import CorpusIndex
from pipelines.evaluation.answering import ModelResult, chat_prompt, measure
from pipelines.evaluation.lineage import check_overlaps
from pipelines.evaluation.metrics import METRICS, bits_per_byte, mean_with_interval, signatures
from pipelines.evaluation.report import PAIRS, ModelScores, Report, scores_picture
from pipelines.evaluation.tasks import METRIC_OF, Selection, load_pairs, select
from pipelines.stage import Progress, StageContext

_EXAMPLES = 3
"""Pairs of each task that the summary shows."""


class EvaluateStage:
    """Publishes report.json, answers.jsonl (every prompt, reference and answer, with scores) and scores.png."""

    kind: ClassVar[str] = "evaluate"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 2

    def sources(self, config: EvaluateConfig) -> Mapping[str, str]:
        """All data comes from artifacts."""
        return {}

    def run(self, config: EvaluateConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Measures one model after the other; those that a killed run finished are not measured again.

        Raises:
            ContractError: the corpus was not made with a model's tokenizer.
            DataError: no held-out pair, or none that fits the models; or a model learned from overlapping documents.
            RequestError: a model has no chat template.
        """
        models = {label: inputs[f"models.{label}"] for label in config.models}
        corpus, data = inputs["corpus"], inputs["data"]
        texts = {label: Text.load(model.path) for label, model in models.items()}
        _check_contracts(texts, CorpusIndex.load(corpus.path).contract)
        overlaps = check_overlaps(models, data, context.store)
        lengths = {label: _context_length(model) for label, model in models.items()}

        def fits(pair: Pair) -> bool:
            return all(
                len(chat_prompt(text, pair)) + config.max_new_tokens <= lengths[label] for label, text in texts.items()
            )

        asked = select(load_pairs(data.path / "heldout.jsonl"), config.pairs, fits)
        row_tokens = min(lengths.values())
        loader = Loader.open(corpus.path, split="validation", row_tokens=row_tokens, batch_rows=1, seed=0)
        rows = loader.rows(config.rows)
        results: dict[str, ModelResult] = {}
        for label, model in models.items():
            results[label] = self._measure(config, model, asked, rows, len(results), context)

        scored = _score_answers(asked, results)
        report = Report(
            rows=len(rows),
            row_tokens=row_tokens,
            pairs={task: len(asked.of(task)) for task in asked.tasks},
            too_long={task: asked.too_long[task] for task in asked.tasks},
            metrics={METRIC_OF[task]: signatures()[METRIC_OF[task]] for task in asked.tasks},
            models={
                label: ModelScores(
                    digest=model.digest,
                    bits_per_byte=bits_per_byte(results[label].nats_per_token, loader.bytes_per_token),
                    scores=_means(scored, label),
                )
                for label, model in models.items()
            },
        )
        _write(report, scored, context)
        _track(report, scored, corpus, data, context)
        return {
            "pairs": report.pairs,
            "models": {label: _figures(report.models[label]) for label in models},
            "overlaps": overlaps,
            "tokens_per_second": {label: round(result.tokens_per_second, 1) for label, result in results.items()},
            "examples": [row for task in asked.tasks for row in [r for r in scored if r["task"] == task][:_EXAMPLES]],
        }

    def _measure(
        self, config: EvaluateConfig, model: Artifact, asked: Selection, rows: Any, before: int, context: StageContext
    ) -> ModelResult:
        kept = context.work / f"result-{model.digest[:32]}.json"
        if kept.exists():
            return ModelResult.model_validate_json(kept.read_bytes())
        count = len(asked.pairs)
        total = count * len(config.models)

        def progress(done: int, tokens_per_second: float) -> None:
            figures = {"tokens/s": tokens_per_second}
            context.progress(Progress(before * count + done, total, "answers", figures))

        progress(0, 0.0)
        result = measure(
            model.path,
            asked.pairs,
            rows,
            max_new_tokens=config.max_new_tokens,
            max_sequences=config.max_sequences,
            progress=progress,
        )
        context.check_lease()
        write_durably(kept, result.model_dump_json().encode())
        return result


def _check_contracts(texts: Mapping[str, Text], expected: str) -> None:
    for label, text in texts.items():
        found = None if text.contract is None else text.contract.hash
        if found != expected:
            raise ContractError(
                f"models.{label} cannot be scored on this corpus: it was tokenized with another tokenizer",
                received=f"text contract {found}",
                allowed=f"text contract {expected}",
                next_step="evaluate on a corpus made with the model's tokenizer",
            )


def _context_length(model: Artifact) -> int:
    config = json.loads((model.path / "config.json").read_bytes())
    return int(config["max_position_embeddings"])


def _score_answers(asked: Selection, results: Mapping[str, ModelResult]) -> list[dict[str, Any]]:
    """A row for each pair, with every model's answer and its score."""
    rows = []
    for index, pair in enumerate(asked.pairs):
        metric = METRIC_OF[pair.task]
        answers = {}
        for label, result in results.items():
            answer = result.answers[index]
            score = round(METRICS[metric](pair.completion, answer.text), 4)
            answers[label] = {"text": answer.text, "score": score, "finish_reason": answer.finish_reason}
        rows.append(
            {
                "id": pair.id,
                "task": pair.task,
                "metric": metric,
                "source": pair.source,
                "prompt": pair.prompt,
                "reference": pair.completion,
                "answers": answers,
            }
        )
    return rows


def _means(scored: list[dict[str, Any]], label: str) -> dict[Metric, Any]:
    by_metric: dict[Metric, list[float]] = {}
    for row in scored:
        by_metric.setdefault(row["metric"], []).append(row["answers"][label]["score"])
    return {metric: mean_with_interval(values) for metric, values in by_metric.items()}


def _figures(model: ModelScores) -> dict[str, float]:
    return {"bits_per_byte": model.bits_per_byte, **{metric: score.value for metric, score in model.scores.items()}}


def _write(report: Report, scored: list[dict[str, Any]], context: StageContext) -> None:
    report.save(context.out)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    (context.out / PAIRS).write_text(lines, encoding="utf-8")
    (context.out / "scores.png").write_bytes(scores_picture(report))


def _track(
    report: Report, scored: list[dict[str, Any]], corpus: Artifact, data: Artifact, context: StageContext
) -> None:
    for name, artifact, profile in (
        ("corpus", corpus, {"rows": report.rows, "row_tokens": report.row_tokens}),
        ("data", data, {"pairs": report.pairs}),
    ):
        context.run.log_dataset(
            name=f"{name} {artifact.ref}",
            digest=artifact.digest,
            uri=str(artifact.path),
            context="evaluation",
            profile=profile,
        )
    figures = {f"{label}/{name}": v for label, model in report.models.items() for name, v in _figures(model).items()}
    context.run.log_metrics(figures, step=0)
    context.run.log_file(context.out / "scores.png")
    context.run.log_table([_table_row(row) for row in scored], "answers.json")


def _table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("task", "prompt", "reference")}
    for label, answer in row["answers"].items():
        flat |= {label: answer["text"], f"{label} {row['metric']}": answer["score"]}
    return flat
