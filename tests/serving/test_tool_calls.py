"""Tools: which answers a model may give, how calls are found in them, and the `openai` client over a real model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.chat_template import ChatTemplate
from actors.engine.structured import Structures
from actors.text import Text
from actors.tools import BareCall, CallReader, Convention, ListedCalls, TaggedCalls, ToolUse, read_calls
from configs.schema.generation import Structure
from serving.calls import Piece
from serving.openai.body import read_request
from serving.openai.errors import ApiError
from serving.openai.messages import functions
from serving.openai.schema import ChatRequest
from serving.openai.stream import ChatAnswer
from tests.serving.conftest import local_endpoint, make_model

START = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
OFFER = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
TAGGED = (
    f"{OFFER}{START}{{% for c in m.tool_calls or [] %}}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    f"\n</tool_call>{{% endfor %}}{END}"
)
LISTED = (
    f"{OFFER}{START}{{% if m.tool_calls %}}[TOOL_CALLS] [{{% for c in m.tool_calls %}}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    f"{{% if not loop.last %}}, {{% endif %}}{{% endfor %}}]{{% endif %}}{END}"
)
BARE = (
    f"{OFFER}{START}{{% for c in m.tool_calls or [] %}}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    f"{{% endfor %}}{END}"
)
FUNCTIONS_XML = (
    f"{OFFER}{START}{{% for c in m.tool_calls or [] %}}<function={{{{ c.function.name }}}}>{{% endfor %}}{END}"
)
TEMPLATES = {"tagged": TAGGED, "listed": LISTED, "bare": BARE}
KINDS: dict[str, type[Convention]] = {"tagged": TaggedCalls, "listed": ListedCalls, "bare": BareCall}

PLACE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "depth": {"$ref": "#/$defs/depth"}},
    "required": ["name", "depth"],
    "additionalProperties": False,
    "$defs": {"depth": {"enum": [1, 2, None]}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "go_to", "description": "<|end|>", "parameters": PLACE, "strict": True}},
    {"type": "function", "function": {"name": "go", "parameters": NOTHING}},
]
SCHEMAS = {"go_to": PLACE, "go": NOTHING}
CHAT: list[Any] = [{"role": "user", "content": "open the path"}]


def convention(kind: str) -> Convention:
    found = ChatTemplate(TEMPLATES[kind], {}).convention
    assert found is not None
    return found


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_says_itself_how_calls_are_written(kind: str) -> None:
    assert type(convention(kind)) is KINDS[kind]
    spaced = TEMPLATES[kind].replace('"name": ', '"name":').replace("<tool_call>\n", "<tool_call>")
    found = ChatTemplate(spaced, {}).convention
    assert found is not None
    assert found.opening == convention(kind).opening.replace('"name": ', '"name":').replace(
        "<tool_call>\n", "<tool_call>"
    )


@pytest.mark.parametrize("template", [START + END, FUNCTIONS_XML, TAGGED.removeprefix(OFFER), "{{ messages[9].x.y }}"])
def test_a_template_that_takes_no_tools_or_writes_them_otherwise_has_no_convention(template: str) -> None:
    assert ChatTemplate(template, {}).convention is None


NAUGHTY = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "go', '"', "\\", "}", "{", "}]", "\u202e", "👩\u200d🚀",
     " ", "\n", '", "arguments": ', "]", "\x00", "ﷺ", "<|end|>"]
)  # fmt: skip
TEXTS = st.lists(NAUGHTY | st.text(max_size=4), max_size=5).map("".join)
ARGUMENTS = st.dictionaries(TEXTS, TEXTS | st.integers() | st.lists(TEXTS | st.none(), max_size=2), max_size=3)
CALLS = st.tuples(st.sampled_from(["go", "go_to", "gone", "g"]), ARGUMENTS)


def written(form: Convention, name: str, arguments: Any) -> str:
    spelt = json.dumps(arguments, ensure_ascii=False)
    return f"{form.opening}{name}{form.middle}{spelt}{form.closing}"


def listed(form: Convention, calls: list[tuple[str, Any]]) -> str:
    if form.next_call is None or not calls:
        return "\n".join(written(form, *call) for call in calls)
    body = form.next_call.join(f"{name}{form.middle}{json.dumps(arguments)}" for name, arguments in calls)
    return f"{form.opening}{body}{form.closing}"


@st.composite
def answers(draw: st.DrawFn, kind: str) -> str:
    """Texts with calls before, between, after and within each other, some of them cut off."""
    form = convention(kind)
    parts = draw(st.lists(TEXTS | st.lists(CALLS, max_size=2).map(lambda calls: listed(form, calls)), max_size=5))
    text = "".join(parts)
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


def streamed(form: Convention, pieces: list[str]) -> tuple[Any, Any]:
    """What a client puts together from a stream's events, and its last finish reason."""
    answer = ChatAnswer("id", 0, "m", "fp", functions=("go", "go_to"))
    content, calls, reasons = "", {}, []
    for number, text in enumerate(pieces):
        reason = "stop" if number == len(pieces) - 1 else None
        piece = Piece(0, text, 1, number, finish_reason=reason, convention=form)  # type: ignore[arg-type]
        for chunk in answer.chunks([piece], include_usage=False):
            (choice,) = chunk["choices"]
            delta = choice["delta"]
            reasons.append(choice["finish_reason"])
            assert delta or reasons[-1]
            content += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if call["index"] not in calls:
                    calls[call["index"]] = {"id": call["id"], "type": call["type"], "function": call["function"]}
                    continue
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert list(calls) == list(range(len(calls)))
    assert not any(reasons[:-1])
    return {"content": content, "calls": list(calls.values())}, reasons[-1]


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=50, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_streamed_answer_is_the_whole_one_wherever_it_is_cut(kind: str, data: st.DataObject) -> None:
    text = data.draw(answers(kind))
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=12))})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]
    form = convention(kind)
    piece = Piece(0, text, 1, 1, finish_reason="stop", convention=form)
    (whole,) = ChatAnswer("id", 0, "m", "fp", functions=("go", "go_to")).whole([piece])["choices"]
    message = whole["message"]
    expected = {"content": message["content"] or "", "calls": message.get("tool_calls", [])}
    assert streamed(form, pieces) == (expected, whole["finish_reason"])
    assert streamed(form, list(text) or [""]) == (expected, whole["finish_reason"])
    assert (whole["finish_reason"] == "tool_calls") == bool(expected["calls"])


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=30, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(st.tuples(st.sampled_from(["go", "go_to"]), ARGUMENTS), min_size=1, max_size=3))
def test_calls_are_found_with_the_very_arguments_they_have(kind: str, calls: list[tuple[str, Any]]) -> None:
    form = convention(kind)
    calls = calls[:1] if kind == "bare" else calls
    content, found = read_calls(form, ["go", "go_to"], listed(form, calls))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_text_around_calls_is_kept_and_the_spaces_between_are_not() -> None:
    form = convention("tagged")
    text = f" Well,\n\n{written(form, 'go', {})}\n{written(form, 'go_to', {'a': 1})}\n then "
    assert read_calls(form, ["go", "go_to"], text) == (" Well,then ", [("go", "{}"), ("go_to", '{"a": 1}')])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_no_call_of_an_offered_function_is_text(kind: str) -> None:
    form = convention(kind)
    for text in (
        written(form, "gone", {}),
        form.opening,
        form.opening + "go" + form.middle + "3",
        '{"name": "Bob"}',
        " ",
    ):
        assert read_calls(form, ["go", "go_to"], text) == (text, [])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_call_that_is_cut_off_has_the_arguments_that_there_are(kind: str) -> None:
    form = convention(kind)
    text = written(form, "go_to", {"name": "a}"})
    cut = text[: text.index("a}") + 2]
    assert read_calls(form, ["go_to"], cut) == ("", [("go_to", '{"name": "a}')])


def test_an_answer_that_is_cut_off_in_a_call_ends_for_its_length() -> None:
    form = convention("tagged")
    piece = Piece(0, form.opening + "go" + form.middle + "{", 1, 1, finish_reason="length", convention=form)
    (choice,) = ChatAnswer("id", 0, "m", "fp", functions=("go",)).whole([piece])["choices"]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("length", 1)


def test_reading_takes_time_in_proportion_to_the_text() -> None:
    form = convention("tagged")
    reader = CallReader(form, ["go"])
    assert reader.push(form.opening * 20_000).content == form.opening * 19_999


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"model": "m", "messages": CHAT, "tools": TOOLS, **fields}).encode())


CALL = {"id": "a", "type": "function", "function": {"name": "go", "arguments": "{}"}}


def called(**function: Any) -> list[Any]:
    return [{"role": "assistant", "tool_calls": [CALL | {"function": CALL["function"] | function}]}]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "tools.0.function.x"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"tools": None, "parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tool_choice": "required", "min_tokens": 1}, "min_tokens"),
        ({"messages": called(arguments="{")}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": called(arguments="[1]")}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": called(arguments='{"a": "\\ud800"}')}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": called(arguments={})}, "messages.0.tool_calls.0.function.arguments"),
        ({"messages": called(name="")}, "messages.0.tool_calls.0.function.name"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "b"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "b"}]}, "messages.0.tool_call_id"),
    ],
)
def test_what_is_wrong_with_tools_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**fields)
    assert (raised.value.refusal.status, raised.value.refusal.param) == (400, param)


def test_no_choice_means_that_tools_are_left_out() -> None:
    call = chat(tool_choice="none", response_format={"type": "json_object"}).call("id")
    assert call.tool_use is None
    assert call.prompts == chat(tools=None).call("id").prompts


def follows(matcher: Any, text: Text, said: str, special: int | None = None) -> bool:
    """Whether an answer may begin so: text, then, if there is one, the special token, then what follows it."""
    before, mark, after = said.partition("[TOOL_CALLS]") if special is not None else (said, "", "")
    for token in [*text.encode(before), *([special] if mark else []), *text.encode(after)]:
        if not matcher.masks([matcher])[0][token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
    return True


@pytest.mark.parametrize("kind", [*TEMPLATES, "special"])
def test_an_answer_is_text_or_calls_that_fit(kind: str, model_folder: Path, tmp_path: Path) -> None:
    special = 5 if kind == "special" else None
    folder = model_folder if special is None else make_model(tmp_path, special=("[TOOL_CALLS]",))
    text = Text.load(folder)
    form = convention("listed" if kind == "special" else kind)
    structures = Structures(text)
    go_to, go = written(form, "go_to", {"name": "é", "depth": 2}), written(form, "go", {})
    lead = "" if kind == "bare" else "Well, "

    def may(said: str, **use: Any) -> bool:
        offered = ToolUse(functions(chat().tools or ()), **use)
        matcher = structures.matcher(Structure(grammar=form.grammar(offered, special)))
        return follows(matcher, text, said, special)

    both = f"{go_to}\n{go}" if kind == "tagged" else listed(form, [("go_to", {"name": "e", "depth": 2}), ("go", {})])
    several = kind != "bare"
    for said, free, required in (
        ("Well <tool [TOOL {", True, False),
        (lead + go_to, True, not lead),
        (go_to, True, True),
        (go, True, True),
        (both, several, several),
        (written(form, "go_to", {"name": "e"}), False, False),
        (written(form, "go_to", {"name": "e", "depth": 3}), False, False),
        (written(form, "go", {"x": 1}), False, False),
        (written(form, "gone", {}), kind == "bare", False),
    ):
        assert (may(said), may(said, required=True)) == (free, required), said
    assert not may(both, parallel=False)
    assert not may(both, parallel=False, required=True)
    assert may(go, parallel=False)


@pytest.fixture(
    scope="module",
    params=["tagged", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TEMPLATES if kind != "tagged")],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def url(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    special = ("[TOOL_CALLS]",) if kind == "listed" else ()
    folder = make_model(tmp_path_factory.mktemp("tools"), template=TEMPLATES[kind], special=special)
    with local_endpoint(folder, max_sequences=4) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": CHAT, "tools": TOOLS, "max_tokens": 300, "temperature": 1.3, **fields}
    return client.chat.completions.create(**given)


def valid(calls: Any) -> bool:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return bool(calls)


def test_a_required_call_fits_its_function_whatever_the_weights(client: openai.OpenAI) -> None:
    for seed in range(4):
        (choice,) = ask(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert valid(choice.message.tool_calls)
        assert len(choice.message.tool_calls) == 1


def test_a_named_function_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    for name in ("go", "go_to"):
        choice_of_tool = {"type": "function", "function": {"name": name}}
        (choice,) = ask(client, tool_choice=choice_of_tool, parallel_tool_calls=False, seed=1).choices
        assert valid(choice.message.tool_calls)
        assert [call.function.name for call in choice.message.tool_calls] == [name]


def test_a_stream_puts_together_the_same_calls(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "seed": 1, "max_tokens": 120, "n": 2, "stop": ["xy"]}
    whole = ask(client, **fields).choices
    found: dict[int, list[list[str]]] = {0: [], 1: []}
    reasons = {}
    for (choice,) in (chunk.choices for chunk in ask(client, **fields, stream=True)):
        reasons[choice.index] = choice.finish_reason
        for call in choice.delta.tool_calls or []:
            if call.index == len(found[choice.index]):
                found[choice.index].append([call.function.name, ""])
            found[choice.index][call.index][1] += call.function.arguments
    for choice in whole:
        assert found[choice.index] == [[c.function.name, c.function.arguments] for c in choice.message.tool_calls]
        assert reasons[choice.index] == choice.finish_reason


def test_the_clients_own_parser_takes_the_stream(client: openai.OpenAI) -> None:
    given = {"model": "tiny", "messages": CHAT, "tools": TOOLS[:1], "tool_choice": "required", "seed": 2}
    with client.chat.completions.stream(**given, parallel_tool_calls=False) as events:
        (choice,) = events.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    jsonschema.validate(choice.message.tool_calls[0].function.parsed_arguments, PLACE)


def test_an_answer_with_its_calls_and_their_results_is_continued(client: openai.OpenAI, kind: str) -> None:
    message = ask(client, tool_choice="required", parallel_tool_calls=False, seed=1).choices[0].message
    (call,) = message.tool_calls
    assert call.id.isalnum()
    assert len(call.id) == 9
    messages = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "done <|end|>"}]
    (choice,) = ask(client, messages=messages, tool_choice="none", max_tokens=5).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None


def test_left_the_choice_a_model_may_write_or_call(client: openai.OpenAI, kind: str) -> None:
    (choice,) = ask(client, seed=1, max_tokens=20).choices
    assert choice.message.content
    if kind == "listed":  # the mark is a special token, which the bias makes the likeliest
        (choice,) = ask(client, seed=1, logit_bias={"5": 100}, parallel_tool_calls=False).choices
        assert choice.finish_reason == "tool_calls"
        assert valid(choice.message.tool_calls)


def test_a_schema_that_no_answer_can_be_held_to_is_refused_by_name(client: openai.OpenAI) -> None:
    function = {"name": "go", "parameters": {"type": "object", "properties": {"a": {"type": "spaceship"}}}}
    with pytest.raises(openai.BadRequestError, match="spaceship") as caught:
        ask(client, tools=[{"type": "function", "function": function}])
    assert caught.value.param == "tools"


def test_tools_are_rendered_and_cannot_forge_special_tokens(url: str) -> None:
    with httpx.Client(base_url=url) as http:
        asked = {"model": "tiny", "messages": CHAT}
        without = http.post("/tokenize", json=asked).json()["tokens"]
        tokens = http.post("/tokenize", json={**asked, "tools": TOOLS}).json()["tokens"]
    assert tokens[-len(without) :] == without
    assert [token for token in tokens if token < 5] == [1, 4, 2, 4, 3]


def test_a_model_whose_template_takes_no_tools_says_so(model_folder: Path) -> None:
    with local_endpoint(model_folder) as url, httpx.Client(base_url=url) as http:
        asked = {"model": "tiny", "messages": CHAT, "max_tokens": 2}
        refused = http.post("/v1/chat/completions", json={**asked, "tools": TOOLS})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
        assert "leave tools and calls out" in refused.json()["error"]["message"]
        refused = http.post("/v1/chat/completions", json={**asked, "messages": called()})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert (
            http.post("/v1/chat/completions", json={**asked, "tools": TOOLS, "tool_choice": "none"}).status_code == 200
        )
