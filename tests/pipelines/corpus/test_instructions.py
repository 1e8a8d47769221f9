import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema.corpus import InstructionsConfig, SourceConfig, SplitConfig
from pipelines.corpus.instructions import Pair, deduplicate, parse_pairs
from pipelines.corpus.sources import is_validation, list_source
from pipelines.stage import StageContext
from pipelines.stages.instructions import InstructionsStage

CONFIG = InstructionsConfig(source=SourceConfig(path="."))
SOURCE = '''
class Stack:
\x0c
    def push(self, item: int, *rest, limit=None) -> None:
        """Put an item on top.

        More text.
        """
        # the only comment
        self.items.append(item)

    if True:
        async def clear(self):
            "Take every item away."
            self.items.clear()

    def pop(self):
        """Pop."""
        return self.items.pop()

def only_docs(a, /, b, *, c):
    """Say something about nothing."""

def one_line(): """Return nothing at all."""; return
'''


def _pairs(text: str, config: InstructionsConfig = CONFIG) -> dict[tuple[str, str], Pair]:
    pairs = parse_pairs("stack.py", text, config)
    assert isinstance(pairs, list)
    return {(p.task, p.source.split(":")[1]): p for p in pairs}


def test_summary_shows_the_function_without_its_docstring() -> None:
    pair = _pairs(SOURCE)["summary", "Stack.push"]
    assert pair.prompt == (
        "Summarize this function.\n\n"
        "def push(self, item: int, *rest, limit=None) -> None:\n"
        "    # the only comment\n"
        "    self.items.append(item)"
    )
    assert pair.completion == "Put an item on top."
    assert pair.source == "stack.py:Stack.push"


def test_signature_gives_name_and_docstring_and_wants_the_def_line() -> None:
    pairs = _pairs(SOURCE)
    assert pairs["signature", "Stack.push"].prompt == "Put an item on top.\nWrite the signature of push"
    assert pairs["signature", "Stack.push"].completion == "def push(self, item, *rest, limit=None):"
    assert pairs["signature", "Stack.clear"].completion == "async def clear(self):"
    assert pairs["signature", "only_docs"].completion == "def only_docs(a, /, b, *, c):"


def test_functions_that_teach_nothing_are_left_out() -> None:
    keys = set(_pairs(SOURCE))
    assert ("summary", "Stack.pop") not in keys
    assert ("signature", "Stack.pop") not in keys
    assert ("summary", "only_docs") not in keys
    assert ("summary", "one_line") not in keys


def test_long_prompts_and_completions_are_left_out() -> None:
    short = InstructionsConfig(source=CONFIG.source, max_prompt_chars=80, max_completion_chars=25)
    assert set(_pairs(SOURCE, short)) == {
        ("summary", "Stack.clear"), ("signature", "Stack.clear"), ("signature", "one_line"),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["def f(:\n", "\x00", "(" * 500, "print 'two'"])
def test_source_that_does_not_parse_gives_the_reason(text: str) -> None:
    assert isinstance(parse_pairs("bad.py", text, CONFIG), str)


def test_duplicates_are_dropped_within_and_between_groups() -> None:
    pairs = list(_pairs(SOURCE).values())
    seen: set[tuple[str, str]] = set()
    once = deduplicate([*pairs, *reversed(pairs)], seen)
    assert sorted(p.id for p in pairs) == [p.id for p in once]
    assert deduplicate(pairs, seen) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_held_out_pairs_come_from_validation_files_alone(
    source_folder: Path, make_context: Callable[[str], StageContext]
) -> None:
    config = InstructionsConfig(
        source=SourceConfig(path=str(source_folder)), split=SplitConfig(validation_fraction=0.2)
    )
    context = make_context("pairs")
    summary = InstructionsStage().run(config, {}, context)
    files = {f.name: is_validation(f.blake3, config.split) for f in list_source(config.source).files}
    prompts = {}
    for name, validation in (("train", False), ("heldout", True)):
        pairs = [Pair.model_validate_json(line) for line in (context.out / f"{name}.jsonl").read_text().splitlines()]
        assert {files[p.source.split(":")[0]] for p in pairs} == {validation}
        assert [p.id for p in pairs] == sorted(p.id for p in pairs)
        assert sum(summary["pairs"][name].values()) == len(pairs)
        prompts[name] = {p.prompt for p in pairs}
    assert not prompts["train"] & prompts["heldout"]
    assert json.loads((context.out / "report.json").read_bytes())["pairs"] == summary["pairs"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_source_without_documented_functions_is_an_error(
    tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(DataError, match=r"train\.jsonl would hold no pair"):
        InstructionsStage().run(
            InstructionsConfig(source=SourceConfig(path=str(tmp_path / "a.py"))), {}, make_context("none")
        )
