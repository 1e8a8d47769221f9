"""What is served, where and with how many replicas."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, Input, placement

KEY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ApiKey(Config):
    """A key as it is kept: never the key itself."""

    name: Annotated[str, Field(pattern=KEY_NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    models: tuple[str, ...] = ()
    """Names of the models it may ask; all if empty."""
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Prompt and answer tokens together."""


class CanaryConfig(Config):
    """A second version of the model that is served, which gets a share of the requests."""

    model: Annotated[str, Field(min_length=1)]
    """NAME@ALIAS or NAME@VERSION of the registry, or model/NAME@VERSION: the same name, another version."""
    weight: Annotated[float, Field(gt=0, lt=1)]
    """Share of those who ask (the field `user` of requests; where it is missing, of the requests) that get it."""


class ModelSettings(Config):
    """How one model is served: its replicas, a second version beside it, adapters over it."""

    replicas_min: Annotated[int, Field(ge=0)] = 1
    """0 lets the last replica go after `idle_seconds`; the next request waits until one has started."""
    replicas_max: Annotated[int, Field(ge=1)] = 2
    """Replicas of the engine under load; between the two, their number follows the work there is."""
    idle_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Without work for this long, the last replica ends if `replicas_min` is 0."""
    first_token_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Replicas are added when the prompts that wait cannot be read within this time."""
    max_sequences: Annotated[int, Field(ge=1)] = 16
    """Sequences a replica decodes together."""
    max_queued: Annotated[int, Field(ge=1)] = 128
    """Sequences that wait in a replica before it answers 503; also the most prompts of one request."""
    max_adapters: Annotated[int, Field(ge=1)] = 8
    """Adapters that a replica holds beside the model; the one that was asked for least recently makes room."""
    canary: CanaryConfig | None = None
    """A second version beside the one that is served, with as many replicas as it may have."""
    adapters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Adapters (`finetune` with `lora.merge: false`) that the replicas run too, each under a name of its own:
    NAME@ALIAS or NAME@VERSION of the registry, or model/NAME@VERSION."""
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    """`auto`: bf16 where the processor or GPU has it, fp32 elsewhere; `fp32` gives the same tokens everywhere; `int8`
    rounds the weights of Llama-shaped models on a CPU, which are read up to four times as fast then."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    queue_limit_seconds: Annotated[float, Field(gt=0)] = 120.0
    """A request that has no token after this time is answered 503 instead of being read."""
    drain_limit_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A replica that is replaced or no longer needed has this time to finish its answers; they are cut off then."""
    step_limit_seconds: Annotated[float, Field(gt=0)] = 8.0
    """A replica whose engine takes longer over one step counts as hung and is replaced."""

    @model_validator(mode="after")
    def _range_of_replicas(self) -> Self:
        if self.replicas_max < self.replicas_min:
            raise ValueError(f"replicas_max {self.replicas_max} must be at least replicas_min {self.replicas_min}")
        return self


OF_ONE_MODEL = frozenset({"canary", "adapters"})
"""Settings that are never those of several models."""


class ServedModelConfig(ModelSettings):
    """One of several models behind an endpoint."""

    model: Annotated[str, Field(min_length=1)]
    """NAME@ALIAS or NAME@VERSION of the registry, or model/NAME@VERSION."""


class ServingConfig(ModelSettings):
    """An OpenAI-compatible endpoint on Ray Serve. The settings of models are those of all that do not say otherwise."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to bind; loopback unless told otherwise."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    models: tuple[ServedModelConfig, ...] = ()
    """What is served; in a recipe, beside the stage's own model."""
    max_body_bytes: Annotated[int, Field(ge=1 << 10)] = 4 << 20
    """Longer request bodies are answered 413."""
    body_limit_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A request whose headers or body take longer to arrive is answered 408."""
    keys_path: Path | None = None
    """File with the API keys; `<home>/keys.json` unless set, which `ganymede keys add` writes."""
    require_keys: bool | None = None
    """Whether requests need an API key; unless set, as soon as `host` is not loopback."""
    access_log: Path | None = None
    """File that gets a line of JSON for each request, without what was asked or answered; `<home>/logs/access.jsonl`
    unless set."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time the endpoint has to become ready before the deployment counts as failed."""

    @model_validator(mode="before")
    @classmethod
    def _common_settings(cls, data: Any) -> Any:
        """What is set for all models becomes a setting of each that does not set it."""
        if not isinstance(data, dict) or not isinstance(data.get("models"), list | tuple):
            return data
        common = {key: data[key] for key in ModelSettings.model_fields.keys() & data.keys() - OF_ONE_MODEL}
        models = [{**common, **each} if isinstance(each, dict) else each for each in data["models"]]
        return {**data, "models": models}

    @property
    def keys_required(self) -> bool:
        """Whether requests need an API key."""
        return not is_loopback(self.host) if self.require_keys is None else self.require_keys

    def within(self, home: Path) -> Self:
        """The same with the places under the state folder that are not set."""
        places = {"keys_path": home / "keys.json", "access_log": home / "logs" / "access.jsonl"}
        return self.model_copy(update={name: path for name, path in places.items() if getattr(self, name) is None})


class DeployConfig(Config):
    """Stage `deploy`: serves a registered model version; acts on the running cluster and publishes nothing."""

    kind: Literal["deploy"] = "deploy"
    model: Input
    """The `register` stage, or NAME@ALIAS of a registered model."""
    alias: str = "champion"
    """Alias resolved to an immutable version when the stage runs; `candidate` is served, and said so, if it has
    no version."""
    serving: ServingConfig = placement(ServingConfig())
    question: str | None = None
    """Asked of the endpoint with the `openai` client once it is up."""

    @model_validator(mode="after")
    def _can_ask(self) -> Self:
        if self.question is not None and self.serving.keys_required:
            raise ValueError("question is asked without an API key; leave it out where serving requires keys")
        return self
