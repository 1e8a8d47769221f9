"""The endpoint as clients see it: one Ray, one Ray Serve, a tiny model, the unmodified `openai` client and raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import ContractError, InputError
from configs.schema.serving import ServingConfig
from infra.deploy import Endpoint, ask, serve_model, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from tests.serving.conftest import CONTEXT_LENGTH, make_model, served

pytestmark = [pytest.mark.ray]

SLOTS, QUEUE = 2, 2


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    (port,) = free_ports(1)
    return ServingConfig(
        port=port, max_sequences=SLOTS, max_queued=QUEUE, replicas_max=1, precision="fp32", max_body_bytes=100_000
    )


@pytest.fixture(scope="module")
def endpoint(model_folder: Path, config: ServingConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    quiet_environment()
    home = tmp_path_factory.mktemp("home")
    (home / "logs").mkdir()
    with ray_session(home):
        yield serve_model(served(model_folder), config, say=lambda _: None)


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url.removesuffix("/v1"), timeout=60) as client:
        yield client


CHAT: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "open the path"}]


def greedy(folder: Path, prompt_ids: list[int], tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([prompt_ids]), max_new_tokens=tokens, do_sample=False)[0, len(prompt_ids) :]
    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)


def test_health_says_which_model_is_ready(http: httpx.Client) -> None:
    answer = http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "models": {"tiny": {"status": "ok", "digest": "ab" * 32}}}


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    extra = client.models.retrieve("tiny").model_extra
    assert extra is not None
    assert (extra["artifact"], extra["digest"]) == ("model/tiny-finetune@3", "ab" * 32)
    assert (extra["registry_version"], extra["alias"]) == (3, "champion")
    assert (extra["capabilities"], extra["labels"]) == (["completions", "chat"], [])


def test_a_greedy_completion_is_that_of_transformers(client: openai.OpenAI, model_folder: Path) -> None:
    prompt = "def open(path): return"
    answer = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=24)
    ids = AutoTokenizer.from_pretrained(model_folder).encode(prompt)
    assert answer.choices[0].text == greedy(model_folder, ids, 24)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.system_fingerprint == "fp_" + "ab" * 8


def test_a_greedy_chat_is_that_of_transformers(client: openai.OpenAI, model_folder: Path) -> None:
    answer = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=24)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert answer.choices[0].message.content == greedy(model_folder, ids, 24)
    assert answer.choices[0].message.role == "assistant"


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["def open", "the path"], "max_tokens": 30, "seed": 5}
    whole = client.completions.create(**asked)
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]
    assert [reasons[0], reasons[1]] == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 30, "seed": 6}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 2


def test_scores_structures_and_choices_pass_through_replicas(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "def", "n": 2, "echo": True, "logprobs": 1, "seed": 2, "max_tokens": 20,
        "extra_body": {"structured_outputs": {"regex": "[a-c]{5}"}, "return_sampling": True},
    }  # fmt: skip
    whole = client.completions.create(**asked)
    assert [choice.text[:3] for choice in whole.choices] == ["def", "def"]
    assert all(set(choice.text[3:]) <= set("abc") and len(choice.text) == 8 for choice in whole.choices)
    streamed: dict[int, list[float | None]] = {0: [], 1: []}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert streamed[choice.index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)


def test_texts_become_tokens_and_tokens_texts(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"model": "tiny", "prompt": "def open"}).json()["tokens"]
    assert http.post("/detokenize", json={"model": "tiny", "tokens": tokens}).json() == {"prompt": "def open"}


def test_an_async_client_is_answered(endpoint: Endpoint) -> None:
    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="unused", max_retries=0) as client:
            calls = [
                client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0, max_tokens=9) for _ in range(3)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(several())
    assert len(set(texts)) == 1


def test_an_answer_says_how_long_it_was_in_the_proxy_whatever_its_client_says(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "def", "max_tokens": 4, "return_timing": True}
    long_ago = {"X-Request-Start": "t=1000000000000000"}
    answer = http.post("/v1/completions", json=body, headers=long_ago)
    phases = dict(entry.split(";dur=") for entry in answer.headers["server-timing"].split(", "))
    assert next(iter(phases)) == "proxy"
    assert 0 < float(phases["proxy"]) < float(phases["total"]) < 60_000


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "def open", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**asked).choices[0].text
    stop = text[8:10]
    stopped = client.completions.create(**asked, stop=["<never>", stop]).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


def test_a_seed_repeats_an_answer_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def answer(**fields: Any) -> str:
        return client.completions.create(model="tiny", prompt="def", max_tokens=40, **fields).choices[0].text

    assert answer(seed=1) == answer(seed=1)
    assert answer(seed=1) != answer(seed=2)
    assert answer() != answer()


def test_top_p_near_zero_is_greedy(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "def", "max_tokens": 12}
    nucleus = client.completions.create(**asked, top_p=1e-6, seed=3).choices[0].text
    assert nucleus == client.completions.create(**asked, temperature=0).choices[0].text


def test_an_answer_that_fills_the_context_window_ends_there(client: openai.OpenAI) -> None:
    prompt = [9] * (CONTEXT_LENGTH - 3)
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=50, temperature=0, timeout=120)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "def", "max_tokens": 2, **fields}).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/v1/completions", completion(suffix="x"), 400, "suffix", "unsupported_parameter"),
        ("/v1/completions", completion(tools=[]), 400, "tools", "unsupported_parameter"),
        ("/v1/completions", completion(temperature="hot"), 400, "temperature", "invalid_value"),
        ("/v1/completions", completion(temperature=float("nan")), 400, None, "invalid_json"),
        ("/v1/completions", completion(n=0), 400, "n", "invalid_value"),
        ("/v1/completions", completion(n=3), 400, "n", "invalid_request"),
        (
            "/v1/completions",
            completion(structured_outputs={"regex": "("}),
            400,
            "structured_outputs",
            "invalid_request",
        ),
        ("/v1/completions", completion(prompt=""), 400, "prompt", "invalid_request"),
        ("/v1/completions", completion(prompt=[10**6]), 400, "prompt", "invalid_request"),
        ("/v1/completions", completion(prompt=["a"] * 3), 400, "prompt", "invalid_request"),
        ("/v1/completions", completion(prompt=[7] * CONTEXT_LENGTH), 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", completion(model="gpt-4"), 404, "model", "model_not_found"),
        ("/v1/completions", b'{"model": "tiny", "prompt"', 400, None, "invalid_json"),
        ("/v1/completions", b"[]", 400, None, "invalid_request"),
        ("/v1/completions", completion(prompt="a" * 100_000), 413, None, "request_too_large"),
        ("/v1/chat/completions", completion(), 400, "prompt", "unsupported_parameter"),
        ("/v1/chat/completions", b'{"model": "tiny"}', 400, "messages", "missing_required_parameter"),
        ("/v1/edits", b"{}", 404, None, "unknown_route"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_in_openais_shape(
    http: httpx.Client, path: str, body: bytes, status: int, param: str | None, code: str, stream: bool
) -> None:
    if stream and body.endswith(b"}"):
        body = body[:-1] + (b', "stream": true}' if len(body) > 2 else b'"stream": true}')
    answer = http.post(path, content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_an_unknown_model_has_no_description(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


ENDLESS: dict[str, Any] = {
    "model": "tiny", "prompt": "def", "max_tokens": CONTEXT_LENGTH, "stream": True, "temperature": 0,
}  # fmt: skip
"""Takes longer than any test."""


def eventually_free(http: httpx.Client) -> None:
    """Waits until all slots and places in the queue are free again, by filling them all at once."""
    body = completion(prompt=["a"] * QUEUE)
    deadline = time.monotonic() + 10
    while (status := http.post("/v1/completions", content=body).status_code) != 200:
        assert status == 503
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_queue_is_503_until_clients_go_away(http: httpx.Client) -> None:
    async def hold(client: httpx.AsyncClient) -> None:
        """Takes a slot or a place in the queue, and tries again if a probe had the last one."""
        while (await client.post("/v1/completions", json=ENDLESS)).status_code == 503:
            await asyncio.sleep(0.02)

    async def crowd() -> httpx.Response:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as client:
            holders = [asyncio.create_task(hold(client)) for _ in range(SLOTS + QUEUE)]
            while True:
                with contextlib.suppress(httpx.ReadTimeout):  # the probe itself was let into the queue
                    answer = await client.post("/v1/completions", content=completion(), timeout=0.5)
                    if answer.status_code != 200:
                        break
            for holder in holders:
                holder.cancel()
            await asyncio.gather(*holders, return_exceptions=True)
            return answer

    refused = asyncio.run(crowd())
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    eventually_free(http)


def test_leaving_in_mid_stream_frees_the_slot(http: httpx.Client) -> None:
    for _ in range(SLOTS + QUEUE + 1):
        with http.stream("POST", "/v1/completions", json=ENDLESS) as answer:
            assert answer.status_code == 200
            next(answer.iter_bytes())
    eventually_free(http)


def test_leaving_before_a_whole_answer_frees_the_slot(http: httpx.Client) -> None:
    for _ in range(SLOTS + QUEUE + 1):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json={**ENDLESS, "stream": False}, timeout=0.2)
    eventually_free(http)


def test_an_occupied_port_is_named_before_anything_starts(model_folder: Path, endpoint: Endpoint) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(InputError, match=str(port)):
            serve_model(served(model_folder), ServingConfig(port=port), say=lambda _: None)


def test_the_endpoint_answers_a_question_and_times_it(endpoint: Endpoint) -> None:
    answer = ask(endpoint, "What is a path?")
    assert answer.tokens > 0
    assert 0 < answer.first_token_seconds <= answer.seconds


def test_only_loopback_is_listened_on(endpoint: Endpoint, config: ServingConfig) -> None:
    hosts = {address for address, port in listening() if port == config.port}
    assert hosts == {"127.0.0.1"}


def listening() -> list[tuple[str, int]]:
    import psutil

    return [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def test_a_model_that_breaks_its_contract_is_refused_and_the_old_one_stays(
    endpoint: Endpoint, config: ServingConfig, http: httpx.Client, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model")
    other = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**other, "pad_token": "<|end|>"}))
    with pytest.raises(ContractError):
        serve_model(served(folder), config, say=lambda _: None)
    assert http.get("/health").status_code == 200


def test_a_new_version_takes_over(
    endpoint: Endpoint, config: ServingConfig, http: httpx.Client, plain_model_folder: Path
) -> None:
    new = replace(served(plain_model_folder), digest="cd" * 32, version=4)
    assert serve_model(new, config, say=lambda _: None).updated
    assert http.get("/v1/models/tiny").json()["registry_version"] == 4
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
    assert answer.status_code == 400
    assert "chat template" in answer.json()["error"]["message"]
    assert ask(replace(endpoint, model=new), "def").tokens > 0


def test_serving_can_be_stopped(endpoint: Endpoint, config: ServingConfig) -> None:
    assert stop_serving()
    assert not stop_serving()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", config.port))
    assert os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") is None
