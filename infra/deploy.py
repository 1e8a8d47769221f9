"""Brings a model version up behind an endpoint, and stage `deploy`.

`serve_model` works on the Ray that this process is connected to: it starts Ray Serve, or puts the new version into the
place of the one that runs, which goes on answering meanwhile. It returns once `/health` is 200.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from actors.store.registry import Registry
from actors.store.tracker import tracking_uri
from actors.text import Text
from configs.errors import ConfigError, GanymedeError, InputError
from configs.schema.serving import DeployConfig, ModelSettings, ServingConfig, is_loopback
from infra.platform import free_ports, require_free_port
from infra.served import check_names, find_model, find_offers, offer_of
from pipelines.stage import Progress, StageContext
from serving import data_plane
from serving.calls import Offer, ServedModel

CONTROLLER, CONTROLLER_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Where Ray Serve keeps its controller; it says nowhere else which address it listens on."""
FALLBACK_ALIAS = "candidate"
POLL_SECONDS = 0.1
LOOK = "the logs below <home>/logs/ray/serve have the details"
ANSWER_TOKENS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Models that are being served."""

    url: str
    """Base URL for OpenAI clients."""
    model: ServedModel
    """The first of them."""
    proxy: data_plane.DataPlane
    updated: bool
    """It replaced a version that was being served."""
    start_seconds: float


@dataclass(frozen=True)
class Answer:
    """What the endpoint said to a question, and how fast."""

    question: str
    text: str
    tokens: int
    first_token_seconds: float
    seconds: float


def serve_model(model: ServedModel, config: ServingConfig, *, say: Callable[[str], None]) -> Endpoint:
    """`serve_offers` of one model, with the endpoint's settings of models."""
    return serve_offers([Offer(model, config)], config, say=say)


def serve_offers(offers: Sequence[Offer], config: ServingConfig, *, say: Callable[[str], None]) -> Endpoint:
    """Serves models, and nothing else; returns once all answer. Ray must be initialised.

    Args:
        offers: what to serve, at least one.
        config: where.
        say: told what is being waited for.

    Raises:
        ConfigError: two of them go by one name.
        InputError: the port is taken, Ray Serve runs at another address, or there are too few CPUs.
        ContractError: a model's tokenizer is not the one it was trained with.
        GanymedeError: one does not become ready.
    """
    began = time.monotonic()
    check_names(offers)
    versions = [version for offer in offers for version in offer.model.versions]
    for version in versions:
        Text.load(Path(version.folder))
    running = _running_address()
    if running is None:
        require_free_port(config.port, "--port (in a recipe: stages.<deploy>.serving.port)", config.host)
    elif running != (config.host, config.port):
        raise InputError(
            f"Ray Serve runs at {running[0]}:{running[1]} already, and cannot change its address",
            received=f"{config.host}:{config.port}",
            allowed=f"{running[0]}:{running[1]}",
            next_step="use that address, or end it first: ganymede down",
        )
    _require_cpus(offers)
    require_keys(config)
    proxy = data_plane.available()
    if running is None:
        say(f"starting Ray Serve ({proxy})")
        _start_serve(config, proxy)
    say(f"loading {' and '.join(version.ref for version in versions)}")
    url = f"http://{_client_host(config.host)}:{config.port}"
    updated = _deploy(offers, config, url, deadline=began + config.start_timeout_seconds)
    return Endpoint(f"{url}/v1", offers[0].model, proxy, updated, time.monotonic() - began)


def stop_serving() -> bool:
    """Ends Ray Serve on the connected Ray, requests in flight first; False if it was not running."""
    if _running_address() is None:
        return False
    # Ray prints that the controller died in the middle of a call, which is how Ray Serve ends it.
    with contextlib.redirect_stdout(io.StringIO()):
        _serve_module().shutdown()
    return True


def _serve_module() -> Any:
    """`ray.serve`, with its messages in the log file instead of the terminal."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    from ray import serve

    logger = logging.getLogger("ray.serve")
    logger.handlers.clear()
    logger.propagate = True
    return serve


def _running_address() -> tuple[str, int] | None:
    """Host and port of the Ray Serve that runs on the connected Ray."""
    import ray

    try:
        controller = ray.get_actor(CONTROLLER, namespace=CONTROLLER_NAMESPACE)
        options = ray.get(controller.get_http_config.remote())
    except (ValueError, ray.exceptions.RayActorError):
        return None
    return options.host, options.port


def cpus_needed(offers: Sequence[Offer]) -> float:
    """CPUs for the replicas that are started first."""
    return sum(
        offer.settings.cpus_per_replica * max(1, offer.settings.replicas_min)
        for offer in offers
        for _ in offer.model.versions
    )


def _require_cpus(offers: Sequence[Offer]) -> None:
    """A replica that no node has room for would be waited for without end."""
    import ray

    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    each, largest = max(offer.settings.cpus_per_replica for offer in offers), max(nodes, default=0.0)
    if each > largest:
        raise InputError(
            "serving.cpus_per_replica is more than any node has", received=each, allowed=f"at most {largest:g}"
        )
    needed = cpus_needed(offers)
    if needed > sum(nodes):
        raise InputError(
            "the first replicas of all models need more CPUs than there are",
            received=f"{needed:g}",
            allowed=f"at most {sum(nodes):g}",
            next_step="lower cpus_per_replica (it is what Ray sets aside, and may be below 1) or replicas_min",
        )


def require_keys(config: ServingConfig) -> None:
    """Raises `InputError` where keys are needed and there are none: nobody could ask the endpoint anything."""
    from serving.keys import read_keys

    if config.keys_required and not (config.keys_path is not None and read_keys(config.keys_path)):
        raise InputError(
            f"an endpoint at {config.host} needs API keys, and there are none",
            received=str(config.keys_path),
            allowed="a file with at least one key",
            next_step="ganymede keys add NAME, or bind loopback",
        )


def _start_serve(config: ServingConfig, proxy: data_plane.DataPlane) -> None:
    from serving.app import LOGGING

    environment = data_plane.environment(proxy, config.host, free_ports(data_plane.INTERNAL_PORTS))
    try:
        _serve_module().start(
            http_options={"host": config.host, "port": config.port},
            proxy_location="HeadOnly" if is_loopback(config.host) else "EveryNode",
            logging_config=LOGGING,
            controller_options={"runtime_env": {"env_vars": environment}},
        )
    except TimeoutError:
        # Ray Serve gives its proxy 60 s, which a busy machine can use up. The controller runs, and so will the proxy:
        # the endpoint has until `start_timeout_seconds` to answer.
        logger.warning("the proxy took more than 60 s to start; still waiting for it")


def _deploy(offers: Sequence[Offer], config: ServingConfig, url: str, *, deadline: float) -> bool:
    """Serves `offers`, and returns once all answer; True if that replaced something.

    A canary is there before requests are sent to it, and ends when none can be on its way to it any more.
    """
    from serving.app import APP_NAME, CANARY_APP_PREFIX, build_app, build_canary, canary_app_name

    serve = _serve_module()
    canaries = {
        canary_app_name(offer.model.name): (offer.model.canary, offer.settings)
        for offer in offers
        if offer.model.canary is not None
    }
    targets = [
        serve.RunTarget(build_canary(canary, settings, side_by_side=_has_room(settings)), name, None)
        for name, (canary, settings) in canaries.items()
    ]
    if targets:
        serve.run_many(targets, wait_for_applications_running=False)
    for name, (canary, _) in canaries.items():
        _wait_until(lambda: True, name, canary.ref, deadline)
    updated = APP_NAME in serve.status().applications
    app = build_app(offers, config, side_by_side=lambda offer: _has_room(offer.settings))
    serve.run_many([serve.RunTarget(app, APP_NAME)], wait_for_applications_running=False)
    wanted = {offer.model.name: _told(offer.model) for offer in offers}
    _wait_until(lambda: _health(url) == wanted, APP_NAME, ", ".join(offer.model.ref for offer in offers), deadline)
    for name in serve.status().applications:
        if name.startswith(CANARY_APP_PREFIX) and name not in canaries:
            serve.delete(name)
    return updated


def _has_room(settings: ModelSettings) -> bool:
    """Whether one more replica can be started: one that finds no room would hold an update up for ever. Of several
    models that are updated at once each gives back what it took, so that the room of one is enough.
    """
    import ray

    return ray.available_resources().get("CPU", 0.0) >= settings.cpus_per_replica


def _client_host(host: str) -> str:
    """An address that reaches a server bound to `host` from this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _wait_until(answers: Callable[[], bool], name: str, ref: str, deadline: float) -> None:
    """Returns once Ray Serve is done with an application and its models answer.

    Raises `GanymedeError` if a replica fails for good, or at the deadline.
    """
    serve = _serve_module()
    began, last = time.monotonic(), "no answer"
    while time.monotonic() < deadline:
        app = serve.status().applications[name]
        messages = [deployment.message for deployment in app.deployments.values() if deployment.message]
        last = "\n".join(messages or [app.message]).strip().rpartition("\n")[2] or last
        if app.status == "DEPLOY_FAILED":
            raise GanymedeError(f"{ref} could not be served: {last}", next_step=LOOK)
        if app.status == "RUNNING" and answers():
            return
        time.sleep(POLL_SECONDS)
    raise GanymedeError(
        f"{ref} was not ready after {time.monotonic() - began:.0f} s: {last}",
        next_step=f"free CPUs, or raise serving.start_timeout_seconds; {LOOK}",
    )


def _told(model: ServedModel) -> tuple[list[str], list[str]]:
    """What `/health` says of a model that answers: the digests of its versions, and the names of its adapters."""
    return [version.digest for version in model.versions], [adapter.name for adapter in model.adapters]


def _health(url: str) -> dict[str, tuple[list[str | None], list[str]]]:
    """The same of each model that the endpoint tells of, as it is; none while nobody answers or one is not ready."""
    try:
        with urllib.request.urlopen(f"{url}/health?wake", timeout=10) as response:
            models = json.load(response)["models"]
    except OSError:
        return {}
    return {
        name: (
            [each.get("digest") for each in (found, *([found["canary"]] if "canary" in found else []))],
            found.get("adapters", []),
        )
        for name, found in models.items()
    }


def ask(endpoint: Endpoint, question: str) -> Answer:
    """Asks with the `openai` client, streaming; a model without chat template continues the question.

    Raises:
        InputError: the model writes no texts.
        GanymedeError: the endpoint refuses or does not answer.
    """
    import openai

    name = endpoint.model.name
    began = time.monotonic()
    first, tokens = 0.0, 0
    texts: list[str] = []
    with openai.OpenAI(base_url=endpoint.url, api_key="unused", max_retries=0, timeout=60) as client:
        try:
            options: dict[str, Any] = {
                "model": name, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            can = client.models.retrieve(name).model_extra["capabilities"]
            if "completions" not in can:
                raise InputError(
                    f"{name} writes no texts, and cannot be asked a question",
                    allowed=", ".join(can),
                    next_step="leave question out of the deploy stage",
                )
            if "chat" in can:
                messages = [{"role": "user", "content": question}]
                began = time.monotonic()
                chunks = client.chat.completions.create(messages=messages, **options)
            else:
                began = time.monotonic()
                chunks = client.completions.create(prompt=question, **options)
            for chunk in chunks:
                for choice in chunk.choices:
                    text = choice.delta.content if hasattr(choice, "delta") else choice.text
                    if text:
                        first = first or time.monotonic() - began
                        texts.append(text)
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        except openai.OpenAIError as error:
            raise GanymedeError(f"the endpoint at {endpoint.url} does not answer: {error}") from error
    return Answer(question, "".join(texts), tokens, first, time.monotonic() - began)


class DeployStage:
    """Serves what the alias stands for, and asks it the recipe's question."""

    kind: ClassVar[str] = "deploy"
    artifact_kind: ClassVar[str | None] = None
    code_version: ClassVar[int] = 1

    def sources(self, config: DeployConfig) -> Mapping[str, str]:
        """Nothing from outside the store."""
        return {}

    def run(self, config: DeployConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Returns where the endpoint is, which version it serves, and what it answered. Ray must be initialised.

        Raises:
            GanymedeError: as `find_model`, `serve_model` and `ask`.
        """
        steps = iter(range(1, 3))
        model, wanted = self._model(config, inputs, context)
        own = offer_of(model, config.serving, context.store, context.home)
        model, beside = own.model, find_offers(config.serving.models, context.store, context.home)

        def say(doing: str) -> None:
            context.progress(Progress(next(steps), 2, doing))

        context.check_lease()
        endpoint = serve_offers([own, *beside], config.serving.within(context.home), say=say)
        summary: dict[str, Any] = {
            "url": endpoint.url,
            "model": model.name,
            "registry_version": model.version,
            "alias": model.alias,
            "alias_wanted": wanted,
            "artifact": model.ref,
            "digest": model.digest,
            "canary": model.canary.ref if model.canary else None,
            "adapters": [adapter.ref for adapter in model.adapters],
            "beside": [offer.model.ref for offer in beside],
            "proxy": endpoint.proxy,
            "updated": endpoint.updated,
            "start_seconds": endpoint.start_seconds,
        }
        if config.question is None:
            return summary
        answer = ask(endpoint, config.question)
        return {
            **summary,
            "question": answer.question,
            "answer": answer.text,
            "answer_tokens": answer.tokens,
            "first_token_seconds": answer.first_token_seconds,
            "answer_seconds": answer.seconds,
        }

    def _model(
        self, config: DeployConfig, inputs: Mapping[str, Artifact], context: StageContext
    ) -> tuple[ServedModel, str]:
        """The version to serve, and the alias or reference that was asked for."""
        if "model" in inputs:
            return find_model(str(inputs["model"].ref), context.store, context.home), config.model
        if "@" in config.model:
            return find_model(config.model, context.store, context.home), config.model
        name = context.acted.get("model", {}).get("name")
        if name is None:
            raise ConfigError(
                f"stages.{context.name}.model: stage {config.model!r} was left out, so nothing says what it registered",
                next_step=f"run it too (--from {config.model}), or set stages.{context.name}.model=NAME@ALIAS",
            )
        registry = Registry.open(tracking_uri(context.home))
        aliases = {alias for version in registry.entries() if version.name == name for alias in version.aliases}
        alias = config.alias if config.alias in aliases else FALLBACK_ALIAS
        return find_model(f"{name}@{alias}", context.store, context.home), config.alias
