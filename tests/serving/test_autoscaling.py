"""The number of replicas: what it follows, and how it does on simulated traffic against Ray Serve's own policy."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serving.autoscaling import Aim, Work, WorkPolicy, replicas_wanted

AIM = Aim(first_token_seconds=2.0, sequences=16, busy_share=0.75)
READ, WRITE = 2000.0, 25.0
"""Prompt tokens a second of a replica, answer tokens a second of a sequence."""
START_SECONDS, UP_SECONDS, DOWN_SECONDS = 10, 5, 60
MOST = 8
TICK = 0.25


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (Work(1), 0),
        (Work(1, running=6), 0.5),
        (Work(2, running=24, waiting=12), 3),
        (Work(0, held=1), 1 / 12),
        (Work(1, waiting=2, waiting_tokens=16_000, prompt_tokens_per_second=READ), 4),
        (Work(1, waiting=2, waiting_tokens=16_000, held=2, prompt_tokens_per_second=READ), 8),
        (Work(1, waiting=2, waiting_tokens=16_000), 2 / 12),
        (Work(3, running=36, waiting=1, waiting_tokens=10, prompt_tokens_per_second=READ), 37 / 12),
    ],
)
def test_what_is_wanted_follows_seats_and_waiting_tokens(work: Work, wanted: float) -> None:
    assert replicas_wanted(work, AIM) == pytest.approx(wanted)


@dataclass
class Asked:
    at: float
    prompt: float
    answer: float
    first_token: float | None = None


@dataclass
class Replica:
    """Reads its queue in order as long as there is a seat, and writes all answers at once."""

    ready: float
    queue: deque[Asked] = field(default_factory=deque)
    writing: list[Asked] = field(default_factory=list)

    def run(self, now: float) -> None:
        room = READ * TICK
        while self.queue and len(self.writing) < AIM.sequences and room > 0:
            first = self.queue[0]
            read = min(first.prompt, room)
            first.prompt -= read
            room -= read
            if first.prompt <= 0:
                first.first_token = now
                self.writing.append(self.queue.popleft())
        for asked in self.writing:
            asked.answer -= WRITE * TICK
        self.writing = [asked for asked in self.writing if asked.answer > 0]

    @property
    def ongoing(self) -> int:
        return len(self.queue) + len(self.writing)


Policy = Callable[[AutoscalingContext], Any]


def context(replicas: list[Replica]) -> AutoscalingContext:
    reports = {
        "running": lambda r: len(r.writing), "waiting": lambda r: len(r.queue),
        "waiting_tokens": lambda r: sum(asked.prompt for asked in r.queue), "prompt_tokens_per_second": lambda r: READ,
    }  # fmt: skip
    metrics = {name: {index: float(of(r)) for index, r in enumerate(replicas)} for name, of in reports.items()}
    total = sum(replica.ongoing for replica in replicas)
    target = AIM.busy_share * AIM.sequences
    config = AutoscalingConfig(min_replicas=1, max_replicas=MOST, target_ongoing_requests=target, upscale_delay_s=0)
    count: Any = len(replicas)
    return AutoscalingContext(
        None, "engine", "ganymede", count, count, [], total, 0, metrics, None, 1, MOST, {}, None, None, None, config  # type: ignore[arg-type]  # of the names nothing depends
    )  # fmt: skip


def simulate(arrivals: list[Asked], policy: Policy) -> tuple[float, float]:
    """Share of requests whose first token came in time, and replica seconds."""
    replicas, pending = [Replica(0.0)], deque(arrivals)
    now = cost = 0.0
    wants: deque[int] = deque(maxlen=DOWN_SECONDS)
    while pending or any(replica.ongoing for replica in replicas):
        now += TICK
        running = [replica for replica in replicas if replica.ready <= now]
        while pending and pending[0].at <= now:
            min(running, key=lambda replica: replica.ongoing).queue.append(pending.popleft())
        for replica in running:
            replica.run(now)
        cost += TICK * len(replicas)
        if math.isclose(now % 1.0, 0.0, abs_tol=TICK / 2) and len(running) == len(replicas):
            wants.append(min(MOST, max(1, math.ceil(policy(context(running))))))
            recent = list(wants)[-UP_SECONDS:]
            if len(recent) == UP_SECONDS and min(recent) > len(replicas):
                replicas += [Replica(now + START_SECONDS) for _ in range(min(recent) - len(replicas))]
            elif len(wants) == DOWN_SECONDS and max(wants) < len(replicas):
                replicas = sorted(replicas, key=lambda replica: -replica.ongoing)
                while len(replicas) > max(wants) and not replicas[-1].ongoing:
                    replicas.pop()
    in_time = sum(asked.first_token is not None and asked.first_token - asked.at <= 2.0 for asked in arrivals)
    return in_time / len(arrivals), cost


def traffic(rate: Callable[[float], float], seconds: int, prompt: float, answer: float) -> list[Asked]:
    """Poisson arrivals; prompts' and answers' lengths vary by a factor of about 2."""
    draw, arrivals, now = random.Random(5), [], 0.0
    while now < seconds:
        now += draw.expovariate(5.0)
        if draw.random() < rate(now) / 5.0:
            lengths = (prompt * draw.lognormvariate(0, 0.7), answer * draw.lognormvariate(0, 0.7))
            arrivals.append(Asked(now, *lengths))
    return arrivals


def ours(ctx: AutoscalingContext) -> float:
    return WorkPolicy(first_token_seconds=2.0, sequences=16, busy_share=0.75)(ctx)[0]


def default(ctx: AutoscalingContext) -> float:
    return float(replica_queue_length_autoscaling_policy(ctx)[0])


def test_bursts_of_long_prompts_are_read_in_time_more_often_than_with_the_default_policy() -> None:
    def bursts(now: float) -> float:
        return 3.0 if now % 300 > 180 else 0.2

    results = [simulate(traffic(bursts, 900, 2000, 40), policy) for policy in (ours, default)]
    (in_time, cost), (default_in_time, default_cost) = results
    assert in_time > default_in_time + 0.1, results
    assert cost < 2 * default_cost, results


def test_a_day_of_short_prompts_needs_no_more_replicas_than_with_the_default_policy() -> None:
    def day(now: float) -> float:
        return 2.5 - 2.3 * math.cos(2 * math.pi * now / 600)

    (in_time, cost), (default_in_time, default_cost) = (
        simulate(traffic(day, 600, 50, 250), policy) for policy in (ours, default)
    )
    assert in_time >= default_in_time > 0.9
    assert cost <= default_cost
