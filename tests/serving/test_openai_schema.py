import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema.generation import Sampling, Structure
from serving.calls import Conversation, Message, Piece, Refusal, TokenScore
from serving.openai.body import read_request
from serving.openai.errors import ApiError, error_body
from serving.openai.logprobs import chat_logprobs, completion_logprobs
from serving.openai.schema import ChatRequest, CompletionRequest
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
    assert (call.max_new_tokens, call.choices, call.echo) == (16, 1, False)
    assert call.sampling == Sampling(max_new_tokens=0)
    assert chat().call("id").max_new_tokens is None


def test_null_stands_for_the_default() -> None:
    fields = dict.fromkeys(("max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream", "stream_options"))
    fields |= dict.fromkeys(("logprobs", "echo", "logit_bias", "response_format", "structured_outputs", "min_p"))
    assert completion(**fields) == completion()


def test_a_stop_may_be_one_string_or_several() -> None:
    assert completion(stop="x").stop == ("x",)
    assert completion(stop=["x", "y"]).stop == ("x", "y")


def test_both_names_of_the_token_limit_are_understood() -> None:
    assert chat(max_tokens=3).call("id").max_new_tokens == 3
    assert chat(max_completion_tokens=4).call("id").max_new_tokens == 4


def test_text_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).call("id").prompts == (
        Conversation((Message("user", "ab"),)),
    )


def test_a_negative_seed_is_a_seed() -> None:
    seeds = completion(seed=-1, prompt=["a", "b"]).call("id").seeds
    assert seeds == ((1 << 63) - 1,) * 2


def test_without_a_seed_each_prompt_and_each_call_has_one_of_its_own() -> None:
    asked = completion(prompt=["a", "b"])
    assert len({*asked.call("cmpl-1").seeds, *asked.call("cmpl-2").seeds}) == 4
    assert asked.call("cmpl-1") == asked.call("cmpl-1")


@pytest.mark.parametrize("field", ["best_of", "suffix", "tools", "modalities", "top_logprobs"])
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
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"xgrammar": "a"}}, "structured_outputs.xgrammar"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens"),
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
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_wrong_value_of_a_chat_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**fields)
    assert raised.value.refusal.param == param


def test_controls_reach_the_engine_under_its_own_names() -> None:
    controls = {
        "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": -0.3, "min_tokens": 3,
    }  # fmt: skip
    asked = completion(**controls, logit_bias={"7": -100}, stop=["a"], stop_token_ids=[9], logprobs=2, echo=True, n=3)
    call = asked.call("id")
    assert call.sampling == Sampling(
        **controls, max_new_tokens=3, logit_bias={7: -100}, stop=("a",), stop_token_ids=(9,), logprobs=2,
        prompt_logprobs=2,
    )  # fmt: skip
    assert (call.choices, call.echo) == (3, True)
    assert completion(logprobs=0).call("id").sampling.logprobs == 0
    assert chat(logprobs=True).call("id").sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).call("id").sampling.logprobs == 5
    assert completion(max_tokens=0).call("id").max_new_tokens == 0


def test_forms_of_an_answer_reach_the_engine_as_structures() -> None:
    def structure(**fields: Any) -> Structure | None:
        return chat(**fields).call("id").sampling.structure

    schema = {"type": "integer"}
    named = {"name": "n", "schema": schema, "strict": True, "description": "d"}
    assert structure(response_format={"type": "text"}) is None
    assert structure(response_format={"type": "json_object"}) == Structure(json_schema='{"type": "object"}')
    expected = Structure(json_schema=json.dumps(schema))
    assert structure(response_format={"type": "json_schema", "json_schema": named}) == expected
    assert structure(structured_outputs={"json": schema}) == expected
    assert structure(structured_outputs={"regex": "a+"}) == Structure(regex="a+")
    assert structure(structured_outputs={"grammar": "start: A"}) == Structure(grammar="start: A")
    assert structure(structured_outputs={"choice": ["a", "b"]}) == Structure(choice=("a", "b"))


def test_a_structure_that_is_refused_is_named_as_the_client_named_it() -> None:
    refusal = Refusal(400, "message", "invalid_request", "structure")
    assert chat(response_format={"type": "json_object"}).named(refusal).param == "response_format"
    assert chat(structured_outputs={"regex": "a"}).named(refusal).param == "structured_outputs"


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
    total = answer.usage([pieces[2], Piece(1, "", 3, 4, "stop")])
    assert total == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_tokens_that_are_part_of_a_character_are_named_by_their_bytes() -> None:
    scores = (
        TokenScore(b"a", 0, None),
        TokenScore(b"\xf0\x9f", 1, -0.5, ((b"\xf0\x9f", -0.5), (b"b", -2.0))),
        TokenScore(b"c", 1, float("-inf"), ((b"b", -0.25),)),
    )
    assert completion_logprobs(scores) == {
        "tokens": ["a", "bytes:\\xf0\\x9f", "c"],
        "token_logprobs": [None, -0.5, -9999.0],
        "top_logprobs": [None, {"bytes:\\xf0\\x9f": -0.5, "b": -2.0}, {"b": -0.25, "c": -9999.0}],
        "text_offset": [0, 1, 1],
    }
    entry = chat_logprobs(scores[1:2])["content"][0]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("\\xf0\\x9f", [0xF0, 0x9F], -0.5)
    assert [other["token"] for other in entry["top_logprobs"]] == ["\\xf0\\x9f", "b"]


def test_a_prompt_is_counted_once_however_many_answers_it_gets() -> None:
    answer = CompletionAnswer("id", 1, "m", "fp", 2)
    pieces = [Piece(index, "", 5 + index // 2, 3, "stop") for index in range(4)]
    assert answer.usage(pieces) == {"prompt_tokens": 11, "completion_tokens": 12, "total_tokens": 23}
    assert len(list(ChatAnswer("id", 1, "m", "fp", 3).opening(include_usage=False))) == 3
