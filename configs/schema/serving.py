"""What is served, where and with how many replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Config, Input, placement


class ServingConfig(Config):
    """An OpenAI-compatible endpoint on Ray Serve."""

    host: str = "127.0.0.1"
    """Address to bind; loopback unless told otherwise."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas_min: Annotated[int, Field(ge=1)] = 1
    replicas_max: Annotated[int, Field(ge=1)] = 2
    max_sequences: Annotated[int, Field(ge=1)] = 16
    """Sequences a replica decodes together."""
    max_queued: Annotated[int, Field(ge=1)] = 128
    """Requests a replica holds before it answers 503."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0


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
