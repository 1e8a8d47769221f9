"""Streams that are cut and go on from the last event that came, by its id alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.serving.conftest import local_endpoint, make_model
from tests.serving.test_tool_calls import TEMPLATES, TOOLS

CHAT: list[Any] = [{"role": "user", "content": "open the path"}]
TOKENS = 40
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "def open", "temperature": 0},
    "unseeded": {"prompt": "def open", "min_tokens": TOKENS},
    "several": {"prompt": ["def", "the path"], "n": 2, "seed": 3, "stream_options": {"include_usage": True}},
    "scored": {"prompt": "def", "echo": True, "logprobs": 2, "seed": 1},
    "stopped": {"prompt": "def", "stop": ["pa", "e"], "min_tokens": 9, "n": 3, "seed": 2, "presence_penalty": 1},
    "structured": {"prompt": "def", "structured_outputs": {"regex": "[a-fäö🦉]{30}"}, "return_sampling": True},
    "nothing": {"prompt": "def", "max_tokens": 0},
    "chat": {"messages": CHAT, "return_timing": True},
    "calls": {"messages": CHAT, "tools": TOOLS, "tool_choice": "required", "n": 2, "temperature": 1.3},
}


@dataclass(frozen=True)
class Event:
    """Of a stream; without an id if it has none."""

    id: str | None
    data: str


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = make_model(tmp_path_factory.mktemp("model"), template=TEMPLATES["tagged"])
    with local_endpoint(folder, max_sequences=4) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def post(http: httpx.Client, fields: dict[str, Any], last: str | None = None) -> httpx.Response:
    body = {"model": "tiny", "max_tokens": TOKENS, "stream": True, **fields}
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    return http.post(path, json=body, headers={} if last is None else {"Last-Event-ID": last})


def events(http: httpx.Client, fields: dict[str, Any], last: str | None = None) -> list[Event]:
    answer = post(http, fields, last)
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append(Event(lines.get("id"), lines["data"]))
    assert found.pop().data == "[DONE]"
    return found


def said(stream: list[Event]) -> dict[str, Any]:
    """All that a stream says, whatever pieces it came in: strings and lists are joined, the rest is what came last."""
    told: dict[str, Any] = {}

    def take(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                take(f"{path}.{name}", inner)
        elif isinstance(value, list) and path.endswith(".tool_calls"):
            for call in value:
                take(f"{path}.{call['index']}", call)
        elif isinstance(value, str | list) and path.rpartition(".")[2] in LISTED:
            told[path] = told.get(path, type(value)()) + value
        elif value is not None:
            told[path] = value

    for event in stream:
        chunk = json.loads(event.data)
        chunk.pop("timing_ms", None)
        for choice in chunk.pop("choices"):
            take(f"choice {choice['index']}", choice)
        take("chunk", chunk)
    return told


LISTED = ("text", "content", "arguments", "tokens", "token_logprobs", "top_logprobs", "text_offset")


def rounded(value: Any) -> Any:
    """Log-probabilities that were computed in other company differ in their last bits."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return {name: rounded(each) for name, each in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stream_goes_on_after_any_event_with_what_had_come(http: httpx.Client, name: str) -> None:
    fields = REQUESTS[name]
    whole = events(http, fields)
    places = [place for place, event in enumerate(whole) if event.id is not None]
    assert places
    for place in {places[0], places[len(places) // 3], places[-2 if len(places) > 1 else 0], places[-1]}:
        rest = events(http, fields, whole[place].id)
        assert rounded(said(whole[: place + 1] + rest)) == rounded(said(whole))
    assert rest == [] or rest[-1].id is None or places[-1] != place


def test_a_stream_that_goes_on_can_be_cut_again(http: httpx.Client) -> None:
    fields = REQUESTS["unseeded"]
    whole = events(http, fields)
    second = events(http, fields, whole[0].id)
    third = events(http, fields, second[0].id) if second else []
    assert said(whole[:1] + second[:1] + third) == said(whole)


def test_the_same_request_may_be_written_in_another_way(http: httpx.Client) -> None:
    whole = events(http, REQUESTS["greedy"])
    written = {"temperature": 0.0, "prompt": ["def open"], "top_p": 1, "stop": None}
    assert said(whole[:1] + events(http, written, whole[0].id)) == said(whole)


@pytest.mark.parametrize(
    ("fields", "change", "status", "code"),
    [
        ({"prompt": "def close"}, None, 400, "request_mismatch"),
        ({"seed": 1}, None, 400, "request_mismatch"),
        ({"messages": CHAT, "prompt": None}, None, 400, "request_mismatch"),
        ({"stream": False}, None, 400, "invalid_value"),
        ({}, ("fp_ab", "fp_ba"), 410, "model_replaced"),
        ({}, ("cmpl-", "cmpl"), 400, "invalid_value"),
        ({}, ("cmpl-", "chatcmpl-"), 410, "not_repeatable"),
        ({}, None, 200, None),
    ],
)
def test_an_event_of_anything_else_is_refused(
    http: httpx.Client, fields: dict[str, Any], change: tuple[str, str] | None, status: int, code: str | None
) -> None:
    asked = REQUESTS["unseeded"]
    last = events(http, asked)[0].id
    assert last is not None
    fields = {name: value for name, value in {**asked, **fields}.items() if value is not None}
    answer = post(http, fields, last.replace(*change) if change else last)
    assert answer.status_code == status
    if code is not None:
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, "Last-Event-ID")
        assert "Last-Event-ID" in error["message"]


@pytest.mark.parametrize("steps", ["7", "1-1", "999999999", "0"])
def test_a_place_that_the_stream_never_had_is_refused(http: httpx.Client, steps: str) -> None:
    frame, _, written = str(events(http, REQUESTS["greedy"])[-1].id).rsplit(".", 2)
    answer = post(http, REQUESTS["greedy"], f"{frame}.{steps}.{written}")
    assert answer.status_code in (400, 410)


@pytest.mark.parametrize("last", ["", "7", "x" * 5000, "cmpl-" + "0" * 32, "a.b.c.d.e.f"])
def test_what_is_no_id_of_an_event_is_refused(http: httpx.Client, last: str) -> None:
    answer = post(http, REQUESTS["greedy"], last)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert len(answer.text) < 500


def test_the_openai_client_goes_on_too(http: httpx.Client) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, **REQUESTS["greedy"]}
    whole = events(http, REQUESTS["greedy"])

    async def rest(last: str | None) -> str:
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0) as client:
            headers = {} if last is None else {"Last-Event-ID": last}
            stream = await client.completions.create(**fields, stream=True, extra_headers=headers)
            return "".join([chunk.choices[0].text async for chunk in stream])

    text = asyncio.run(rest(None))
    had = json.loads(whole[0].data)["choices"][0]["text"]
    assert had + asyncio.run(rest(whole[0].id)) == text
