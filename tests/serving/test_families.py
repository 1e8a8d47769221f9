"""Every family of models over HTTP: what each answers, and what it says when it is asked for something else."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import Classification, EncodeRequest, Tagging
from tests.actors.conftest import tokenizer_folder  # noqa: F401 - a fixture
from tests.actors.engine.conftest import MakeEncoder, MakeSeq2Seq, make_encoder, make_seq2seq  # noqa: F401 - fixtures
from tests.serving.conftest import local_endpoint

TEXTS = ["def open the path", "Öl — 🦉 and def return", "x"]


@pytest.fixture(scope="module")
def seq2seq(make_seq2seq: MakeSeq2Seq) -> Iterator[httpx.Client]:  # noqa: F811
    with local_endpoint(make_seq2seq("bart"), max_sequences=4) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def embedder(make_encoder: MakeEncoder) -> Iterator[httpx.Client]:  # noqa: F811
    with local_endpoint(make_encoder("bert"), max_queued=4) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def classifier(make_encoder: MakeEncoder) -> Iterator[httpx.Client]:  # noqa: F811
    folder = make_encoder("bert", "ForSequenceClassification", labels=("bad", "good", "odd"))
    with local_endpoint(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def tagger(make_encoder: MakeEncoder) -> Iterator[httpx.Client]:  # noqa: F811
    folder = make_encoder("bert", "ForTokenClassification")
    with local_endpoint(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def post(http: httpx.Client, path: str, **fields: Any) -> Any:
    answer = http.post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def capabilities(http: httpx.Client) -> list[str]:
    found: list[str] = http.get("/v1/models/tiny").json()["capabilities"]
    return found


def test_an_encoder_decoder_answers_as_transformers_does(
    seq2seq: httpx.Client,
    make_seq2seq: MakeSeq2Seq,  # noqa: F811
) -> None:
    folder = make_seq2seq("bart")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, num_beams=1)[0, 1:]
    asked = {"prompt": TEXTS[0], "temperature": 0, "max_tokens": 12, "logprobs": 1}
    answer = post(seq2seq, "/v1/completions", **asked)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert capabilities(seq2seq) == ["completions", "chat"]  # its tokenizer has a chat template
    with openai.OpenAI(base_url=f"{seq2seq.base_url}/v1", api_key="unused", max_retries=0) as client:
        chunks = client.completions.create(model="tiny", stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer["choices"][0]["text"]
    refused = seq2seq.post("/v1/completions", json={"model": "tiny", "prompt": "a", "echo": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
    tokens = post(seq2seq, "/tokenize", prompt=TEXTS[0])["tokens"]
    assert tokens == ids[0].tolist()


def test_embeddings_are_the_models_own_as_numbers_and_as_base64(
    embedder: httpx.Client,
    make_encoder: MakeEncoder,  # noqa: F811
) -> None:
    folder = make_encoder("bert")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with openai.OpenAI(base_url=f"{embedder.base_url}/v1", api_key="unused", max_retries=0) as client:
        packed = client.embeddings.create(model="tiny", input=TEXTS)
        plain = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for text, ours, again in zip(TEXTS, packed.data, plain.data, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert ours.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
        assert ours.embedding == pytest.approx(again.embedding)
    assert packed.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in TEXTS)
    raw = post(embedder, "/v1/embeddings", input=TEXTS[0], encoding_format="base64", normalize=False)["data"][0]
    vector = struct.unpack("<32f", base64.b64decode(raw["embedding"]))
    assert sum(value * value for value in vector) != pytest.approx(1, abs=1e-3)


def test_one_call_may_hold_more_texts_than_the_queue(embedder: httpx.Client) -> None:
    found = post(embedder, "/v1/embeddings", input=[f"text {n}" for n in range(50)])["data"]
    assert [entry["index"] for entry in found] == list(range(50))


def test_pairs_are_scored_by_their_embeddings(embedder: httpx.Client) -> None:
    first, *others = [e["embedding"] for e in post(embedder, "/v1/embeddings", input=TEXTS)["data"]]
    found = post(embedder, "/v1/score", text_1=TEXTS[0], text_2=TEXTS)["data"]
    expected = [sum(a * b for a, b in zip(first, other, strict=True)) for other in others]
    assert [entry["score"] for entry in found] == pytest.approx([1.0, *expected], abs=1e-5)
    assert 1.0 - min(expected) > 5e-5  # more than is overlooked above


def test_classes_have_probabilities(classifier: httpx.Client, make_encoder: MakeEncoder) -> None:  # noqa: F811
    folder = make_encoder("bert", "ForSequenceClassification", labels=("bad", "good", "odd"))
    pairs = [text[::-1] for text in TEXTS]
    engine = EncoderEngine.load(folder, precision="fp32")
    for fields, seconds in (({}, [None] * 3), ({"pair": pairs}, pairs)):
        answer = post(classifier, "/v1/classify", input=TEXTS, **fields)
        asked = [EncodeRequest(str(n), t, "classify", p) for n, (t, p) in enumerate(zip(TEXTS, seconds, strict=True))]
        for entry, event in zip(answer["data"], engine.encode(asked), strict=True):
            assert isinstance(event.encoding, Classification)
            assert entry["label"] == event.encoding.label
            assert dict(zip(entry["labels"], entry["probs"], strict=True)) == pytest.approx(event.encoding.scores)
            assert sum(entry["probs"]) == pytest.approx(1, abs=1e-5)
    described = classifier.get("/v1/models/tiny").json()
    assert (described["capabilities"], described["labels"]) == (["classify"], ["bad", "good", "odd"])


def test_a_classifier_of_one_label_scores_pairs(make_encoder: MakeEncoder) -> None:  # noqa: F811
    folder = make_encoder("bert", "ForSequenceClassification", labels=("relevant",))
    with local_endpoint(folder) as url, httpx.Client(base_url=url, timeout=60) as http:
        found = post(http, "/v1/score", text_1=["a path", "open"], text_2=["the path", "return"])["data"]
        assert all(0 < entry["score"] < 1 for entry in found)
        assert found[0]["score"] != found[1]["score"]
        assert capabilities(http) == ["classify", "score"]


def test_entities_have_places_in_characters(tagger: httpx.Client, make_encoder: MakeEncoder) -> None:  # noqa: F811
    engine = EncoderEngine.load(make_encoder("bert", "ForTokenClassification"), precision="fp32")
    answer = post(tagger, "/v1/ner", input=TEXTS)
    found = 0
    for text, entry, event in zip(
        TEXTS, answer["data"], engine.encode([EncodeRequest(t, t, "tag") for t in TEXTS]), strict=True
    ):
        assert isinstance(event.encoding, Tagging)
        for entity, span in zip(entry["entities"], event.encoding.spans, strict=True):
            assert (entity["start"], entity["end"], entity["label"]) == (span.start, span.end, span.label)
            assert text[entity["start"] : entity["end"]] == entity["text"] != ""
            found += 1
    assert found > 2
    assert answer["system_fingerprint"] == "fp_" + "ab" * 8


@pytest.mark.parametrize(
    ("which", "path", "fields", "allowed"),
    [
        ("embedder", "/v1/completions", {"prompt": "a"}, "/v1/embeddings"),
        ("embedder", "/v1/completions", {"prompt": "a", "stream": True}, "/v1/embeddings"),
        ("tagger", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "/v1/ner"),
        ("tagger", "/v1/classify", {"input": "a"}, "/v1/ner"),
        ("classifier", "/v1/score", {"text_1": "a", "text_2": "b"}, "/v1/classify"),
        ("seq2seq", "/v1/embeddings", {"input": "a"}, "/v1/completions"),
    ],
)
def test_a_model_says_what_it_can_do_when_it_is_asked_for_something_else(
    which: str, path: str, fields: dict[str, Any], allowed: str, request: pytest.FixtureRequest
) -> None:
    answer = request.getfixturevalue(which).post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "unsupported_by_model")
    assert path in error["message"]
    assert allowed in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"input": [1, 2]}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", ""]}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "path " * 200}, "input"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_2"),
        ("/v1/score", {"text_1": "path " * 200, "text_2": "c"}, "text_1"),
        ("/v1/classify", {"input": ["a"], "pair": ["b", "c"]}, "pair"),
    ],
)
def test_what_is_wrong_with_texts_is_named(
    embedder: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = embedder.post(path, json={"model": "tiny", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_long_text_is_cut_only_where_that_is_asked_for(embedder: httpx.Client) -> None:
    assert post(embedder, "/v1/embeddings", input="path " * 200, truncate=True)["usage"]["prompt_tokens"] == 96
