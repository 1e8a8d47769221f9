"""Tasks from YAML files, and the items that they make of every format of data."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from configs.errors import ConfigError, DataError
from configs.load import load_task, packaged_tasks
from pipelines.evaluation.functions import read_functions
from pipelines.evaluation.items import Item, full_messages, full_prompt, load_items, task_digest

DATA = Path(os.environ.get("GANYMEDE_DATA", "../shared/data")).absolute()


def items(folder: Path, task: dict[str, Any], split: Any = "evaluation") -> list[Item]:
    path = folder / "task.yaml"
    data = {"get": "it anywhere", **task["data"]}
    path.write_text(yaml.safe_dump({"description": "a task", **task, "data": data}))
    return load_items(load_task(str(path)), split)


def generation(path: Path | dict[str, str], format_: str, **rest: Any) -> dict[str, Any]:
    data = {"format": format_, "evaluation": path if isinstance(path, dict) else str(path), **rest.pop("data", {})}
    return {"kind": "generation", "metrics": ["exact_match"], "data": data, **rest}


def test_every_packaged_task_is_valid_and_says_how_its_data_can_be_had() -> None:
    assert {load_task(name).kind for name in packaged_tasks()} == {
        "language_modelling", "preference", "classification", "entities", "generation", "code",
    }  # fmt: skip
    assert all("$GANYMEDE_DATA" in load_task(name).data.get for name in packaged_tasks() if not name.startswith("demo"))


def test_the_demos_own_tasks_need_nothing_and_have_no_item_of_another_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GANYMEDE_DATA", raising=False)
    for name, kind in (("demo_signatures", "signature"), ("demo_summaries", "summary")):
        task = load_task(name)
        scored, shown = load_items(task), load_items(task, "train")
        assert len(scored) > 100
        assert {item.fields["task"] for item in scored} == {kind}
        assert not {item.prompt for item in scored} & {item.prompt for item in shown}


def test_functions_are_those_that_no_other_file_has_too() -> None:
    def function(name: str, does: str) -> bytes:
        return f'def {name}(a):\n    """{does}\n\n    At length."""\n    return {name}\n\n\n'.encode()

    part = [function("f", "Does the first thing.") + function("g", "Does a second thing."), b"no Python (", b"\xff"]
    others = [
        function("g", "Does a second thing."),
        function("h", "Does the first thing."),
        function("i", "Other work."),
    ]
    found = [(record["task"], record["completion"]) for record in read_functions(part, others)]
    # The signature of `g` is asked in both; `f` is described as `h` is, but is another function.
    assert sorted(found) == [("signature", "def f(a):"), ("summary", "Does the first thing.")]
    assert len(read_functions(part, [])) == 4


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here: set GANYMEDE_DATA to their folder")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sst2", 872),
        ("wnut17", 1009),
        ("wikitext2", 60),
        ("gsm8k", 380),
        ("mbpp", 90),
        ("instructions", 98),
        ("preferences", 98),
        ("hh_helpful", 185),
    ],
)
def test_packaged_tasks_have_their_published_items_and_none_of_them_in_train(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANYMEDE_DATA", str(DATA))
    task = load_task(name)
    scored = load_items(task)
    assert len(scored) == count
    assert not {item.id for item in scored} & {item.id for item in load_items(task, "train")}


def test_absent_data_is_one_line_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        items(tmp_path, generation(tmp_path / "gone.jsonl", "jsonl", answer="{a}", data={"get": "it at example.org"}))
    assert "not there" in str(error.value)
    assert error.value.next_step == "get it at example.org"


def test_nested_json_gives_records_with_the_fields_of_what_they_lie_in(tmp_path: Path) -> None:
    questions = [
        {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann B."}, {"text": "Ann"}]},
        {"question": "When?", "answers": [{"text": "1900"}]},
    ]
    path = tmp_path / "squad.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [{"context": "Ann, 1900", "qas": questions}]}).encode()))
    found = items(
        tmp_path,
        generation(
            path, "json", data={"records": "data.qas"}, prompt="{context} {question}", answer="{answers.0.text}",
            references="answers.text",
        ),
    )  # fmt: skip
    assert [item.prompt for item in found] == ["Ann, 1900 Who?", "Ann, 1900 When?"]
    assert found[0].references == ("Ann", "Ann B.")


def test_ids_are_those_of_the_content_in_any_order_and_tell_repetitions_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "a": 1}\n{"text": "y", "a": 2}\n{"text": "x", "a": 1}\n')
    first = items(tmp_path, generation(path, "jsonl", answer="{a}"))
    path.write_text('{"a": 2, "text": "y"}\n{"text": "x", "a": 1}\n')
    second = items(tmp_path, generation(path, "jsonl", answer="{a}"))
    assert len({item.id for item in first}) == 3
    assert [item.id for item in second] == [first[1].id, first[0].id]


def test_shares_by_hash_divide_a_file_without_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(300)))
    task = generation(
        {"path": str(path), "share": [0, 0.2]}, "jsonl", answer="{text}",
        data={"train": {"path": str(path), "share": [0.2, 1]}},
    )  # fmt: skip
    scored, shown = items(tmp_path, task), items(tmp_path, task, "train")
    assert len(scored) + len(shown) == 300
    assert 30 < len(scored) < 90
    assert not {i.prompt for i in scored} & {i.prompt for i in shown}


def test_lines_of_several_files_belong_together_or_are_refused(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("one\ntwo\n")
    (tmp_path / "fr").write_text("un\ndeux\n")
    task = generation({"en": str(tmp_path / "en"), "fr": str(tmp_path / "fr")}, "lines", prompt="{fr}:", answer="{en}")
    assert [(i.prompt, i.answer) for i in items(tmp_path, task)] == [("un:", "one"), ("deux:", "two")]
    (tmp_path / "fr").write_text("un\n")
    with pytest.raises(DataError, match="do not belong together"):
        items(tmp_path, task)


def test_conll_parquet_and_text_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Ann\tB-person\nruns\tO\n\nO\tO\n")
    (sentence, _) = items(
        tmp_path, {"kind": "entities", "data": {"format": "conll", "evaluation": f"{tmp_path}/a.conll"}}
    )
    assert (sentence.prompt, sentence.fields["tags"]) == ("Ann runs", ["B-person", "O"])
    pq.write_table(pa.table({"q": ["2+2"], "options": [["3", "4"]], "right": [1]}), tmp_path / "a.parquet")
    (question,) = items(
        tmp_path,
        {
            "kind": "multiple_choice", "prompt": "{q} =", "choices": "options", "label": "right",
            "data": {"format": "parquet", "evaluation": f"{tmp_path}/a.parquet"},
        },
    )  # fmt: skip
    assert (question.choices, question.label, question.answer) == (("3", "4"), 1, "4")
    (tmp_path / "a.txt").write_text("\n= A =\nx\n= B =\ny\n")
    data = {"format": "text", "evaluation": f"{tmp_path}/a.txt", "begins": "^= .* =$"}
    documents = items(tmp_path, {"kind": "language_modelling", "data": data})
    assert [d.prompt for d in documents] == ["\n= A =\nx\n", "= B =\ny\n"]


def test_a_missing_field_and_a_wrong_choice_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("fine\tmaybe\n")
    data = {"format": "tsv", "columns": ["text", "label"], "evaluation": f"{tmp_path}/a.tsv"}
    classify = {"kind": "classification", "choices": ["no", "yes"], "label": "label", "data": data}
    with pytest.raises(DataError, match="none of its choices"):
        items(tmp_path, classify)
    classify = {"kind": "classification", "choices": ["no", "yes"], "answer": "{label}", "data": data}
    with pytest.raises(DataError, match=r"none of its choices.*'maybe'.*'no', 'yes'"):
        items(tmp_path, classify)
    with pytest.raises(DataError, match=r"no field.*'body'") as error:
        items(tmp_path, {**classify, "answer": "no", "prompt": "{body}"})
    assert error.value.allowed == "label, text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["squad_f"]}, "metrics.0"),
        ({"metrics": ["perplexity"]}, "has no metric perplexity"),
        ({"kind": "code", "metrics": ["pass@10"]}, "answering.samples is 1"),
        ({"prompt": "{"}, "prompt is no template"),
        ({"promt": "x"}, "did you mean prompt"),
        ({"choices": ["a"]}, "has no choices"),
        ({"data": {"format": "jsonl", "evaluation": {"path": "x", "by_file": "s"}}}, "goes with format functions"),
        ({"rejected": "{a}"}, "rejected is for kind preference"),
        ({"kind": "preference", "metrics": ["preferred"]}, "needs answer and rejected"),
    ],
)
def test_a_wrong_task_is_told_in_the_words_of_its_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        items(tmp_path, {**generation(tmp_path / "a.jsonl", "jsonl", answer="{a}"), **change})
    assert message in str(error.value)
    assert "--set" not in str(error.value)


def test_the_digest_of_a_task_is_that_of_its_content_and_not_of_its_place(tmp_path: Path) -> None:
    digests = []
    for place, text in (("a", "x\n"), ("b", "x\n"), ("c", "y\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "t.jsonl").write_text(f'{{"text": "{text.strip()}"}}\n')
        items(tmp_path, generation(tmp_path / place / "t.jsonl", "jsonl", answer="{text}"))
        digests.append(task_digest(load_task(str(tmp_path / "task.yaml")), "evaluation"))
    assert digests[0] == digests[1] != digests[2]


def test_a_prompt_is_instruction_examples_with_answers_and_the_item(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1", "a": "one"}\n{"text": "2", "a": "two"}\n')
    task = generation(tmp_path / "a.jsonl", "jsonl", prompt="{text} is", answer="{a}", instruction="Spell.")
    first, second = items(tmp_path, task)
    loaded = load_task(str(tmp_path / "task.yaml"))
    assert full_prompt(loaded, second, [first]) == "Spell.\n\n1 is one\n\n2 is"
    assert full_prompt(loaded.model_copy(update={"instruction": ""}), second) == "2 is"
    assert full_messages(loaded, second, [first]) == [
        {"role": "user", "content": "Spell.\n\n1 is"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2 is"},
    ]


def test_a_preference_has_the_better_answer_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Hi", "good": "Hello!", "bad": "Go away."}\n')
    data = {"format": "jsonl", "evaluation": f"{tmp_path}/a.jsonl"}
    (pair,) = items(tmp_path, {"kind": "preference", "answer": "{good}", "rejected": "{bad}", "data": data})
    assert (pair.prompt, pair.choices, pair.label, pair.answer) == ("Hi", ("Hello!", "Go away."), 0, "Hello!")
