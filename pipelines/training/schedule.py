"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from configs.schema.training import OptimConfig


def rate_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a share of the peak.

    All schedules rise linearly over `warmup_fraction` of the steps and end at `final_fraction` with the last step:
    `cosine` and `linear` fall from the end of the warm-up, `wsd` (warm-up, stable, decay; Hu et al. 2024) only in the
    last `decay_fraction` of the steps.
    """
    warmup = round(steps * config.warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, steps - round(steps * config.decay_fraction)) if config.schedule == "wsd" else warmup
    if step < start:
        return 1.0
    fallen = (step + 1 - start) / max(1, steps - start)
    if config.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return 1.0 - (1.0 - config.final_fraction) * fallen
