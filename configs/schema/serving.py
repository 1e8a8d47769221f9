"""What is served, where and with how many replicas."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, Input, placement


class ServingConfig(Config):
    """An OpenAI-compatible endpoint on Ray Serve."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to bind; loopback unless told otherwise."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas_min: Annotated[int, Field(ge=1)] = 1
    replicas_max: Annotated[int, Field(ge=1)] = 2
    """Replicas of the engine under load; between the two, their number follows the requests in flight."""
    max_sequences: Annotated[int, Field(ge=1)] = 16
    """Sequences a replica decodes together."""
    max_queued: Annotated[int, Field(ge=1)] = 128
    """Sequences that wait in a replica before it answers 503; also the most prompts of one request."""
    max_body_bytes: Annotated[int, Field(ge=1 << 10)] = 4 << 20
    """Longer request bodies are answered 413."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the processor or GPU has it, fp32 elsewhere; `fp32` gives the same tokens everywhere."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Time the endpoint has to become ready before the deployment counts as failed."""

    @model_validator(mode="after")
    def _range_of_replicas(self) -> Self:
        if self.replicas_max < self.replicas_min:
            raise ValueError(f"replicas_max {self.replicas_max} must be at least replicas_min {self.replicas_min}")
        return self


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
