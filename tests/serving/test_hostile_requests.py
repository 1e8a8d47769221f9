"""Whatever a client sends, the answer is an error that names what is wrong, and the endpoint goes on serving."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from serving.openai.body import MAX_DEPTH, read_request
from serving.openai.errors import ApiError, error_response
from serving.openai.reading import ClassifyRequest, EmbeddingsRequest, NerRequest, ScoreRequest
from serving.openai.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.serving.conftest import local_endpoint, make_model
from tests.serving.test_tool_calls import TAGGED, TOOLS

ROUTES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/classify": ClassifyRequest,
    "/v1/ner": NerRequest,
    "/v1/score": ScoreRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
CHAT: list[Any] = [{"role": "user", "content": "hi"}]
CALL = {"id": "a", "type": "function", "function": {"name": "go", "arguments": '{"a": 1}'}}
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "def", "max_tokens": 2, "temperature": 0.5, "top_p": 0.5, "stop": ["a"], "seed": 1, "n": 1,
        "echo": True, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"7": 1}, "logprobs": 1,
        "top_k": 3,
        "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [9],
        "user": "u", "return_sampling": True,
    },
    "/v1/chat/completions": {
        "messages": [*CHAT, {"role": "assistant", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "b"}]}],
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "go"}}, "parallel_tool_calls": False,
        "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64", "normalize": True, "truncate": True},
    "/v1/classify": {"input": ["a"], "pair": ["b"]},
    "/v1/ner": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/tokenize": {"messages": CHAT, "tools": TOOLS},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
    {"structured_outputs": {"regex": "a+"}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"structured_outputs": {"grammar": 'start: "a"'}},
]

BLNS = Path(os.environ.get("GANYMEDE_DATA", Path(__file__).parents[3] / "shared/data")) / "blns/blns.json"
NAUGHTY = [
    "", "\x00", "\ud800", "\udfff\ud800", "\ufeff", "\u202etest", "👩\u200d🚀", "ﷺ" * 50, "Ω≈ç√∫µ≤", "<|end|>",
    "<|endoftext|>", "'; DROP TABLE users; --", "{{ 7 * 7 }}", "{% raise %}", "${jndi:ldap://x}", "../../etc/passwd",
    "%s%n%x",
    "NaN",
    "(a+)+$", "(?=a)", '{"type":', "start: start", "\\", '"', "1e999", "١٢٣", "true", "null", "a" * 5000,
]  # fmt: skip
NUMBERS = [0, -1, 1 << 31, 1 << 63, 1 << 64, 10**300, -(10**300), 0.0, -0.0, 5e-324, 1.7e308, True, False, 1.5]


def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


VALUES = st.recursive(
    st.sampled_from([None, *NAUGHTY, *NUMBERS, [], {}]) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", *NAUGHTY]), inner, max_size=3),
    max_leaves=6,
) | st.sampled_from([30, MAX_DEPTH, 400]).map(deep)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in entries:
        yield (*path, name)
        yield from places(each, (*path, name))


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    name, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[name] = changed(value[name], tuple(rest), other) if rest else other
    return copy


@st.composite
def bodies(draw: st.DrawFn, route: str) -> bytes:
    """A good body in which something is another than it should be, or is not there, or is too much."""
    body: Any = {"model": "tiny", **WHOLE[route]}
    if "completions" in route:
        body |= draw(st.sampled_from([{}, *FORMATS]))
    for _ in range(draw(st.integers(1, 2))):
        where = draw(st.sampled_from(list(places(body))))
        match draw(st.integers(0, 5)):
            case 0:
                body.pop(where[0])
            case 1:
                body[draw(st.sampled_from(NAUGHTY))] = draw(VALUES)
            case _:
                body = changed(body, where, draw(VALUES))
        if len(body) < 2:
            break
    return json.dumps(body).encode()


def assert_told(body: dict[str, Any]) -> None:
    """OpenAI's error shape, with a message for people; what is wrong with a field names the field."""
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1500
    if error["code"] not in ("invalid_json", "invalid_request"):
        assert error["param"]


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=80, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_spoiled_body_is_a_request_or_an_error_that_names_the_field(route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(route))
    refusal = None
    try:
        asked: Any = read_request(ROUTES[route], body)
        if hasattr(asked, "call"):
            asked.call("id")
    except ApiError as error:
        refusal = error.refusal
    if refusal is not None:
        assert refusal.status == 400
        assert refusal.param or refusal.code == "invalid_json"
        assert_told(json.loads(error_response(refusal).body))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = make_model(tmp_path_factory.mktemp("hostile"), template=TAGGED)
    with local_endpoint(folder, max_sequences=4, body_limit_seconds=1.0) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def still_serves(client: httpx.Client) -> bool:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "def", "max_tokens": 2, "temperature": 0})
    return answer.status_code == 200 and client.get("/health").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=40, database=None, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_no_body_is_too_much_for_the_server(client: httpx.Client, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(route))
    answer = client.post(route, content=body)
    assert answer.status_code in (200, 400, 404), (answer.text, body)
    if answer.status_code == 200:
        assert b'"error"' not in answer.content, body
    else:
        assert_told(answer.json())


def test_the_server_serves_after_all_that(client: httpx.Client) -> None:
    assert still_serves(client)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"\xff\xfe\x00", None, "invalid_json"),
        (b'{"model": "tiny", "prompt": "a"} {}', None, "invalid_json"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', None, "invalid_json"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature", "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", None, "invalid_json"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 4000 + b"}", "seed", "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "n": 99999999999999999999}', "n", "invalid_value"),
        (b'{"model": "tiny", "prompt": "a\\ud800"}', "prompt", "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', "\\ud800", "invalid_value"),
        (b'{"model": "\\ud800", "prompt": "a"}', "model", "invalid_value"),
        (b'{"model": "tiny", "prompt": "a", "' + b"b" * 9999 + b'": 1}', "b" * 77 + "...", "unsupported_parameter"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt.0.0.0.0.0", "invalid_value"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 200_000, None, "invalid_json"),
    ],
)
def test_what_is_no_request_is_told_over_http(client: httpx.Client, body: bytes, param: Any, code: str) -> None:
    answer = client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert still_serves(client)


def test_an_error_quotes_little_of_a_long_name(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"model": "m" * 100_000, "prompt": "a"})
    assert answer.status_code == 404
    assert len(answer.content) < 500


def test_ten_megabytes_of_prompt_are_refused_however_they_come(client: httpx.Client) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a" * 10_000_000}).encode()
    for content in (body, iter([body[i : i + 65536] for i in range(0, len(body), 65536)])):
        answer = client.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    prompts: list[tuple[str, Any]] = [
        ("prompt", "a" * 400_000),
        ("prompt", [7] * 400_000),
        ("messages", [{"role": "user", "content": "a <|end|>" * 40_000}]),
    ]
    for field, value in prompts:
        route = "/v1/completions" if field == "prompt" else "/v1/chat/completions"
        answer = client.post(route, json={"model": "tiny", field: value})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert still_serves(client)


def test_clients_that_send_their_bodies_byte_by_byte_are_not_waited_for(url: str, client: httpx.Client) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(20)]
        for each in slow:
            each.sendall(head + b"{")
        assert still_serves(client)
        for each in slow:
            answer = http.client.HTTPResponse(each)
            answer.begin()
            assert answer.status == 408
            assert json.loads(answer.read())["error"]["code"] == "request_timeout"
    assert still_serves(client)


def test_bytes_that_are_no_http_do_not_stop_the_server(url: str, client: httpx.Client) -> None:
    host, port = url.removeprefix("http://").split(":")
    draw = random.Random(0)
    for sent in (b"\x16\x03\x01", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                 b"GET / HTTP/1.1\r\nA: " + b"a" * 200_000 + b"\r\n\r\n", draw.randbytes(2000)):  # fmt: skip
        with socket.create_connection((host, int(port)), timeout=5) as each, contextlib.suppress(OSError):
            each.sendall(sent)
            each.shutdown(socket.SHUT_WR)
            assert not each.recv(1 << 16).startswith((b"HTTP/1.1 200", b"HTTP/1.1 5"))
    assert still_serves(client)


def test_a_prompt_of_megabytes_leaves_the_others_their_turn(url: str) -> None:
    body = {"model": "tiny", "prompt": "def open(a, b): return a + b\n" * 50_000, "max_tokens": 1}

    async def main() -> tuple[list[httpx.Response], float]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            tokens = {name: value for name, value in body.items() if name != "max_tokens"}
            answers = asyncio.gather(client.post("/v1/completions", json=body), client.post("/tokenize", json=tokens))
            longest = 0.0
            while not answers.done():
                began = time.monotonic()
                assert (await client.get("/live")).status_code == 200
                longest = max(longest, time.monotonic() - began)
            return await answers, longest

    (refused, tokenized), longest = asyncio.run(main())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert tokenized.json()["count"] > 50_000
    assert longest < 2


def test_a_field_without_a_name_is_named_all_the_same() -> None:
    with pytest.raises(ApiError) as refused:
        read_request(CompletionRequest, b'{"model": "m", "prompt": "p", "": "\\ud800"}')
    assert refused.value.refusal.param == '""'


@pytest.mark.skipif(not BLNS.is_file(), reason=f"no data at {BLNS}")
def test_naughty_strings_come_back_as_they_were_sent(client: httpx.Client) -> None:
    strings = [text for text in json.loads(BLNS.read_text()) if text]
    for first in range(0, len(strings), 64):
        some = strings[first : first + 64]
        body = {"model": "tiny", "prompt": some, "echo": True, "max_tokens": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert [choice["text"] for choice in answer.json()["choices"]] == some
    for text in strings[::5]:
        said = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1, "user": text}
        assert client.post("/v1/chat/completions", json=said).status_code == 200
        ids = client.post("/tokenize", json={"model": "tiny", "prompt": text}).json()["tokens"]
        assert client.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": text}
    assert still_serves(client)
