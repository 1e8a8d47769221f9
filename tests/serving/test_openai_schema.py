import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.calls import Message, Piece
from serving.openai.schema import ApiError, ChatRequest, CompletionRequest, error_body, read_request
from serving.openai.stream import ChatAnswer, CompletionAnswer


def completion(**fields: Any) -> CompletionRequest:
    return read_request(CompletionRequest, json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return read_request(ChatRequest, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([5, 6], ((5, 6),)),
        ([[5], [6, 7]], ((5,), (6, 7))),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).call("id").prompts == prompts


def test_defaults_are_those_of_openai() -> None:
    call = completion().call("id")
    assert (call.max_new_tokens, call.temperature, call.top_p, call.stop, call.seed) == (16, 1.0, 1.0, (), None)
    assert chat().call("id").max_new_tokens is None


def test_null_stands_for_the_default() -> None:
    fields = dict.fromkeys(("max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream", "stream_options"))
    assert completion(**fields) == completion()


def test_a_stop_may_be_one_string_or_several() -> None:
    assert completion(stop="x").stop == ("x",)
    assert completion(stop=["x", "y"]).stop == ("x", "y")


def test_both_names_of_the_token_limit_are_understood() -> None:
    assert chat(max_tokens=3).call("id").max_new_tokens == 3
    assert chat(max_completion_tokens=4).call("id").max_new_tokens == 4


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).call("id").messages == (Message("user", "ab"),)


def test_a_negative_seed_is_a_seed() -> None:
    seed = completion(seed=-1).call("id").seed
    assert seed is not None
    assert 0 <= seed < 1 << 63


@pytest.mark.parametrize("field", ["logprobs", "echo", "best_of", "suffix", "logit_bias", "presence_penalty", "top_k"])
def test_a_field_that_is_not_honoured_is_refused_by_name(field: str) -> None:
    with pytest.raises(ApiError) as raised:
        completion(**{field: 1})
    error = error_body(raised.value.refusal)["error"]
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": 3}, "model"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        completion(**fields)
    assert raised.value.refusal.status == 400
    assert raised.value.refusal.param == param


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages.0.content"),
        ([{"role": "user", "content": "x", "name": "y"}], "messages.0.name"),
    ],
)
def test_a_wrong_conversation_is_refused_by_name(messages: Any, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(messages=messages)
    assert raised.value.refusal.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "m", "prompt": "p", "temperature": NaN}',
        b'{"model": "m", "prompt": "p", "temperature": 1e999}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b"[" * 100_000,
        b"[1]",
        b"null",
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        read_request(CompletionRequest, body)
    assert raised.value.refusal.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "other"]), JSON))
def test_any_json_is_a_request_or_an_error_in_openais_shape(data: dict[str, Any]) -> None:
    try:
        request = read_request(CompletionRequest, json.dumps(data).encode())
    except ApiError as error:
        body = error_body(error.refusal)["error"]
        assert body.keys() == {"message", "type", "param", "code"}
        json.dumps(body, ensure_ascii=False)
    else:
        request.call("id")


def test_an_error_quotes_little_of_a_long_value() -> None:
    with pytest.raises(ApiError) as raised:
        completion(stop="x" * 10_000 + "\ud800")
    assert len(raised.value.refusal.message) < 300


@pytest.mark.parametrize("kind", [CompletionAnswer, ChatAnswer])
def test_chunks_of_one_batch_are_joined_and_say_as_much_as_the_whole(kind: Any) -> None:
    answer = kind("id", 1, "m", "fp")
    pieces = [Piece(0, "a", 2, 1), Piece(1, "x", 3, 1), Piece(0, "b", 2, 2, "length")]
    chunks = list(answer.chunks(pieces, include_usage=True))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1]
    assert chunks[0]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    text = json.dumps(chunks[0], ensure_ascii=False)
    assert '"ab"' in text
    total = answer.usage_chunk([pieces[2], Piece(1, "", 3, 4, "stop")])["usage"]
    assert total == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
