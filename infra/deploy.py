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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.registry import RegisteredVersion, Registry
from actors.store.tracker import tracking_uri
from actors.text import Text
from configs.artifacts import Ref
from configs.errors import ArtifactError, ConfigError, GanymedeError, InputError
from configs.schema.serving import DeployConfig, ServingConfig, is_loopback
from infra.platform import free_ports, require_free_port
from pipelines.evaluation.lineage import ancestors
from pipelines.stage import Progress, StageContext
from serving import data_plane
from serving.calls import Ancestor, Lineage, ServedModel

CONTROLLER, CONTROLLER_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Where Ray Serve keeps its controller; it says nowhere else which address it listens on."""
FALLBACK_ALIAS = "candidate"
POLL_SECONDS = 0.1
LOOK = "the logs below <home>/logs/ray/serve have the details"
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Endpoint:
    """A model that is being served."""

    url: str
    """Base URL for OpenAI clients."""
    model: ServedModel
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


def find_model(reference: str, store: ArtifactStore, home: Path) -> ServedModel:
    """The immutable version that `NAME@ALIAS`, `NAME@VERSION`, `NAME` or `model/NAME@VERSION` stands for now.

    Raises:
        ArtifactError: there is none, or its artifact is not in this store.
        CorruptArtifactError: the artifact is not what was published.
        TrackingError: the registry cannot be reached.
    """
    if "/" in reference:
        artifact = store.get(Ref.parse(reference))
        return _served(artifact, store, name=artifact.ref.name, version=None, alias=None)
    version = Registry.open(tracking_uri(home)).resolve(reference)
    return _registered(version, reference.partition("@")[2] or None, store)


def _registered(version: RegisteredVersion, selector: str | None, store: ArtifactStore) -> ServedModel:
    artifact = store.get(version.ref)
    if artifact.digest != version.digest:
        raise ArtifactError(
            f"{version} is registered with another content than {version.ref} has in this store",
            received=artifact.digest[:16],
            allowed=version.digest[:16],
            next_step="set GANYMEDE_HOME to the store it was registered from, or run the recipe again",
        )
    alias = selector if selector in version.aliases else None
    return _served(artifact, store, name=version.name, version=version.version, alias=alias)


def _served(
    artifact: Artifact, store: ArtifactStore, *, name: str, version: int | None, alias: str | None
) -> ServedModel:
    if artifact.ref.kind != "model":
        raise ArtifactError("only models can be served", received=str(artifact.ref), allowed="model/NAME@VERSION")
    return ServedModel(
        name,
        str(artifact.path),
        str(artifact.ref),
        artifact.digest,
        version,
        alias,
        created=int(time.time()),
        lineage=_lineage(artifact, store),
    )


def _lineage(artifact: Artifact, store: ArtifactStore) -> Lineage:
    """What the model was made from, and the reports that any of the store's evaluations made of this content."""
    _, *sources = ancestors([artifact.manifest], store)
    reports = [
        manifest
        for manifest in store.list()
        if manifest.kind == "report" and artifact.digest in {record.digest for record in manifest.inputs.values()}
    ]
    return Lineage(
        artifact.manifest.tracking_run,
        tuple(Ancestor(ref, digest, None if m is None else m.tracking_run) for ref, digest, m in sources),
        tuple(Ancestor(str(manifest.ref), manifest.digest, manifest.tracking_run) for manifest in reports),
    )


def serve_model(model: ServedModel, config: ServingConfig, *, say: Callable[[str], None]) -> Endpoint:
    """Serves `model` and returns once it answers. Ray must be initialised.

    Args:
        model: what to serve.
        config: where, and with how many replicas.
        say: told what is being waited for.

    Raises:
        InputError: the port is taken, Ray Serve runs at another address, or there are too few CPUs.
        ContractError: the model's tokenizer is not the one it was trained with.
        GanymedeError: it does not become ready.
    """
    began = time.monotonic()
    Text.load(Path(model.folder))
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
    _require_cpus(config)
    require_keys(config)
    proxy = data_plane.available()
    if running is None:
        say(f"starting Ray Serve ({proxy})")
        _start_serve(config, proxy)
    say(f"loading {model.ref}")
    updated = _deploy_app(model, config)
    url = f"http://{_client_host(config.host)}:{config.port}"
    _wait_until_ready(url, model, config.start_timeout_seconds - (time.monotonic() - began))
    return Endpoint(f"{url}/v1", model, proxy, updated, time.monotonic() - began)


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


def _require_cpus(config: ServingConfig) -> None:
    """A replica that no node has room for would be waited for without end."""
    import ray

    largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if config.cpus_per_replica > largest:
        raise InputError(
            "serving.cpus_per_replica is more than any node has",
            received=config.cpus_per_replica,
            allowed=f"at most {largest:g}",
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
    _serve_module().start(
        http_options={"host": config.host, "port": config.port},
        proxy_location="HeadOnly" if is_loopback(config.host) else "EveryNode",
        logging_config=LOGGING,
        controller_options={"runtime_env": {"env_vars": environment}},
    )


def _deploy_app(model: ServedModel, config: ServingConfig) -> bool:
    """Hands the application to Ray Serve without waiting for it; True if one was running."""
    import ray

    from serving.app import APP_NAME, build_app

    serve = _serve_module()
    updated = APP_NAME in serve.status().applications
    # A second replica that finds no room would hold the update up for ever.
    room = ray.available_resources().get("CPU", 0.0) >= config.cpus_per_replica
    target = serve.RunTarget(build_app(model, config, side_by_side=room), name=APP_NAME)
    serve.run_many([target], wait_for_applications_running=False)
    return updated


def _client_host(host: str) -> str:
    """An address that reaches a server bound to `host` from this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _wait_until_ready(url: str, model: ServedModel, seconds: float) -> None:
    """Returns once Ray Serve is done and `/health` answers for `model`.

    Raises `GanymedeError` if a replica fails for good, or when `seconds` are over.
    """
    from serving.app import APP_NAME

    serve = _serve_module()
    deadline = time.monotonic() + seconds
    last = "no answer"
    while time.monotonic() < deadline:
        app = serve.status().applications[APP_NAME]
        messages = [deployment.message for deployment in app.deployments.values() if deployment.message]
        last = "\n".join(messages or [app.message]).strip().rpartition("\n")[2] or last
        if app.status == "DEPLOY_FAILED":
            raise GanymedeError(f"{model.ref} could not be served: {last}", next_step=LOOK)
        if app.status == "RUNNING" and _health(url).get("digest") == model.digest:
            return
        time.sleep(POLL_SECONDS)
    raise GanymedeError(
        f"{model.ref} was not ready after {seconds:.0f} s: {last}",
        next_step=f"free CPUs, or raise serving.start_timeout_seconds; {LOOK}",
    )


def _health(url: str) -> dict[str, Any]:
    """What `/health` says; empty while nobody answers or no replica is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health?wake", timeout=10) as response:
            return dict(json.load(response))
    except OSError:
        return {}


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

        def say(doing: str) -> None:
            context.progress(Progress(next(steps), 2, doing))

        context.check_lease()
        endpoint = serve_model(model, config.serving.within(context.home), say=say)
        summary: dict[str, Any] = {
            "url": endpoint.url,
            "model": model.name,
            "registry_version": model.version,
            "alias": model.alias,
            "alias_wanted": wanted,
            "artifact": model.ref,
            "digest": model.digest,
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
