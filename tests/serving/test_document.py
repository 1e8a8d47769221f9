"""The OpenAPI document says of the endpoint what is true; schemathesis tries to show that it does not.

schemathesis lives in an environment of its own: `SCHEMATHESIS=/path/to/schemathesis` unless it is on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.actors.conftest import tokenizer_folder  # noqa: F401 - a fixture
from tests.actors.engine.conftest import MakeEncoder, make_encoder  # noqa: F401 - fixtures
from tests.serving.conftest import local_endpoint

SCHEMATHESIS = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
TOOL = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "properties": {}}}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a window that is soon full, as most requests name no limit."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    return folder


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[httpx.Client]:
    with local_endpoint(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def check(document: dict[str, Any], path: str, answer: httpx.Response) -> None:
    """Raises unless the document tells of this answer."""
    responses = document["paths"][path][answer.request.method.lower()]["responses"]
    told = responses.get(str(answer.status_code)) or responses["default"]
    schema = told["content"][answer.headers["content-type"].partition(";")[0]]["schema"]
    Draft202012Validator({**schema, "components": document["components"]}).validate(
        answer.json() if "json" in answer.headers["content-type"] else answer.text
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "def"}),
        ("/v1/completions", {"prompt": ["a", [5]], "max_tokens": 1}),
        ("/v1/completions", {"prompt": [[5, 6], [7]], "n": 2, "echo": True, "logprobs": 2, "return_sampling": True}),
        ("/v1/completions", {"prompt": "def", "stream": True}),
        ("/v1/completions", {"prompt": "def", "best": 1}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**CHAT, "tools": [TOOL]}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "def open"}),
        ("/detokenize", {"tokens": [5, 6]}),
    ],
)
def test_answers_are_as_the_document_has_them(
    http: httpx.Client, document: dict[str, Any], path: str, fields: dict[str, Any]
) -> None:
    check(document, path, http.post(path, json={"model": "tiny", **fields}))


def test_what_can_be_looked_at_is_as_the_document_has_it(http: httpx.Client, document: dict[str, Any]) -> None:
    for path in ("/live", "/health", "/metrics", "/v1/models"):
        check(document, path, http.get(path))
    for name in ("tiny", "other"):
        check(document, "/v1/models/{name}", http.get(f"/v1/models/{name}"))


def test_encoders_answer_as_the_document_has_it(document: dict[str, Any], make_encoder: MakeEncoder) -> None:  # noqa: F811
    kinds = {
        "": ("embeddings", "score"),
        "ForSequenceClassification": ("classify",),
        "ForTokenClassification": ("ner",),
    }
    for head, tasks in kinds.items():
        folder = make_encoder("bert", head) if head else make_encoder("bert")
        with local_endpoint(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
            for task in tasks:
                texts = {"text_1": "a", "text_2": ["a", "b"]} if task == "score" else {"input": ["def open", "x"]}
                answer = http.post(f"/v1/{task}", json={"model": "tiny", **texts})
                assert answer.status_code == 200, answer.text
                check(document, f"/v1/{task}", answer)


def test_the_document_is_valid_and_has_every_route(http: httpx.Client, document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    answers = {
        "post": {path: http.post(path, json={}).json() for path, item in document["paths"].items() if "post" in item},
        "get": {path: http.get(path).status_code for path, item in document["paths"].items() if "get" in item},
    }
    assert {error["error"]["code"] for error in answers["post"].values()} == {"missing_required_parameter"}
    assert all(status in (200, 404) for status in answers["get"].values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(SCHEMATHESIS is None, reason="schemathesis is not here: install it elsewhere, and set SCHEMATHESIS")
def test_schemathesis_finds_no_server_error_and_no_answer_that_the_document_does_not_tell(
    http: httpx.Client, tmp_path: Path
) -> None:
    run = subprocess.run(
        [
            *(str(SCHEMATHESIS), "run", str(http.base_url.join("/openapi.json"))),
            *("--checks", CHECKS, "--max-examples", "150", "--continue-on-failure", "--request-timeout", "60"),
            *("--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=850,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
