"""The stage `judge` against judges on loopback: one that knows, one that looks at the place, one that rambles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_world import World, endpoint, stage_context
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import ConfigError, EngineError
from configs.schema.evaluation import JudgeConfig, TasksConfig
from pipelines.evaluation import endpoints
from pipelines.evaluation.judging import JUDGEMENTS, Judgement, JudgeReport, read_verdict, summed_up
from pipelines.stages.judge import JudgeStage
from pipelines.stages.tasks import TasksStage

ITEMS = 40
Say = Callable[[str, str], str]
"""What a judge says of answers A and B."""


@contextmanager
def judge(say: Say, asked: list[str] | None = None) -> Iterator[str]:
    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        prompt = body["messages"][0]["content"]
        if asked is not None:
            asked.append(prompt)
        a, _, b = prompt.partition("## Answer A\n")[2].partition("\n\n## Answer B\n")
        message = {"role": "assistant", "content": say(a, b.removesuffix("\n"))}
        return 200, json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

    with endpoint("j", answer) as url:
        yield url


@pytest.fixture(scope="module")
def reports(world: World, tmp_path_factory) -> dict[str, Any]:
    """Artifacts of two reports in which a random and a trained model answered the same items."""
    folder = tmp_path_factory.mktemp("judge")
    lines = [json.dumps({"text": f"def add_{n}(a, b):", "kind": n % 2}) + "\n" for n in range(ITEMS)]
    (folder / "items.jsonl").write_text("".join(lines))
    data = {"format": "jsonl", "evaluation": str(folder / "items.jsonl"), "get": "it here"}
    made = {
        "writing": {"kind": "generation", "answer": "{kind}", "metrics": ["chrf"], "answering": {"max_new_tokens": 4}},
        "reading": {"kind": "language_modelling"},
    }
    for name, task in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"description": name, "data": data, **task}))
    config = TasksConfig(models={"m": "x"}, tasks=tuple(str(folder / f"{name}.yaml") for name in made))
    found = {}
    for role, model in (("first", "pretrained"), ("second", "finetuned")):
        context = stage_context(folder / role, world.store)
        TasksStage().run(config, {"models.m": world.inputs[f"models.{model}"]}, context)
        found[role] = world.publish("report", f"judged-{role}", context.out, {})
    return found


def run(world: World, reports: dict[str, Any], folder: Path, url: str, **options: Any) -> Path:
    config = JudgeConfig(first="a", second="b", task="writing", judge=url, **options)
    context = stage_context(folder, world.store)
    JudgeStage().run(config, reports, context)
    return context.out


def longer(a: str, b: str) -> str:
    return f"I like it long.\nVerdict: {'A' if (len(a), a) > (len(b), b) else 'B'}"


def test_a_judge_that_knows_is_the_same_in_both_orders(world: World, reports, tmp_path: Path) -> None:
    with judge(longer) as url:
        out = run(world, reports, tmp_path, url)
    report = JudgeReport.load(out)
    rows = pq.read_table(out / JUDGEMENTS).to_pylist()
    won = [max(row["answers"], key=lambda text: (len(text), text)) for row in rows]
    assert len(rows) == report.items == ITEMS
    asked = [(row, best) for row, best in zip(rows, won, strict=True) if row["answers"][0] != row["answers"][1]]
    assert report.identical == ITEMS - len(asked) < ITEMS
    assert report.wins[0] == sum(row["answers"][0] == best for row, best in asked)
    assert report.wins[1] == sum(row["answers"][1] == best for row, best in asked)
    assert (report.agreement, report.shown_first, report.unjudged) == (1.0, 0.5, 0)
    assert report.share.second == pytest.approx((report.wins[1] + report.ties / 2) / ITEMS)


def test_a_judge_that_looks_at_the_place_decides_nothing(world: World, reports, tmp_path: Path) -> None:
    with judge(lambda a, b: "Verdict: **A**") as url:
        report = JudgeReport.load(run(world, reports, tmp_path, url))
    assert (report.wins, report.ties, report.shown_first, report.agreement) == ((0, 0), ITEMS, 1.0, 0.0)
    assert report.share.verdict == "noise"


def test_a_judge_that_rambles_is_counted_and_ties(world: World, reports, tmp_path: Path) -> None:
    with judge(lambda a, b: "Both have their merits.") as url:
        report = JudgeReport.load(run(world, reports, tmp_path, url, limit=10))
    assert (report.items, report.unjudged, report.ties, report.agreement) == (10, 10 - report.identical, 10, None)


def test_what_a_killed_run_asked_is_not_asked_again(world: World, reports, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(endpoints, "_FIRST_PAUSE_SECONDS", 0.001)
    asked: list[str] = []
    with judge(longer, asked) as url:
        config = JudgeConfig(first="a", second="b", task="writing", judge=url)
        context = stage_context(tmp_path / "one", world.store)

        def lost() -> None:
            raise EngineError("killed after the first group")

        with pytest.raises(EngineError, match="killed"):
            JudgeStage().run(config, reports, type(context)(**{**vars(context), "check_lease": lost}))
        before = len(asked)
        JudgeStage().run(config, reports, stage_context(tmp_path / "one", world.store))
        assert 0 < before < len(asked) == len(set(asked))
        whole = run(world, reports, tmp_path / "two", url)
    assert (tmp_path / "one/out/report.json").read_bytes() == (whole / "report.json").read_bytes()


def test_a_task_without_written_answers_is_refused(world: World, reports, tmp_path: Path) -> None:
    with judge(longer) as url:
        config = JudgeConfig(first="a", second="b", task="reading", judge=url)
        with pytest.raises(ConfigError, match="writing"):
            JudgeStage().run(config, reports, stage_context(tmp_path, world.store))


def test_a_judge_is_a_model_of_an_endpoint() -> None:
    with pytest.raises(ValidationError, match="http://HOST/v1#NAME"):
        JudgeConfig(first="a", second="b", task="t", judge="model/x@1")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("Verdict: A", "first"),
        ("verdict - b", "second"),
        ("Verdict: A\nno, wait.\n**Verdict:** tie.", "tie"),
        ("B", "second"),
        ("Tie.", "tie"),
        ("Verdict: Answer", "none"),
        ("", "none"),
    ],
)
def test_the_last_verdict_counts(said: str, verdict: str) -> None:
    assert read_verdict(said, ("first", "second")) == verdict


@given(st.lists(st.sampled_from(["first", "second", "tie", "none"]), min_size=2, max_size=2))
def test_a_model_wins_only_with_both_verdicts(verdicts: list[Any]) -> None:
    one = Judgement(item="i", prompt="p", answers=("a", "b"), said=("", ""), verdicts=(verdicts[0], verdicts[1]))
    assert (one.winner in ("first", "second")) == (verdicts[0] == verdicts[1] and verdicts[0] in ("first", "second"))


def test_kappa_is_what_the_books_say() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5, kappa 0.4."""
    counts = {("first", "first"): 20, ("first", "second"): 5, ("second", "first"): 10, ("second", "second"): 15}
    judgements = [
        Judgement(item=f"{pair}{n}", prompt="", answers=("a", "b"), said=("", ""), verdicts=pair)  # type: ignore[arg-type]
        for pair, count in counts.items()
        for n in range(count)
    ]
    report = summed_up(judgements, task="t", models=("x", "y"), judge={}, criterion="c")
    assert (report.agreement, report.kappa, report.wins, report.ties) == (0.7, 0.4, (20, 15), 15)
