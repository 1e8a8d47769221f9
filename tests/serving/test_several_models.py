"""Several models behind one endpoint, and adapters over one of them: each under its name, and none in another's way."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.store.artifacts import Artifact, ArtifactStore
from actors.text import make_contract
from configs.artifacts import Identity, Ref
from configs.errors import ArtifactError, ConfigError, CorruptArtifactError, InputError
from configs.schema.serving import CanaryConfig, ServedModelConfig, ServingConfig
from configs.schema.training import LoraConfig
from infra.served import check_names, find_model, find_offers, offer_of
from serving.adapters import Shelf
from serving.calls import AdapterSource, Call, Offer, Piece, Refusal, fingerprint
from serving.keys import add_key
from serving.replica import EngineReplica
from tests.actors.engine.test_engine_adapters import publish as train
from tests.serving.conftest import make_model, offered

PROMPT = "def open(path"
ADAPTERS = ("legal", "medical")


def put(store: ArtifactStore, folder: Path, ref: str, base: Artifact | None = None) -> Artifact:
    staged = store.staging(Ref.parse(ref), "owner")
    shutil.copytree(folder, staged, dirs_exist_ok=True)
    inputs = {} if base is None else {"model.from": base}
    return store.publish(
        staged, ref=Ref.parse(ref), identity=Identity("finetune", 1, {"ref": ref}, {}, {}), config={}, inputs=inputs,
        summary={}, tracking_run=None, fence=lambda: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models base and other, adapters of base, and one of those merged."""
    home, work = tmp_path_factory.mktemp("several"), tmp_path_factory.mktemp("training")
    store = ArtifactStore(home / "artifacts")
    base = put(store, model_folder, "model/base@1")
    put(store, make_model(work / "other", template=None, seed=9), "model/other@1")
    for seed, name in enumerate(ADAPTERS, 1):
        alone, merged = train(model_folder, work / name, LoraConfig(rank=2 + 3 * seed), seed)
        (alone / "contract.json").write_text(make_contract(alone).model_dump_json())
        put(store, alone, f"model/{name}@1", base)
        shutil.copy(model_folder / "generation_config.json", merged)
        put(store, merged, f"model/{name}-merged@1")
    return home


def configs(**settings: Any) -> tuple[ServedModelConfig, ...]:
    named = ("base", "other", *(f"{name}-merged" for name in ADAPTERS))
    adapters = {"base": tuple(f"model/{name}@1" for name in ADAPTERS)}
    return tuple(
        ServedModelConfig(model=f"model/{name}@1", adapters=adapters.get(name, ()), precision="fp32", **settings)
        for name in named
    )


@pytest.fixture(scope="module")
def offers(home: Path) -> tuple[Offer, ...]:
    return find_offers(configs(max_sequences=8, max_adapters=1), ArtifactStore(home / "artifacts"), home)


@pytest.fixture(scope="module")
def http(home: Path, offers: tuple[Offer, ...]) -> Iterator[httpx.Client]:
    config = ServingConfig(access_log=home / "access.jsonl")
    with offered(offers, config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text(http: httpx.Client, model: str, **fields: Any) -> str:
    return str(ask(http, model, **fields)["choices"][0]["text"])


def test_all_names_are_listed_and_an_adapter_says_over_what_it_is(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="-") as client:
        found = {model.id: (model.model_extra or {})["parent"] for model in client.models.list()}
    assert found == {
        "base": None, "legal": "base", "medical": "base", "other": None, "legal-merged": None, "medical-merged": None,
    }  # fmt: skip


def test_each_name_is_described_by_itself(http: httpx.Client, offers: tuple[Offer, ...]) -> None:
    base, legal, other = (http.get(f"/v1/models/{name}").json() for name in ("base", "legal", "other"))
    assert base["adapters"] == ["legal", "medical"]
    assert (base["capabilities"], other["capabilities"]) == (["completions", "chat"], ["completions"])
    assert (legal["artifact"], legal["parent"], legal["capabilities"]) == (
        "model/legal@1",
        "base",
        base["capabilities"],
    )
    assert [source["ref"] for source in legal["lineage"]["made_from"]] == ["model/base@1"]
    source = offers[0].model.adapters[0].adapter
    assert source is not None
    assert (legal["digest"], legal["system_fingerprint"]) == (source.digest, fingerprint(source.key))
    assert len({each["system_fingerprint"] for each in (base, legal, other)}) == 3


def test_an_adapter_answers_as_the_merged_model_does(http: httpx.Client) -> None:
    for name in ADAPTERS:
        assert text(http, name) == text(http, f"{name}-merged")
    assert len({text(http, name) for name in ("base", "other", *ADAPTERS)}) == 4
    chat = [
        http.post("/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "open"}],
                                                "max_tokens": 9, "temperature": 0}).json()["choices"][0]["message"]
        for name in ("legal", "legal-merged")
    ]  # fmt: skip
    assert chat[0] == chat[1]


def test_all_of_them_asked_at_once_answer_what_they_answer_alone(http: httpx.Client) -> None:
    """Though a single adapter is held, and makes room for the other one in the middle of its answers."""
    names = ("base", *ADAPTERS, "other") * 3
    alone = {name: text(http, name, max_tokens=60) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(lambda name: text(http, name, max_tokens=60), names)) == [alone[name] for name in names]


def test_an_adapters_answers_are_signed_by_base_and_adapter_and_go_on_from_an_event(
    http: httpx.Client, offers: tuple[Offer, ...]
) -> None:
    prints = {name: ask(http, name)["system_fingerprint"] for name in ("base", *ADAPTERS)}
    adapters = offers[0].model.adapters
    assert prints == {each.name: fingerprint(each.digest) for each in (offers[0].model, *adapters)}
    body = {"model": "legal", "prompt": PROMPT, "max_tokens": 20, "stream": True, "min_tokens": 20}
    *whole, _ = http.post("/v1/completions", json=body).text.split("\n\n")
    last = whole[0].split("\n")[0].removeprefix("id: ")
    *rest, _ = http.post("/v1/completions", json=body, headers={"Last-Event-ID": last}).text.split("\n\n")

    def written(blocks: Sequence[str]) -> str:
        data = [json.loads(block.partition("data: ")[2]) for block in blocks if not block.endswith("[DONE]")]
        return "".join(chunk["choices"][0]["text"] for chunk in data)

    assert written(whole[:1] + rest) == written(whole)
    other = http.post("/v1/completions", json={**body, "model": "medical"}, headers={"Last-Event-ID": last})
    assert other.status_code == 400


def test_a_name_that_is_not_served_is_a_404_that_tells_the_names(http: httpx.Client) -> None:
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        answer = http.post(path, json={"model": "lega", **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "'legal'" in answer.json()["error"]["message"]
    assert http.get("/v1/models/lega").status_code == 404
    assert http.get("/health?model=lega").status_code == 404


def test_what_a_model_cannot_do_is_its_own_matter(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "open"}], "max_tokens": 2}
    refused = http.post("/v1/chat/completions", json={"model": "other", **body})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert http.post("/v1/chat/completions", json={"model": "medical", **body}).status_code == 200
    assert http.post("/v1/embeddings", json={"model": "legal", "input": "a"}).status_code == 400
    tokens = [http.post("/tokenize", json={"model": name, "prompt": PROMPT}).json() for name in ("base", "legal")]
    assert tokens[0] == tokens[1]


def test_health_tells_of_each_model_and_of_one_alone(http: httpx.Client, offers: tuple[Offer, ...]) -> None:
    health = http.get("/health").json()
    assert health["status"] == "ok"
    assert health["models"]["base"] == {"status": "ok", "digest": offers[0].model.digest, "adapters": list(ADAPTERS)}
    assert health["models"].keys() == {"base", "other", "legal-merged", "medical-merged"}
    assert http.get("/health?model=other").json()["models"].keys() == {"other"}


def test_metrics_and_the_access_log_go_by_the_name_that_was_asked_for(http: httpx.Client, home: Path) -> None:
    def written() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == "vllm:generation_tokens_total"]
        return {(s.labels["model_name"], s.labels["version"]): s.value for s in samples}

    before = written()
    for name, tokens in (("base", 3), ("legal", 4), ("other", 5)):
        ask(http, name, max_tokens=tokens, min_tokens=tokens)
    after = written()
    grown = {labels: after[labels] - before[labels] for labels in after if after[labels] != before[labels]}
    assert grown == {("base", "model/base@1"): 3, ("legal", "model/legal@1"): 4, ("other", "model/other@1"): 5}
    replicas = [line for line in http.get("/metrics").text.splitlines() if line.startswith("ganymede:replicas{")]
    assert len(replicas) == 4  # an adapter has none
    held = [line for line in http.get("/metrics").text.splitlines() if line.startswith("ganymede:adapters_held{")]
    assert [line.split()[-1] for line in held if 'model_name="base"' in line] == ["1.0"]
    logged = [json.loads(line)["model"] for line in (home / "access.jsonl").read_text().splitlines()]
    assert [name for name in logged if name is not None][-3:] == ["base", "legal", "other"]


def test_a_key_is_limited_to_names_an_adapters_too(offers: tuple[Offer, ...], tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = add_key(keys, "ana", ("legal", "other"), None)
    config = ServingConfig(require_keys=True, keys_path=keys)
    headers = {"Authorization": f"Bearer {secret}"}
    with offered(offers[:2], config) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["legal", "other"]
        for name, status in (("legal", 200), ("other", 200), ("base", 403), ("medical", 403)):
            body = {"model": name, "prompt": "a", "max_tokens": 1}
            assert client.post("/v1/completions", json=body).status_code == status
        unknown = client.get("/v1/models/none")
        assert (unknown.status_code, "medical" in unknown.text) == (404, False)


def test_an_answer_that_an_adapter_has_begun_goes_on_in_another_replica(offers: tuple[Offer, ...]) -> None:
    model, settings = offers[0].model, offers[0].settings
    source = model.adapters[1].adapter
    assert source is not None
    first, second = EngineReplica(model, settings), EngineReplica(model, settings)
    call = Call("a", (PROMPT,), (3,), max_new_tokens=24, adapter=source)

    async def ids(batches: AsyncGenerator[Sequence[Piece] | Refusal, None]) -> list[int]:
        found: list[int] = []
        async for batch in batches:
            assert not isinstance(batch, Refusal), batch
            found += [token for piece in batch for token in piece.token_ids]
            assert {piece.model_digest for piece in batch} == {source.key}
        return found

    async def both() -> None:
        whole = await ids(first.stream(call))
        begun = replace(call, begun=(tuple(whole[:7]),), begun_by=source.key)
        assert whole[:7] + await ids(second.stream(begun)) == whole
        elsewhere = replace(call, adapter=replace(source, base="00" * 32))
        refusals = [batch async for batch in first.stream(elsewhere)]
        assert [each.code for each in refusals if isinstance(each, Refusal)] == ["replica_unavailable"]

    asyncio.run(both())
    first.close()
    second.close()


def test_adapters_are_loaded_once_bounded_and_verified(home: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(home / "artifacts", tmp_path / "artifacts")
    store = ArtifactStore(copied)
    sources = [
        AdapterSource(str(a.ref), str(a.path), a.digest, "base")
        for a in (store.get(f"model/{name}@1") for name in (*ADAPTERS, "other"))
    ]
    opened: list[str] = []

    def load(folder: Path, key: str) -> Any:
        opened.append(key)
        return key

    async def use() -> None:
        shelf = Shelf(load, most=2)
        one, two, three = sources
        assert await asyncio.gather(*(shelf.get(one) for _ in range(5))) == [one.key] * 5
        await shelf.get(two)
        await shelf.get(one)
        await shelf.get(three)
        assert shelf.held == (one.key, three.key)
        await shelf.get(two)
        assert opened == [one.key, two.key, three.key, two.key]
        weights = Path(one.folder) / "adapter" / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + b"\0")
        for _ in range(2):
            with pytest.raises(CorruptArtifactError):
                await shelf.get(one)
        weights.write_bytes(content)
        assert await shelf.get(one) == one.key
        with pytest.raises(CorruptArtifactError, match="not the adapter that was deployed"):
            await shelf.get(replace(three, digest="00" * 32, base="another"))

    asyncio.run(use())


def test_what_goes_together_is_found_by_what_an_adapter_was_trained_on(home: Path) -> None:
    store = ArtifactStore(home / "artifacts")
    models = (ServedModelConfig(model="model/other@1"), ServedModelConfig(model="model/base@1"))
    other, base = find_offers(models, store, home, adapters=["model/legal@1"])
    assert (other.model.adapters, [each.name for each in base.model.adapters]) == ((), ["legal"])
    with pytest.raises(InputError, match="adapter of no model that is served"):
        find_offers(models[:1], store, home, adapters=["model/legal@1"])
    with pytest.raises(InputError, match="adapter of no model that is served"):
        find_offers([ServedModelConfig(model="model/other@1", adapters=("model/legal@1",))], store, home)
    with pytest.raises(ConfigError, match="is an adapter"):
        find_offers([ServedModelConfig(model="model/legal@1")], store, home)
    with pytest.raises(InputError, match="of none of the models"):
        find_offers(models, store, home, canary=CanaryConfig(model="model/third@1", weight=0.1))
    with pytest.raises(ArtifactError):
        find_offers(models, store, home, adapters=["model/third@1"])
    with pytest.raises(ConfigError, match="called 'base'"):
        check_names([base, offer_of(find_model("model/base@1", store, home), ServingConfig(), store, home)])


def test_what_holds_for_all_models_holds_for_each_that_says_nothing_else() -> None:
    config = ServingConfig.model_validate(
        {"replicas_max": 4, "precision": "fp32", "models": [{"model": "a"}, {"model": "b", "replicas_max": 6}]}
    )
    assert [(each.replicas_max, each.precision) for each in config.models] == [(4, "fp32"), (6, "fp32")]
