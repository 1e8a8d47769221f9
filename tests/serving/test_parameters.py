"""What clients can ask of an answer: the unmodified `openai` client against a server over one engine replica."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.conftest import CONTEXT_LENGTH, local_endpoint

UNKNOWN = {"name": "n", "schema": {"type": "spaceship"}}
CHAT: list[Any] = [{"role": "user", "content": "open the path"}]


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with local_endpoint(model_folder, max_sequences=4, max_queued=64) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def naive(model_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def logprobs(naive: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Row n is what follows token n, all at once."""
    with torch.no_grad():
        return naive(torch.tensor([ids])).logits[0].log_softmax(-1)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": "tiny", "prompt": "def open", "max_tokens": 12, **fields})


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": CHAT, "max_tokens": 12, **fields})


def test_answers_to_one_prompt_differ_and_do_not_depend_on_their_number(client: openai.OpenAI) -> None:
    five = complete(client, n=5, seed=3, max_tokens=20)
    assert [choice.index for choice in five.choices] == list(range(5))
    texts = [choice.text for choice in five.choices]
    assert len(set(texts)) == 5
    assert [choice.text for choice in complete(client, n=2, seed=3, max_tokens=20).choices] == texts[:2]
    assert complete(client, seed=3, max_tokens=20).choices[0].text == texts[0]
    two = complete(client, prompt=["the path", "def open"], n=2, seed=3, max_tokens=20)
    assert [choice.text for choice in two.choices[2:]] == texts[:2]
    once = complete(client, n=5, temperature=0).usage
    assert once.prompt_tokens == complete(client).usage.prompt_tokens
    assert once.completion_tokens == 60


def test_a_prompt_is_scored_as_by_the_naive_forward_pass(
    client: openai.OpenAI, naive: torch.nn.Module, tokenizer: Any
) -> None:
    """As harnesses ask for log-likelihoods: batches of token ids, echoed, with nothing or one token after them."""
    draw = random.Random(0)
    prompts = [[draw.randrange(5, 289) for _ in range(length)] for length in (1, 2, 40, 300)]
    for new in (0, 1):
        answer = complete(client, prompt=prompts, max_tokens=new, temperature=0, logprobs=2, echo=True)
        assert answer.usage.completion_tokens == 4 * new
        for ids, choice in zip(prompts, answer.choices, strict=True):
            scores, rows = choice.logprobs, logprobs(naive, ids)
            assert len(scores.tokens) == len(scores.text_offset) == len(ids) + new
            assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
            assert choice.text.startswith(tokenizer.decode(ids))
            for n, (token, row) in enumerate(zip(ids[1:], rows, strict=False), 1):
                assert scores.token_logprobs[n] == pytest.approx(float(row[token]), abs=1e-4)
                assert max(scores.top_logprobs[n].values()) == pytest.approx(float(row.max()), abs=1e-4)
                assert scores.top_logprobs[n][scores.tokens[n]] == scores.token_logprobs[n]
            if new:
                assert scores.token_logprobs[-1] == pytest.approx(float(rows[-1].max()), abs=1e-4)


def test_tokens_stand_in_the_text_where_their_offsets_say(client: openai.OpenAI) -> None:
    for echo in (False, True):
        choice = complete(client, temperature=0.5, seed=1, logprobs=0, echo=echo, max_tokens=30).choices[0]
        found = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
        assert found[0][1] == 0
        for token, offset in found:
            assert token.startswith(("bytes:", "<|")) or choice.text[offset:].startswith(token)


def test_a_chat_tells_the_likelihood_of_its_tokens(
    client: openai.OpenAI, naive: torch.nn.Module, tokenizer: Any
) -> None:
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    entries = answer.logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert text == answer.message.content
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    row = logprobs(naive, ids)[-1]
    assert [top.logprob for top in entries[0].top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert entries[0].token == entries[0].top_logprobs[0].token
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


class Path_(pydantic.BaseModel):  # noqa: N801 - the client shows the name
    """A structured answer, as the client's own `parse` has it."""

    model_config = pydantic.ConfigDict(extra="forbid")

    kind: Literal["file", "folder"]
    depth: int = pydantic.Field(ge=0, le=20)
    tags: list[Literal["a", "b", "c"]] = pydantic.Field(max_length=3)


def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = client.chat.completions.parse(
            model="tiny", messages=CHAT, response_format=Path_, max_tokens=200, seed=seed, temperature=1.5
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Path_)
        regex = chat(client, seed=seed, max_tokens=99, extra_body={"structured_outputs": {"regex": "[0-9]{4}-[a-f]+x"}})
        assert re.fullmatch("[0-9]{4}-[a-f]+x", regex.choices[0].message.content)
        choice = complete(client, seed=seed, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
        assert choice.choices[0].text in {"left", "right"}
        grammar = complete(client, seed=seed, extra_body={"structured_outputs": {"grammar": 'start: "a" ("b" | "cd")'}})
        assert grammar.choices[0].text in {"ab", "acd"}
    anything = chat(client, response_format={"type": "json_object"}, max_tokens=1000, logit_bias={"93": 5}, seed=1)
    if anything.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(anything.choices[0].message.content), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": UNKNOWN}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "integer", "minimum": 2, "maximum": 1}}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"n": 65}, "n"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [7] * (CONTEXT_LENGTH + 1), "max_tokens": 0}, "prompt"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_cannot_do_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, stream=stream, extra_body=fields)
    assert caught.value.param == param
    assert param in str(caught.value) or param == "prompt"


def test_controls_act_on_the_answer(client: openai.OpenAI, tokenizer: Any) -> None:
    free = complete(client, temperature=0, max_tokens=30).choices[0]
    ids = tokenizer.encode(free.text)
    biased = complete(client, temperature=0, logit_bias={"75": 100}).choices[0].text
    assert biased == tokenizer.decode([75]) * 12
    strict = {"presence_penalty": 2, "frequency_penalty": 2, "extra_body": {"repetition_penalty": 50}}
    varied = complete(client, temperature=0, max_tokens=30, logprobs=0, **strict).choices[0].logprobs.tokens
    assert len(set(varied)) == 30 > len(set(ids))
    stop = {"stop_token_ids": [ids[4]]}
    assert complete(client, temperature=0, max_tokens=30, extra_body=stop).choices[0].finish_reason == "stop"
    late = complete(client, temperature=0, max_tokens=30, extra_body={**stop, "min_tokens": 30})
    assert late.usage.completion_tokens == 30
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(client, seed=5, max_tokens=30, extra_body=narrow).choices[0].text == free.text


def test_an_answer_says_how_it_was_sampled_if_it_is_asked_to(client: openai.OpenAI) -> None:
    answer = complete(client, n=2, top_p=0.5, extra_body={"return_sampling": True, "top_k": 9})
    first, second = (choice.sampling for choice in answer.choices)
    assert (first["top_p"], first["top_k"], first["temperature"], first["max_new_tokens"]) == (0.5, 9, 1.0, 12)
    assert first["seed"] != second["seed"]
    again = complete(client, top_p=0.5, seed=second["seed"], extra_body={"top_k": 9})
    assert again.choices[0].text == answer.choices[1].text
    assert not hasattr(complete(client).choices[0], "sampling")


def test_texts_become_tokens_and_tokens_texts(http: httpx.Client, tokenizer: Any) -> None:
    text = "def öpen 🦉"
    answer = http.post("/tokenize", json={"model": "tiny", "prompt": text}).json()
    ids = tokenizer.encode(text)
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": CONTEXT_LENGTH}
    assert http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": text}
    answer = http.post("/tokenize", json={"model": "tiny", "messages": CHAT}).json()
    assert answer["tokens"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert http.post("/tokenize", json={"model": "tiny", "prompt": ""}).json()["tokens"] == []
    for path, body, param in (
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        refused = http.post(path, json={"model": "tiny", **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """What a stream says in all, by choice."""
    result: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            whole = result.setdefault(choice.index, {"text": "", "logprobs": [], "finish_reason": None})
            assert whole["finish_reason"] is None
            whole["text"] += choice.text if hasattr(choice, "text") else choice.delta.content or ""
            whole["logprobs"] += flat(choice.logprobs)
            whole["finish_reason"] = choice.finish_reason
    return result


def flat(scores: Any) -> list[Any]:
    if scores is None:
        return []
    if hasattr(scores, "content"):
        return scores.content
    lists = (scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset)
    return list(zip(*lists, strict=True))


def same(first: list[Any], second: list[Any]) -> bool:
    """Equal up to the rounding of a batch of another size."""
    numbers = re.compile(r"-?\d+\.\d+(?:e-\d+)?")
    texts = [re.sub(numbers, lambda found: f"{float(found[0]):.3f}", repr(each)) for each in (first, second)]
    return texts[0] == texts[1] or all(
        abs(float(a) - float(b)) < 2e-3 for a, b in zip(*(numbers.findall(text) for text in texts), strict=True)
    )


def test_streamed_is_not_streamed_whatever_is_asked(client: openai.OpenAI) -> None:
    draw = random.Random(7)
    for seed in range(25):
        fields: dict[str, Any] = {
            "seed": seed, "n": draw.choice([1, 1, 3]), "max_tokens": draw.choice([1, 5, 25]),
            "stop": draw.choice([None, ["e", "at th"], ["a", "aa", "ab"]]),
            "temperature": draw.choice([0, 0.8]), "frequency_penalty": draw.choice([0, 1]),
            "extra_body": {"min_p": draw.choice([0, 0.1]), "min_tokens": draw.choice([0, 1])},
        }  # fmt: skip
        if draw.random() < 0.3:
            fields["extra_body"] = {"structured_outputs": {"regex": "[a-z0-9äö]{3,20}"}}
        if draw.random() < 0.5:
            whole = chat(client, **fields, logprobs=True, top_logprobs=2)
            streamed = joined(chat(client, **fields, logprobs=True, top_logprobs=2, stream=True))
        else:
            fields |= {"prompt": ["def", "path open"], "echo": draw.random() < 0.5, "logprobs": draw.choice([None, 2])}
            whole = complete(client, **fields)
            streamed = joined(complete(client, **fields, stream=True))
        assert len(streamed) == len(whole.choices)
        for choice in whole.choices:
            got = streamed[choice.index]
            assert got["text"] == (choice.text if hasattr(choice, "text") else choice.message.content)
            assert got["finish_reason"] == choice.finish_reason
            assert same(got["logprobs"], flat(choice.logprobs))
