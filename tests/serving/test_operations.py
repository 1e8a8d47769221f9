"""What an operator relies on: metrics, the access log, API keys, and that an engine that hangs is noticed."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from configs.errors import ConfigError, EngineError, InputError
from configs.schema.serving import ServingConfig
from serving.calls import Call
from serving.keys import Budget, add_key, read_keys, revoke_key
from serving.replica import EngineReplica
from tests.serving.conftest import CONTEXT_LENGTH, local_endpoint, served

SECRET_PROMPT = "def zanzibar"


class Place:
    """An endpoint with keys and an access log."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.keys = folder / "keys.json"
        self.log = folder / "logs" / "access.jsonl"

    def client(self, secret: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {secret}"})

    def lines(self, key: str | None, count: int) -> list[dict[str, Any]]:
        """The log's lines of a key, once there are so many: a line is written after the client has its answer."""
        deadline = time.monotonic() + 5
        while True:
            lines = [json.loads(line) for line in self.log.read_text().splitlines()]
            found = [line for line in lines if line["key"] == key]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def place(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    places = ServingConfig(require_keys=True).within(folder)
    with local_endpoint(
        model_folder, require_keys=True, keys_path=places.keys_path, access_log=places.access_log, max_sequences=2
    ) as url:
        yield Place(url, folder)


@pytest.fixture(scope="module")
def secret(place: Place) -> str:
    return add_key(place.keys, "ana", (), None)


@pytest.fixture
def http(place: Place, secret: str) -> Iterator[httpx.Client]:
    with place.client(secret) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": SECRET_PROMPT, "max_tokens": 8, "temperature": 0, **fields}


def values(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values other than the model's and its version's: there is one."""
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    always = ("model_name", "version")
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in always)): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_clients_saw(http: httpx.Client) -> None:
    before = values(http)
    whole = http.post("/v1/completions", json=body(n=2)).json()["usage"]
    with http.stream("POST", "/v1/completions", json=body(stream=True, max_tokens=100)) as answer:  # in many pieces
        answer.read()
    http.post("/v1/completions", json=body(temperature=-1))
    after = values(http)

    def grew(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew("vllm:generation_tokens_total") == 116
    assert grew("vllm:prompt_tokens_total") == 2 * whole["prompt_tokens"]
    assert grew("vllm:request_success_total", "length") == 3
    assert grew("vllm:e2e_request_latency_seconds_count") == 2
    assert grew("vllm:time_to_first_token_seconds_count") == 1
    assert 1 <= grew("vllm:inter_token_latency_seconds_count") <= 99
    assert grew("http_requests_total", "/v1/completions", "POST", "200") == 2
    assert grew("http_requests_total", "/v1/completions", "POST", "400") == 1
    assert after["ganymede:replicas",] == 1


def test_metrics_show_the_work_that_is_under_way_and_its_end(http: httpx.Client) -> None:
    names = [("vllm:num_requests_running", "0"), ("vllm:num_requests_waiting", "0"), ("vllm:kv_cache_usage_perc", "0")]
    with (
        http.stream("POST", "/v1/completions", json=body(n=2, stream=True, max_tokens=CONTEXT_LENGTH - 99)) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        for _ in range(40):
            next(lines)
        found = values(http)
        assert [found[name] for name in names[:2]] == [2, 0]
        assert 0 < found[names[2]] < 1
        assert found["ganymede:prompt_tokens_per_second", "0"] > 0
    deadline = time.monotonic() + 5
    while any(values(http)[name] for name in names):
        assert time.monotonic() < deadline


def test_the_dashboard_asks_for_metrics_that_there_are(http: httpx.Client) -> None:
    http.post("/v1/completions", json=body())
    dashboard = (Path(__file__).parents[2] / "infra" / "dashboards" / "serving.json").read_text()
    asked = set(re.findall(r"(?:vllm|ganymede):\w+|http_requests_total", dashboard))
    assert len(asked) > 10
    assert asked <= {name for name, *_ in values(http)}


def test_the_access_log_says_who_and_how_much_but_not_what(place: Place) -> None:
    with place.client(add_key(place.keys, "reader", (), None)) as http:
        http.post("/v1/completions", json=body())
        with http.stream("POST", "/v1/completions", json=body(stream=True)) as answer:
            answer.read()
        http.get("/v1/nothing/" + "x" * 50)
        with http.stream("POST", "/v1/completions", json=body(stream=True, max_tokens=10_000)) as answer:
            next(answer.iter_bytes())
    httpx.get(f"{place.url}/v1/models")
    lines = {(line["stream"], line["outcome"]): line for line in place.lines("reader", 4)}
    assert len(lines) == 4
    whole, stream = lines[False, "answered"], lines[True, "answered"]
    assert (whole["path"], whole["answer_tokens"], whole["status"]) == ("/v1/completions", 8, 200)
    assert whole["prompt_tokens"] > 0
    assert whole["request_id"].startswith("cmpl-")
    assert 0 < stream["first_token_seconds"] <= stream["seconds"]
    assert lines[False, "refused"]["path"] == "unknown"
    assert lines[True, "left"]["status"] == 200
    assert place.lines(None, 1)[-1]["status"] == 401
    assert "zanzibar" not in place.log.read_text()


def test_a_key_is_needed_but_for_the_questions_of_load_balancers(place: Place, secret: str) -> None:
    assert httpx.get(f"{place.url}/health").status_code == 200
    assert httpx.get(f"{place.url}/live").status_code == 200
    for headers in ({}, {"Authorization": "Bearer gk-wrong"}, {"Authorization": secret}):
        for path in ("/v1/models", "/metrics", "/nothing"):
            refused = httpx.get(place.url + path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
    with openai.OpenAI(base_url=f"{place.url}/v1", api_key=secret, max_retries=0) as client:
        assert client.completions.create(**body()).choices[0].text
    wrong = openai.OpenAI(base_url=f"{place.url}/v1", api_key="gk-wrong", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_keys_are_hashed_limited_to_models_and_revoked_while_the_endpoint_runs(place: Place) -> None:
    other = add_key(place.keys, "other", ("big",), None)
    assert other not in place.keys.read_text()
    assert place.keys.stat().st_mode & 0o077 == 0
    with place.client(other) as http:
        assert http.get("/v1/models").json()["data"] == []
        refused = http.post("/v1/completions", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        with pytest.raises(InputError):
            add_key(place.keys, "other", (), None)
        revoke_key(place.keys, "other")
        time.sleep(1.1)  # known keys are looked up once a second
        assert http.get("/v1/models").status_code == 401
    with pytest.raises(InputError):
        revoke_key(place.keys, "other")


def test_a_key_that_has_used_its_tokens_waits(place: Place) -> None:
    limited = add_key(place.keys, "limited", (), 30)
    with place.client(limited) as http:
        used = 0
        while used < 30:
            usage = http.post("/v1/completions", json=body())
            assert usage.status_code == 200
            used += usage.json()["usage"]["total_tokens"]
        refused = http.post("/v1/completions", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 55 < int(refused.headers["retry-after"]) <= 60


def test_a_budget_is_that_of_the_last_minute() -> None:
    now = 0.0
    budget = Budget(lambda: now)
    for seconds in (0.0, 10.0, 20.0):
        now = seconds
        assert budget.wait_seconds(100) == 0
        budget.spend(40)
    assert budget.wait_seconds(100) == 40  # at 60 the first 40 are a minute old
    assert budget.wait_seconds(80) == 50  # 80 is the limit, not below it
    assert budget.wait_seconds(121) == 0
    now = 60.0
    assert budget.wait_seconds(100) == 0
    budget.spend(500)
    assert budget.wait_seconds(100) == 60
    now = 120.0
    assert budget.wait_seconds(1) == 0


def test_a_file_that_holds_no_keys_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert read_keys(path) == []
    path.write_text('[{"name": "ana", "key": "gk-1"}]')
    with pytest.raises(ConfigError, match=r"keys\.json"):
        read_keys(path)


def test_keys_are_needed_wherever_others_can_ask() -> None:
    assert not ServingConfig().keys_required
    assert not ServingConfig(host="localhost").keys_required
    assert ServingConfig(host="0.0.0.0").keys_required
    assert ServingConfig(require_keys=True).keys_required
    assert not ServingConfig(host="::", require_keys=False).keys_required


class Stuck:
    """In front of an engine: its next step does not return before it is released."""

    def __init__(self, runner: Any) -> None:
        self.released = threading.Event()
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self) -> Any:
        self.released.wait(20)
        return self._runner.step()


def test_an_engine_that_hangs_is_unhealthy_and_one_that_idles_is_not(model_folder: Path) -> None:
    replica = EngineReplica(served(model_folder), ServingConfig(precision="fp32", step_limit_seconds=0.5))

    async def hang() -> None:
        await replica.check_health()
        stuck = replica._watch._runner = Stuck(replica._watch._runner)
        asked = asyncio.create_task(anext(replica.stream(Call("a", ((70, 71),), (1,), max_new_tokens=3))))
        await asyncio.sleep(0.7)
        with pytest.raises(EngineError, match="hangs"):
            await replica.check_health()
        assert not (await replica.status()).healthy
        stuck.released.set()
        await asked
        await replica.check_health()

    asyncio.run(hang())
    replica.close()
