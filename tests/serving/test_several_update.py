"""Models and adapters come and go beside one that is under load: its replica stays, and no client of it notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest

from configs.schema.serving import ServingConfig
from infra.deploy import serve_offers, stop_serving
from infra.local import quiet_environment, ray_session
from infra.platform import free_ports
from serving.calls import Offer
from tests.serving.test_canary_update import replicas
from tests.serving.test_several_models import PROMPT, home, offers

__all__ = ["home", "offers"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 4
ANSWERS_IN_EACH_STATE = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingConfig]:
    quiet_environment()
    state = tmp_path_factory.mktemp("state")
    (state / "logs").mkdir()
    (port,) = free_ports(1)
    with ray_session(state, least_cpus=2):
        yield ServingConfig(port=port)
        stop_serving()


def test_models_and_adapters_come_and_go_beside_one_under_load(
    offers: tuple[Offer, ...], config: ServingConfig
) -> None:
    base, other, *_ = (
        replace(offer, settings=offer.settings.model_copy(update={"cpus_per_replica": 0.5, "replicas_max": 1}))
        for offer in offers
    )
    bare = replace(base, model=replace(base.model, adapters=()))
    states = [[bare, other], [base, other], [base], [bare]]
    url = serve_offers([bare], config, say=lambda _: None).url
    stable = replicas("engine-base")
    counts: dict[int, int] = {}
    state, over = 0, False

    async def client(number: int) -> set[str]:
        texts = set()
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=180) as api:
            while not over:
                answer = await api.completions.create(model="base", prompt=PROMPT, max_tokens=60, temperature=0)
                texts.add(answer.choices[0].text)
                counts[state] = counts.get(state, 0) + 1
        return texts

    async def names() -> dict[str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=180) as api:
            found = [model.id async for model in api.models.list()]
            answers = [
                await api.completions.create(model=name, prompt=PROMPT, max_tokens=20, temperature=0) for name in found
            ]
        return {name: answer.choices[0].text for name, answer in zip(found, answers, strict=True)}

    async def changes() -> list[dict[str, str]]:
        nonlocal state, over
        clients = asyncio.gather(*map(client, range(CLIENTS)))
        seen = []
        for number, wanted in enumerate(states, 1):
            await asyncio.to_thread(serve_offers, wanted, config, say=lambda _: None)
            state = number
            seen.append(await names())
            while counts.get(number, 0) < CLIENTS * ANSWERS_IN_EACH_STATE:
                assert not clients.done(), clients.exception()
                await asyncio.sleep(0.05)
            assert replicas("engine-base") == stable
        over = True
        assert len(set.union(*await clients)) == 1
        return seen

    seen = asyncio.run(changes())
    assert [tuple(found) for found in seen] == [
        ("base", "other"), ("base", "legal", "medical", "other"), ("base", "legal", "medical"), ("base",),
    ]  # fmt: skip
    assert len(set(seen[1].values())) == 4
    assert replicas("engine-other") == []
