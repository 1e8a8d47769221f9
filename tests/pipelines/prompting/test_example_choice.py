"""Templates, and the examples that stand in prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from actors.text import Text
from configs.errors import ConfigError, DataError, RequestError
from configs.load import load_task, load_template, packaged_templates
from configs.prompts import Example, render_completion, render_messages
from configs.schema.prompting import ExampleSelection, PromptTemplate
from pipelines.evaluation.items import Item
from pipelines.prompting.encoding import open_encoder
from pipelines.prompting.examples import Chooser, Pool, fit_prompt
from tests.actors.engine.conftest import MakeEncoder

TEMPLATE = PromptTemplate(
    name="t", system="You read.", instruction="Which {{class}}?", prompt="Text: {text}\nClass:", words={"b": "bad"}
)
GOOD, BAD = Example("1", {"text": "fine {x}"}, "a"), Example("2", {"text": "poor"}, "b")


def item(number: int, text: str, label: int | None = None) -> Item:
    choices = () if label is None else ("a", "b", "c")
    answer = str(number) if label is None else choices[label]
    return Item(f"id{number}", {"text": text}, f"Text: {text}", choices, label, (answer,))


POOL = Pool(tuple(item(n, f"word{n} common", n % 3 if n < 9 else 0) for n in range(30)), 0)


def test_a_completion_shows_examples_as_the_item_is_shown() -> None:
    assert render_completion(TEMPLATE, {"text": "so {so}"}, [GOOD, BAD]) == (
        "You read.\n\nWhich {class}?\n\nText: fine {x}\nClass: a\n\nText: poor\nClass: bad\n\nText: so {so}\nClass:"
    )


def test_a_chat_has_a_turn_for_each_example() -> None:
    messages = render_messages(TEMPLATE, {"text": "so"}, [BAD])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in messages] == [
        "You read.", "Which {class}?\n\nText: poor\nClass:", "bad", "Text: so\nClass:",
    ]  # fmt: skip
    assert render_messages(TEMPLATE, {"text": "so"})[1]["content"].startswith("Which")


def test_a_templates_version_is_its_content() -> None:
    assert TEMPLATE.model_copy(update={"name": "other", "description": "x"}).digest == TEMPLATE.digest
    for change in ({"separator": "\n"}, {"words": {}}, {"system": ""}, {"delimiter": ""}):
        assert TEMPLATE.model_copy(update=change).digest != TEMPLATE.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt: no field", "the template: prompt has no field"),
        ('prompt: "{text} {answer}"', "give the answer away"),
        ('prompt: "{text"', "prompt is no template"),
        ('{prompt: "{text}", instruction: "of {text}"}', "has no fields"),
        ('{prompt: "{text}", words: {a: x, b: x}}', "calls two choices the same"),
        ('{promt: "{text}"}', "did you mean prompt?"),
    ],
)
def test_a_template_that_cannot_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_template(str(tmp_path / "mine.yaml"))


def test_packaged_templates_fit_the_packaged_task() -> None:
    task = load_task("sst2")
    assert packaged_templates() == ["sentiment-great", "sentiment-question"]
    for name in packaged_templates():
        template = load_template(name)
        assert template.name == name
        assert set(template.words) <= set(task.choices)
        assert render_completion(template, {"text": "dull"}).count("dull") == 1
    own = PromptTemplate.of_task("task", task)
    assert render_completion(own, {"text": "dull"}) == "Review: dull\nSentiment:"


def test_a_record_without_a_field_is_named() -> None:
    with pytest.raises(DataError, match="lacks the field text"):
        render_completion(TEMPLATE, {"label": "a"})


def test_nothing_that_is_scored_is_shown_whatever_its_case_and_spaces() -> None:
    train = [item(1, "A  Film"), item(2, "another"), item(3, "ANOTHER"), item(4, "ﬁne")]
    pool = Pool.of(train, [item(9, "a film"), item(8, "fine")])
    assert [one.id for one in pool.items] == ["id2"]
    assert pool.left_out == 3
    with pytest.raises(DataError, match="no example that is not scored"):
        Pool.of(train[:1], [item(9, "a film")])


def test_examples_drawn_once_depend_on_the_seed_alone_and_grow() -> None:
    def drawn(count: int, **selection: object) -> list[str]:
        return [e.id for e in Chooser(ExampleSelection(**selection), POOL).choose(item(99, "any"), count)]

    assert drawn(3, strategy="fixed") == ["id0", "id1", "id2"]
    for strategy in ("random", "balanced"):
        assert drawn(5, strategy=strategy) == drawn(5, strategy=strategy)[:5]
        assert drawn(8, strategy=strategy)[:5] == drawn(5, strategy=strategy)
        assert drawn(5, strategy=strategy, seed=1) != drawn(5, strategy=strategy)
        assert len(drawn(100, strategy=strategy)) == 30


def test_balanced_examples_have_every_class_as_often() -> None:
    chosen = Chooser(ExampleSelection(strategy="balanced"), POOL).choose(item(99, "any"), 9)
    assert Counter(e.answer for e in chosen) == {"a": 3, "b": 3, "c": 3}
    assert [e.answer for e in chosen] != ["a", "b", "c"] * 3
    with pytest.raises(ConfigError, match="needs classes"):
        Chooser(ExampleSelection(strategy="balanced"), Pool((item(1, "x"),), 0))


def test_bm25_puts_the_nearest_last() -> None:
    chooser = Chooser(ExampleSelection(strategy="bm25"), POOL)
    chosen = chooser.choose(item(99, "WORD7 and word4 word7"), 3)
    assert [e.id for e in chosen[1:]] == ["id4", "id7"]
    assert chooser.choose(item(98, "?"), 2) == chooser.choose(item(97, "!"), 2)


def test_an_encoder_finds_the_example_that_is_the_text(make_encoder: MakeEncoder) -> None:
    embed = open_encoder(make_encoder("bert"))
    assert np.allclose(np.linalg.norm(embed(["one", "two words"]), axis=1), 1, atol=1e-5)
    pool = Pool(tuple(item(n, text) for n, text in enumerate(["the obj", "a str", "is int", "dumps it"])), 0)
    chooser = Chooser(ExampleSelection(strategy="embedding", encoder="."), pool, embed)
    assert chooser.choose(item(99, "is int"), 2)[-1].id == "id2"


@pytest.mark.parametrize("chat", [False, True])
def test_examples_are_dropped_whole_from_the_far_end_and_the_item_is_never_cut(
    tokenizer_folder: Path, chat: bool
) -> None:
    text = Text.load(tokenizer_folder)
    examples = [Example(str(n), {"text": f"example number {n}"}, "a") for n in range(4)]

    def fitted(room: int):
        return fit_prompt(text, TEMPLATE, item(9, "asked"), examples, chat=chat, room=room)

    whole = fitted(10_000)
    assert len(whole.examples) == whole.asked == 4
    less = fitted(len(whole.token_ids) - 1)
    assert [e.id for e in less.examples] == ["1", "2", "3"]
    none = fitted(len(whole.token_ids) // 3)
    assert none.examples == ()
    assert "Text: asked\nClass:" in text.decode(none.token_ids)
    with pytest.raises(RequestError, match="without any example"):
        fitted(5)
