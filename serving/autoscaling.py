"""How many replicas there should be, from the work that there is.

Counting requests, as Ray Serve's own policy does, takes a prompt of 10 tokens for as much work as one of 10,000. Here
two questions are asked of the replicas' reports: how many it takes to read the prompts that wait within the time to
first token that is aimed at, at the speed that was measured; and how many it takes for every answer to have a seat. The
larger number is wanted; Ray Serve bounds it and delays changes. Standard library only: Ray Serve's controller unpickles
this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Aim:
    """What an endpoint is scaled for."""

    first_token_seconds: float
    """The prompts that wait are to be read within this time."""
    sequences: int
    """Answers that a replica writes together."""
    busy_share: float
    """Of these, how many are to be taken: the rest is room for what comes while a replica starts."""


@dataclass(frozen=True)
class Work:
    """All the work of a deployment at one moment."""

    replicas: int
    """That are running."""
    running: float = 0.0
    """Answers being written."""
    waiting: float = 0.0
    """Requests in replicas that have no token yet."""
    waiting_tokens: float = 0.0
    """Prompt tokens of those."""
    held: float = 0.0
    """Requests that no replica has taken yet."""
    prompt_tokens_per_second: float = 0.0
    """At which a replica reads, measured; 0 before there was anything to read."""


def replicas_wanted(work: Work, aim: Aim) -> float:
    """The number of replicas for this work, not rounded; 0 if there is none."""
    seats = (work.running + work.waiting + work.held) / (aim.busy_share * aim.sequences)
    if work.prompt_tokens_per_second <= 0:
        return seats
    each = work.waiting_tokens / work.waiting if work.waiting else 0.0
    tokens = work.waiting_tokens + work.held * each
    reading = tokens / (work.prompt_tokens_per_second * aim.first_token_seconds)
    return max(seats, reading)


class WorkPolicy:
    """`replicas_wanted` as an autoscaling policy of Ray Serve, over the replicas' `record_autoscaling_stats`."""

    def __init__(self, **aim: Any) -> None:
        self._aim = Aim(**aim)  # Ray Serve hands the fields over one by one

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number wanted for a `ray.serve.config.AutoscalingContext`; of state to keep there is none."""
        return replicas_wanted(work_of(context), self._aim), {}


def work_of(context: Any) -> Work:
    """The deployment's work, from what Ray Serve knows."""
    metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}

    def total(name: str) -> float:
        return sum(metrics.get(name, {}).values())

    speeds = [speed for speed in metrics.get("prompt_tokens_per_second", {}).values() if speed > 0]
    return Work(
        replicas=context.current_num_replicas,
        running=total("running"),
        waiting=total("waiting"),
        waiting_tokens=total("waiting_tokens"),
        held=context.total_queued_requests or 0.0,
        prompt_tokens_per_second=sum(speeds) / len(speeds) if speeds else 0.0,
    )
