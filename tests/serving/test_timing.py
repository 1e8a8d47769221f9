"""Where an answer's time went: the phases that an endpoint tells, held against what its client measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.actors.conftest import tokenizer_folder  # noqa: F401 - a fixture
from tests.actors.engine.conftest import MakeEncoder, make_encoder  # noqa: F401 - a fixture
from tests.serving.conftest import CONTEXT_LENGTH, local_endpoint

ENGINE = ["queue", "prefill"]
FIRST = ["ingress", "route", *ENGINE]
ALL = [*FIRST, "decode", "flush", "total"]
BODY: dict[str, Any] = {"model": "tiny", "prompt": "def open", "max_tokens": 60, "temperature": 0}


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    with local_endpoint(model_folder, max_sequences=1) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def phases(answer: httpx.Response) -> dict[str, float]:
    """Of the header, in milliseconds."""
    entries = [entry.split(";dur=") for entry in answer.headers["server-timing"].split(", ")]
    return {name: float(value) for name, value in entries}


def add_up(told: dict[str, float], measured_seconds: float) -> None:
    assert list(told) == ALL
    assert all(value >= 0 for value in told.values())
    assert sum(told.values()) == pytest.approx(2 * told["total"], abs=0.1)
    assert told["total"] <= measured_seconds * 1000


def test_the_phases_of_a_whole_answer_are_in_a_header_if_asked_for(http: httpx.Client) -> None:
    began = time.perf_counter()
    answer = http.post("/v1/completions", json={**BODY, "return_timing": True})
    told = phases(answer)
    add_up(told, time.perf_counter() - began)
    assert told["decode"] > told["prefill"] > 0
    silent = http.post("/v1/completions", json=BODY)
    assert "server-timing" not in silent.headers
    assert silent.json()["choices"] == answer.json()["choices"]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_tells_the_first_phases_in_the_header_and_all_of_them_at_its_end(url: str, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        began = time.perf_counter()
        raw = client.completions.with_raw_response.create(
            **BODY, **options, stream=True, extra_body={"return_timing": True}
        )
        chunks = list(raw.parse())
        seconds = time.perf_counter() - began
        plain = list(client.completions.create(**BODY, stream=True))
    first = phases(raw.http_response)
    assert list(first) == FIRST
    *texts, last = chunks
    assert "".join(c.choices[0].text for c in texts) == "".join(c.choices[0].text for c in plain)
    assert (last.choices, last.usage is not None) == ([], usage)
    whole = (last.model_extra or {})["timing_ms"]
    add_up(whole, seconds)
    assert {name: whole[name] for name in FIRST} == pytest.approx(first, abs=0.001)
    assert all("timing_ms" not in (chunk.model_extra or {}) for chunk in texts)


def test_waiting_for_a_place_is_told_apart_from_reading_the_prompt(http: httpx.Client) -> None:
    def hold(seconds: float) -> None:
        with http.stream("POST", "/v1/completions", json={**BODY, "max_tokens": CONTEXT_LENGTH - 99, "stream": True}):
            held.set()
            time.sleep(seconds)

    held = threading.Event()
    holder = threading.Thread(target=hold, args=(0.5,))
    holder.start()
    held.wait()
    told = phases(http.post("/v1/completions", json={**BODY, "n": 2, "return_timing": True}))
    holder.join()
    assert told["queue"] > 300 > told["prefill"]
    long = phases(http.post("/v1/completions", json={**BODY, "prompt": [9] * 3000, "return_timing": True}))
    assert long["prefill"] > 10 * long["queue"]


def test_what_no_proxy_has_stamped_is_no_time_in_a_proxy(http: httpx.Client) -> None:
    def stamped(stamp: str) -> dict[str, float]:
        headers = {"X-Request-Start": stamp}
        return phases(http.post("/v1/completions", json={**BODY, "return_timing": True}, headers=headers))

    for stamp in ("t=1", "yesterday", "t=" + "9" * 40):
        assert "proxy" not in stamped(stamp)
    told = stamped(f"t={int((time.time() - 2) * 1e6)}")
    assert 2000 < told["proxy"] < told["total"]


def test_texts_that_are_read_are_timed_too(make_encoder: MakeEncoder) -> None:  # noqa: F811
    with local_endpoint(make_encoder("bert")) as url:
        body = {"model": "tiny", "input": ["open the path", "the file"]}
        began = time.perf_counter()
        answer = httpx.post(f"{url}/v1/embeddings", json={**body, "return_timing": True})
        told = phases(answer)
        add_up(told, time.perf_counter() - began)
        assert told["prefill"] > 0
        assert told["decode"] == 0
        assert "server-timing" not in httpx.post(f"{url}/v1/embeddings", json=body).headers
