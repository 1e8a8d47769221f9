"""Stage `judge`: which of two models answers better, said by a model behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from actors.store.artifacts import Artifact, write_durably
from configs.errors import ConfigError
from configs.schema.evaluation import JudgeConfig
from configs.schema.tasks import Answering
from pipelines.evaluation.asking import Row
from pipelines.evaluation.comparing import asked_alike
from pipelines.evaluation.endpoints import Endpoint
from pipelines.evaluation.judging import JUDGEMENTS, Judgement, JudgeReport, judge_pairs, summed_up
from pipelines.evaluation.stored_report import REPORT
from pipelines.stage import Progress, StageContext

_GROUP = 32
"""Items that are judged together, and lost together if the run is killed."""


class JudgeStage:
    """Publishes report.json and judgements.parquet (every item, both answers, and what the judge said)."""

    kind: ClassVar[str] = "judge"
    artifact_kind: ClassVar[str | None] = "report"
    code_version: ClassVar[int] = 1

    def sources(self, config: JudgeConfig) -> Mapping[str, str]:
        """What the endpoint says of the judge.

        Raises:
            ConfigError: the endpoint has no such model.
            EngineError: the endpoint does not answer.
        """
        return {"judge": str(_judge(config).facts()["digest"])}

    def run(self, config: JudgeConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Asks of every item in both orders; verdicts that a killed run got are not asked for again.

        Raises:
            ConfigError: a report has no such model or task, or its answers are not written.
            DataError: the models were not asked alike.
        """
        first, second = inputs["first"], inputs["second"]
        judge = _judge(config)
        judgements = _judged(config, judge, _pairs(config, first.path, second.path), context)
        report = summed_up(
            judgements,
            task=config.task,
            models=(first.digest, second.digest),
            judge=judge.facts(),
            criterion=config.criterion,
        )
        report.save(context.out)
        pq.write_table(pa.Table.from_pylist([one.model_dump() for one in judgements]), context.out / JUDGEMENTS)
        _track(report, judgements, context)
        return {
            "items": report.items,
            "wins": {"first": report.wins[0], "second": report.wins[1]},
            "ties": report.ties,
            "unjudged": report.unjudged,
            "second_share": report.share.second,
            "verdict": report.share.verdict,
        }


def _judge(config: JudgeConfig) -> Endpoint:
    url, _, name = config.judge.partition("#")
    return Endpoint(url, name, chat=True, parallel=config.parallel)


def _pairs(config: JudgeConfig, first: Path, second: Path) -> list[tuple[Row, Row]]:
    shared = {
        task: (facts, before, after)
        for task, facts, before, after in asked_alike(first, second, (config.first_model, config.second_model))
    }
    if config.task not in shared or shared[config.task][0].kind != "generation":
        written = [task for task, (facts, _, _) in shared.items() if facts.kind == "generation"]
        raise ConfigError(
            "task is none of both reports whose answers are written", received=config.task,
            allowed=", ".join(written) or "none of these reports", next_step="evaluate both models on such a task",
        )  # fmt: skip
    _, before, after = shared[config.task]
    return [(before[item], after[item]) for item in list(before)[: config.limit]]


def _judged(
    config: JudgeConfig, judge: Endpoint, pairs: Sequence[tuple[Row, Row]], context: StageContext
) -> list[Judgement]:
    answering = Answering(max_new_tokens=config.max_new_tokens)
    judgements: list[Judgement] = []
    for number, start in enumerate(range(0, len(pairs), _GROUP)):
        kept = context.work / f"judgements-{number:06d}.jsonl"
        if not kept.exists():
            made = judge_pairs(judge, config.criterion, pairs[start : start + _GROUP], answering)
            write_durably(kept, "".join(one.model_dump_json() + "\n" for one in made).encode())
        judgements += [Judgement.model_validate_json(line) for line in kept.read_bytes().splitlines()]
        context.check_lease()
        wins = sum(one.winner == "second" for one in judgements)
        losses = sum(one.winner == "first" for one in judgements)
        context.progress(Progress(len(judgements), len(pairs), "items", {"second wins": wins, "first wins": losses}))
    return judgements


def _track(report: JudgeReport, judgements: Sequence[Judgement], context: StageContext) -> None:
    figures = {
        "wins/first": report.wins[0],
        "wins/second": report.wins[1],
        "ties": report.ties,
        "unjudged": report.unjudged,
        "second_share": report.share.second,
        "agreement": report.agreement,
        "kappa": report.kappa,
        "shown_first": report.shown_first,
    }
    context.run.log_metrics({name: float(value) for name, value in figures.items() if value is not None}, step=0)
    context.run.log_file(context.out / REPORT)
    table = [
        {
            "item": one.item, "prompt": one.prompt, "first": one.answers[0], "second": one.answers[1],
            "winner": one.winner, "said": one.said[0], "said swapped": one.said[1], "error": one.error or "",
        }
        for one in judgements
    ]  # fmt: skip
    context.run.log_table(table, "judgements.json")
