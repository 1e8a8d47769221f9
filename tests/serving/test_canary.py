"""Two versions of a model behind one name: who gets which, and how that is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from actors.store.artifacts import ArtifactStore
from configs.errors import ArtifactError, InputError
from configs.schema.serving import CanaryConfig, ServingConfig
from infra.cli.main import app
from infra.served import find_model, offer_of
from serving.calls import LOST, Call, Refusal, ServedModel, fingerprint
from serving.canary import gets_canary, versions_of
from serving.metrics import Metrics
from serving.replica import EngineReplica
from tests.serving.conftest import endpoint_of, make_model, served
from tests.serving.test_served_lineage import publish

SHARE = CanaryConfig(model="tiny@candidate", weight=0.4)
USERS = [f"user-{number}" for number in range(30)]


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    second = make_model(tmp_path_factory.mktemp("second-model"), seed=8)
    canary = replace(served(second), digest="cd" * 32, ref="model/tiny-finetune@4", version=4, alias="candidate")
    return replace(served(model_folder), canary=canary)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "access.jsonl"


@pytest.fixture(scope="module")
def http(model: ServedModel, model_folder: Path, log: Path) -> Iterator[httpx.Client]:
    with (
        endpoint_of(model_folder, model, canary=SHARE, max_sequences=4, access_log=log) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "def open", "max_tokens": 9, "temperature": 0, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_askers_are_split_by_weight_and_stay_where_they_are() -> None:
    versions = ("ab" * 32, "cd" * 32)
    askers = [f"asker {number}" for number in range(20_000)]
    tenth = {asker for asker in askers if gets_canary(asker, versions, 0.1)}
    half = {asker for asker in askers if gets_canary(asker, versions, 0.5)}
    assert len(tenth) == pytest.approx(2_000, abs=200)
    assert len(half) == pytest.approx(10_000, abs=400)
    assert tenth < half
    assert {asker for asker in askers if gets_canary(asker, (versions[0], "ef" * 32), 0.1)} != tenth


def test_a_users_requests_go_to_one_version_which_signs_what_it_writes(http: httpx.Client, model: ServedModel) -> None:
    texts: dict[str, set[str]] = {}
    for user in USERS:
        first, second = ask(http, user=user), ask(http, user=user, max_tokens=8)
        assert first["system_fingerprint"] == second["system_fingerprint"]
        texts.setdefault(first["system_fingerprint"], set()).add(first["choices"][0]["text"])
    assert texts.keys() == {fingerprint(version.digest) for version in model.versions}
    assert all(len(found) == 1 for found in texts.values())
    assert len(set.union(*texts.values())) == 2


def test_a_request_that_is_sent_again_goes_to_the_same_version(http: httpx.Client) -> None:
    found = {}
    for number in range(30):
        prints = {ask(http, prompt=f"def f{number}")["system_fingerprint"] for _ in range(2)}
        assert len(prints) == 1
        found[number] = prints.pop()
    assert len(set(found.values())) == 2


def test_a_stream_goes_on_in_the_version_that_began_it(http: httpx.Client) -> None:
    def chunks(blocks: list[str]) -> list[dict[str, Any]]:
        found = [json.loads(block.partition("data: ")[2]) for block in blocks if not block.endswith("[DONE]")]
        return [{"text": c["choices"][0]["text"], "by": c["system_fingerprint"]} for c in found]

    writers = set()
    for user in USERS[:8]:
        body = {"model": "tiny", "prompt": "def", "max_tokens": 20, "user": user, "stream": True, "min_tokens": 20}
        *whole, _ = http.post("/v1/completions", json=body).text.split("\n\n")
        last = whole[0].split("\n")[0].removeprefix("id: ")
        *rest, _ = http.post("/v1/completions", json=body, headers={"Last-Event-ID": last}).text.split("\n\n")
        before, after = chunks(whole), chunks(whole[:1] + rest)
        assert "".join(c["text"] for c in after) == "".join(c["text"] for c in before)
        (writer,) = {c["by"] for c in before + after}
        writers.add(writer)
    assert len(writers) == 2


def test_while_no_canary_can_be_asked_the_stable_version_answers_and_says_so(
    model: ServedModel,
) -> None:
    assert model.canary is not None
    config = ServingConfig(precision="fp32", canary=SHARE, max_sequences=2)
    stable, canary = EngineReplica(model, config), EngineReplica(model.canary, config)
    metrics = Metrics([model])
    both = versions_of(model, config, stable, canary, metrics)
    wants_canary = next(user for user in USERS if gets_canary(user, (model.digest, model.canary.digest), SHARE.weight))

    async def digests(begun_by: str | None = None) -> list[str]:
        call = Call("a", ((70, 71),), (1,), max_new_tokens=4, asker=wants_canary, begun_by=begun_by)
        found = []
        async for batch in both.stream(call):
            found += [batch.code] if isinstance(batch, Refusal) else [piece.model_digest for piece in batch]
        return found

    def fallbacks() -> float:
        lines = metrics.exposition({}).decode().splitlines()
        return float(next(line for line in lines if line.startswith("ganymede:canary_fallbacks_total")).split()[-1])

    async def lose_it() -> None:
        assert set(await digests()) == {"cd" * 32}
        assert set(await digests(begun_by="ab" * 32)) == {"ab" * 32}
        assert fallbacks() == 0
        canary.close()
        assert set(await digests()) == {"ab" * 32}
        assert fallbacks() == 1
        assert await digests(begun_by="cd" * 32) == [LOST]

    asyncio.run(lose_it())
    stable.close()


def test_the_endpoint_tells_of_both_versions(http: httpx.Client, model: ServedModel) -> None:
    assert model.canary is not None
    entry = http.get("/v1/models/tiny").json()
    canary = entry.pop("canary")
    assert (entry["registry_version"], canary["registry_version"], canary["weight"]) == (3, 4, 0.4)
    assert canary["system_fingerprint"] == fingerprint(model.canary.digest)
    assert canary["capabilities"] == entry["capabilities"]
    assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["tiny"]
    health = http.get("/health").json()
    canary = {"status": "ok", "digest": model.canary.digest}
    assert health["models"] == {"tiny": {"status": "ok", "digest": model.digest, "canary": canary}}


def test_metrics_and_the_access_log_tell_the_versions_apart(http: httpx.Client, model: ServedModel, log: Path) -> None:
    def written() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["version"]: s.value for s in samples if s.name == "vllm:generation_tokens_total"}

    before, seen = written(), {}
    for user in USERS:
        found = ask(http, user=user)["system_fingerprint"]
        seen[found] = seen.get(found, 0) + 9
    after = written()
    assert {version.ref: after[version.ref] - before[version.ref] for version in model.versions} == {
        version.ref: seen[fingerprint(version.digest)] for version in model.versions
    }
    logged = [json.loads(line)["version"] for line in log.read_text().splitlines()]
    assert {fingerprint(version.digest) for version in model.versions} <= set(logged)


@pytest.mark.parametrize("command", [["up"], ["serve", "tiny@champion"]])
def test_a_share_without_a_canary_is_refused(tmp_path: Path, command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--canary-weight", "0.2"], env={"GANYMEDE_HOME": str(tmp_path)})
    assert done.exit_code == 2
    assert "--canary NAME@ALIAS" in done.output
    assert not list(tmp_path.iterdir())


def test_a_canary_is_another_version_of_the_same_model(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    for ref in ("model/tiny@1", "model/tiny@2", "model/other@1"):
        publish(store, ref, None)
    stable = find_model("model/tiny@1", store, tmp_path)

    def beside(reference: str) -> ServedModel:
        settings = ServingConfig(canary=CanaryConfig(model=reference, weight=0.1))
        return offer_of(stable, settings, store, tmp_path).model

    assert offer_of(stable, ServingConfig(), store, tmp_path).model == stable
    assert [version.ref for version in beside("model/tiny@2").versions] == ["model/tiny@1", "model/tiny@2"]
    for wrong in ("model/tiny@1", "model/other@1"):
        with pytest.raises(InputError, match="another version of tiny"):
            beside(wrong)
    with pytest.raises(ArtifactError):
        beside("model/tiny@9")
