"""Ray Train shell: runs a training task on a group of workers and follows it from the driver.

Ray Train starts the group, joins it with gloo (or NCCL), and replaces it when a worker dies or, where the number of
workers may vary, when machines leave or come, and no more: checkpoints, metrics and resumption are the loop's own, so
the loop is the same without Ray.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
import threading
import time
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from actors.store.artifacts import remove_tree
from configs.errors import ConfigError, StageError
from configs.schema.training import TrainingConfig
from pipelines.stage import Progress, StageContext
from pipelines.training.hardware import Hardware
from pipelines.training.metrics import FILE, Follower, read_metrics
from pipelines.training.parallel import Ranks
from pipelines.training.preflight import Plan, can_try, check, plan, survey, trial
from pipelines.training.worker import PEAK, STOP, Task, clear_signals, read_failure, run

_RAY_SETTINGS = {
    # The controller looks at its workers this often; the default of 2 s is added to the end of every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Each of these starts an actor, or a server connection, that has no use for a group that is simply replaced.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Workers stay in the driver's directory, so that relative paths mean the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_LOOK_SECONDS = 0.3
_LEASE_SECONDS = 5.0
_STOP_SECONDS = 30.0
_RESIZE_SECONDS = 20.0
"""How often a run with room for more workers looks whether they can be had."""
_log = logging.getLogger("ganymede.training")


def train_on_workers(task: Task, skeleton: nn.Module, row_tokens: int, context: StageContext) -> dict[str, Any]:
    """Runs `task` to its last step on Ray Train workers, resuming from its newest checkpoint.

    Before they start it tells what the run will need; the returned summary has that beside what was measured. Figures
    go to the tracker and to progress as they come. If the caller is interrupted, or loses its lease, the workers stop
    after the step at hand, with a checkpoint.

    Args:
        task: what is trained.
        skeleton: its model without memory for the weights.
        row_tokens: longest row, in positions.
        context: what the runner gave the stage.

    Raises:
        ConfigError: the cluster has too few processors or GPUs, or the run does not fit into memory.
        StageError: training diverged, or workers died more often than `max_failures` allows.
        GanymedeError: what a worker could not go on with.
    """
    _check_resources(task.config)
    planned = _look_ahead(task, skeleton, row_tokens, context)
    context.check_lease()
    clear_signals(task.work)
    outcome: list[BaseException] = []
    fitting = threading.Thread(target=_fit, args=(task, outcome), name="ray-train", daemon=True)
    follower = Follower(task.work / FILE)
    context.progress(Progress(0, task.config.steps, "step"))
    fitting.start()
    done = 0
    try:
        checked = time.monotonic()
        while fitting.is_alive():
            fitting.join(_LOOK_SECONDS)
            done = max(done, _forward(follower, task.config, context))
            if time.monotonic() - checked > _LEASE_SECONDS:
                context.check_lease()
                context.run.log_metrics(_machine_figures(), step=done)
                checked = time.monotonic()
    except BaseException:
        (task.work / STOP).touch()
        fitting.join(_STOP_SECONDS)
        raise
    failure = read_failure(task.work)
    if failure is not None:
        raise failure
    if outcome:
        raise _explained(outcome[0], task.config) from outcome[0]
    return {"preflight": _compare(planned, task, context)}


def _look_ahead(task: Task, skeleton: nn.Module, row_tokens: int, context: StageContext) -> Plan:
    """Tells what the run will need; raises `ConfigError` if that is not there."""
    config = task.config
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    seen = not config.use_gpu or torch.cuda.is_available()
    facts = survey(
        skeleton,
        row_tokens,
        config,
        memory_bytes=_free_memory(config, machines) if seen else None,
        workers_on_machine=1 if config.use_gpu else -(-config.most_workers // machines),
    )
    check(plan(facts, config), facts, config)
    if seen and can_try(facts):
        hardware = Hardware.resolve(config, torch.device("cuda" if config.use_gpu else "cpu"))
        facts = dataclasses.replace(facts, trial=trial(task.assemble, config, hardware))
    planned = plan(facts, config)
    check(planned, facts, config)
    context.progress(Progress(0, config.steps, "step", note=f"preflight: {planned.describe()}"))
    return planned


def _free_memory(config: TrainingConfig, machines: int) -> int:
    """Bytes: of the GPU of a worker, of this machine, or of the smallest machine of several."""
    if config.use_gpu:
        return int(torch.cuda.mem_get_info()[0])
    if machines > 1:
        return int(min(node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]))
    return int(psutil.virtual_memory().available)


def _compare(planned: Plan, task: Task, context: StageContext) -> dict[str, Any]:
    """What was expected and what came, for the summary; the figures of both that can be compared go to the tracker."""
    rates = [line["tokens_per_second"] for line in read_metrics(task.work / FILE) if "tokens_per_second" in line]
    peak = json.loads((task.work / PEAK).read_bytes())["peak_memory_bytes"]
    measured = {"worker_bytes": peak, "tokens_per_second": statistics.median(rates)}
    predicted = dataclasses.asdict(planned)
    for name, value in measured.items():
        pair = {f"preflight/predicted_{name}": predicted[name], f"preflight/measured_{name}": value}
        context.run.log_metrics({k: v for k, v in pair.items() if v is not None}, step=task.config.steps)
    return {"predicted": predicted, "measured": measured}


def _fit(task: Task, outcome: list[BaseException]) -> None:
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    storage = task.work / "ray"
    config = task.config
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {})
    try:
        remove_tree(storage)
        ray.train.torch.TorchTrainer(
            _work,
            train_loop_config={"task": task},
            torch_config=ray.train.torch.TorchConfig(
                backend="nccl" if config.use_gpu else "gloo", timeout_s=config.hang_seconds
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.use_gpu,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=str(storage),
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            ),
        ).fit()
    except BaseException as error:  # noqa: BLE001 - handed to the driver's thread, which raises it
        outcome.append(error)


def _work(settings: dict[str, Any]) -> None:
    run(settings["task"], Ranks.current(), ray.train.torch.get_device())


def _forward(follower: Follower, config: TrainingConfig, context: StageContext) -> int:
    """Hands new lines on; the last step among them, or 0."""
    step = 0
    for line in follower.new_lines():
        if "notice" in line:
            _log.warning("%s", line["notice"])
            continue
        step, time_ms = line.pop("step"), line.pop("time_ms")
        context.run.log_metrics(line, step=step, time_ms=time_ms)
        context.progress(Progress(step, config.steps, "step", line))
    return step


def _machine_figures() -> dict[str, float]:
    """What the driver's machine is doing, beside the curves of training."""
    memory = psutil.virtual_memory()
    figures = {"system/cpu_percent": psutil.cpu_percent(), "system/memory_used_gb": memory.used / 1e9}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        figures["system/gpu_memory_used_gb"] = (total - free) / 1e9
    return figures


def _check_resources(config: TrainingConfig) -> None:
    there = ray.cluster_resources()
    workers = config.fewest_workers
    needed = {"CPU": workers * config.cpus_per_worker, "GPU": workers if config.use_gpu else 0}
    for resource, count in needed.items():
        if there.get(resource, 0) < count:
            raise ConfigError(
                f"training needs {count} {resource}s for {workers} workers; the cluster has fewer",
                received=there.get(resource, 0),
                allowed=f"at least {count}",
                next_step="lower training.workers or training.cpus_per_worker, or set training.use_gpu=false",
            )


def _explained(error: BaseException, config: TrainingConfig) -> StageError:
    failures = getattr(error, "worker_failures", {})
    causes = "; ".join(f"worker {rank}: {str(cause).strip().splitlines()[-1]}" for rank, cause in failures.items())
    return StageError(
        f"training workers failed more than max_failures = {config.max_failures} times: {causes or error}",
        next_step="look at the worker's log (ray logs); if the system killed it for memory, lower "
        f"training.micro_batch_rows (now {config.micro_batch_rows}); run the same command to resume from the last "
        "checkpoint",
    )
