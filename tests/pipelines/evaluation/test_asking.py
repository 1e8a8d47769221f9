"""What is asked of each item, what is kept of it, and what a killed run asks again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_world import World, endpoint, stage_context

from configs.errors import ConfigError
from configs.schema.evaluation import TasksConfig
from pipelines.evaluation.asking import read_rows
from pipelines.evaluation.task_report import ANSWERS, TasksReport
from pipelines.evaluation.threads import at_once
from pipelines.stages.tasks import TasksStage
from tests.infra.conftest import ROOT, command_environment

ITEMS = 40


def write_task(folder: Path, records: list[dict[str, Any]], train: list[dict[str, Any]] = (), **task: Any) -> str:  # type: ignore[assignment]
    for name, lines in (("scored", records), ("train", train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"format": "jsonl", "get": "it here", "evaluation": f"{folder}/scored.jsonl"}
    data |= {"train": f"{folder}/train.jsonl"} if train else {}
    (folder / "task.yaml").write_text(yaml.safe_dump({"description": "d", "data": data, **task}))
    return f"{folder}/task.yaml"


def run(world: World, folder: Path, task: str, model: str = "artifact", **options: Any) -> tuple[TasksReport, Path]:
    config = TasksConfig(models={"m": model}, tasks=(task,), **options)
    context = stage_context(folder, world.store)
    TasksStage().run(config, {} if model != "artifact" else {"models.m": world.inputs["models.finetuned"]}, context)
    return TasksReport.load(context.out), context.out


def test_examples_that_do_not_fit_the_window_are_left_out_whole_and_counted(world: World, tmp_path: Path) -> None:
    short, long = {"text": "def add(a, b):", "a": "x"}, {"text": "def add(a, b): return a " * 15, "a": "x"}
    examples = [{"text": f"def add_{n}(a, b): return a + b", "a": "sum"} for n in range(3)]
    task = write_task(
        tmp_path, [short, long], examples, kind="generation", answer="{a}", metrics=["exact_match"],
        instruction="Say.", answering={"max_new_tokens": 8},
    )  # fmt: skip
    report, out = run(world, tmp_path / "run", task, shots=3)
    found = {row.prompt.count("add_"): row for row in read_rows(out / ANSWERS)}
    whole, alone = found[max(found)], found[0]
    assert 0 < whole.examples == whole.prompt.count("sum") < 3  # of a window of 64 tokens
    assert whole.prompt.startswith("Say.\n\ndef add_")
    assert whole.prompt.endswith("\n\ndef add(a, b):")
    assert not whole.response.truncated
    assert (alone.examples, alone.response.truncated) == (0, True)
    scores = report.models["m"].tasks["task"]
    assert (scores.fewer_examples, scores.examples_shown, scores.truncated) == (2, whole.examples / 2, 1)


def test_conversations_hold_examples_as_turns_here_and_at_an_endpoint(world: World, tmp_path: Path) -> None:
    task = write_task(
        tmp_path, [{"text": "two", "a": "2"}], [{"text": "one", "a": "1"}], kind="generation", answer="{a}",
        instruction="Count.", metrics=["exact_match"], answering={"max_new_tokens": 2},
    )  # fmt: skip
    _, out = run(world, tmp_path / "here", task, shots=1, chat=True)
    (row,) = read_rows(out / ANSWERS)
    assert row.prompt == "user: Count.\n\none\n\nassistant: 1\n\nuser: two"
    asked: list[Any] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body["messages"])
        return 200, json.dumps({"choices": [{"message": {"content": "2"}, "finish_reason": "stop"}]}).encode()

    with endpoint("m", answer) as url:
        report, out = run(world, tmp_path / "there", task, url, shots=1, chat=True)
    assert read_rows(out / ANSWERS)[0].prompt == row.prompt
    assert report.models["m"].tasks["task"].scores["exact_match"].value == 1.0
    turns = [("user", "Count.\n\none"), ("assistant", "1"), ("user", "two")]
    assert [[(message["role"], message["content"]) for message in one] for one in asked] == [turns]


def test_preferences_are_asked_as_likelihoods_and_the_report_says_what_made_the_prompts(
    world: World, tmp_path: Path
) -> None:
    records = [{"text": "Sum of a, b: add", "good": "def add(a, b):", "bad": "class Thing"}]
    task = write_task(tmp_path, records, kind="preference", answer="{good}", rejected="{bad}", delimiter="")
    report, out = run(world, tmp_path / "run", task)
    (row,) = read_rows(out / ANSWERS)
    assert (len(row.response.logprobs), row.choices) == (2, ("def add(a, b):", "class Thing"))
    likelier = row.response.logprobs[0] > row.response.logprobs[1]
    assert report.models["m"].tasks["task"].scores["preferred"].value == float(likelier)
    facts = report.models["m"].facts
    assert (facts["runner"], facts["device"], facts["contract"]) == ("decoder", "cpu", facts["contract"])
    assert len(report.tasks["task"].template) == 16
    other = write_task(tmp_path, records, kind="preference", answer="{good}", rejected="{bad}", delimiter=" ")
    again, _ = run(world, tmp_path / "other", other)
    assert again.tasks["task"].template != report.tasks["task"].template


def words(count: int) -> dict[str, Any]:
    return {
        "records": [{"text": f"item {n}", "a": "yes"} for n in range(count)], "kind": "generation", "answer": "{a}",
        "metrics": ["exact_match"],
    }  # fmt: skip


def test_behind_an_endpoint_every_item_is_kept_by_itself(world: World, tmp_path: Path) -> None:
    task = write_task(tmp_path, **words(6))
    asked: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body["prompt"])
        if len(asked) == 5:
            return 401, b"no key"
        return 200, json.dumps({"choices": [{"text": "yes", "finish_reason": "stop"}]}).encode()

    with endpoint("m", answer) as url:
        with pytest.raises(ConfigError, match="401"):
            run(world, tmp_path / "run", task, url, parallel=1)
        report, _ = run(world, tmp_path / "run", task, url, parallel=1)
    assert len(asked) == 7
    assert len(set(asked)) == 6
    assert report.models["m"].tasks["task"].scores["exact_match"].value == 1.0


def test_empty_answers_and_refusals_are_answers_that_are_wrong(world: World, tmp_path: Path) -> None:
    task = write_task(tmp_path, **words(3))
    said = [{"content": "yes"}, {"content": ""}, {"content": None, "refusal": "I will not."}]

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [{"message": said.pop(0), "finish_reason": "stop"}]}).encode()

    with endpoint("m", answer) as url:
        report, out = run(world, tmp_path / "run", task, url, parallel=1, chat=True)
    scores = report.models["m"].tasks["task"]
    assert (scores.failed, scores.scores["exact_match"].value) == (0, round(1 / 3, 6))
    assert [row.response.texts for row in read_rows(out / ANSWERS)] == [("yes",), ("",), ("I will not.",)]


@pytest.mark.slow  # 10 s: the command starts twice
def test_a_command_that_is_killed_asks_only_the_items_without_an_answer_again(tmp_path: Path) -> None:
    task = write_task(tmp_path, **words(ITEMS))
    asked: list[str] = []
    enough = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body["prompt"])
        if len(asked) >= ITEMS // 2:
            enough.set()
        time.sleep(0.05)
        return 200, json.dumps({"choices": [{"text": "yes", "finish_reason": "stop"}]}).encode()

    with endpoint("m", answer) as url:
        address, _, name = url.partition("#")
        command = [sys.executable, "-m", "infra.cli.main", "evaluate", name, "--endpoint", address, "--task", task]
        command += ["--tracker", "none", "--json"]
        environment = command_environment(tmp_path / "home")
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            assert enough.wait(60)
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.2)  # what was under way comes to its end
        before = len(asked)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["models"]["m"]["tasks"]["task"]["scores"]["exact_match"]["value"] == 1.0
    assert report["summary"]["speed"]["m/task"]["asked_now"] == len(asked) - before
    # Eight requests are under way at a time, as many answers wait to be kept, and one is being written.
    assert ITEMS <= len(asked) <= ITEMS + 17
    assert set(asked) == {f"item {n}" for n in range(ITEMS)}


def test_an_endpoint_that_says_when_to_come_back_is_asked_then(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("pipelines.evaluation.endpoints.time.sleep", waited.append)
    answers = [(429, b"later"), (500, b"oops"), (200, b'{"choices": [{"text": "yes", "finish_reason": "stop"}]}')]
    with endpoint("m", lambda _: answers.pop(0)) as url:
        report, _ = run(world, tmp_path / "run", write_task(tmp_path, **words(1)), url)
    assert waited == [1.0, 1.0]  # as it said, then the second pause
    assert report.models["m"].tasks["task"].failed == 0


def test_calls_are_made_some_at_a_time_and_the_first_error_begins_no_other() -> None:
    running, most, begun = [0], [0], []
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            begun.append(number)
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        if number == 7:
            raise ValueError("seven")
        return 10 * number

    calls = [lambda number=number: call(number) for number in range(7)]
    assert dict(at_once(calls, 3)) == {number: 10 * number for number in range(7)}
    assert most[0] == 3
    begun.clear()
    with pytest.raises(ValueError, match="seven"):
        dict(at_once([lambda: call(7), *calls], 1))
    assert begun == [7]
