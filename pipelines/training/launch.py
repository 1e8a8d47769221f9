"""Ray Train shell: runs a training task on a group of workers and follows it from the driver.

Ray Train starts the group, joins it with gloo (or NCCL), replaces it when a worker dies, and no more: checkpoints,
metrics and resumption are the loop's own, so the loop is the same without Ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import ray
import ray.train
import ray.train.torch

from actors.store.artifacts import remove_tree
from configs.errors import ConfigError, StageError
from configs.schema.training import TrainingConfig
from pipelines.stage import Progress, StageContext
from pipelines.training.metrics import FILE, Follower
from pipelines.training.parallel import Ranks
from pipelines.training.worker import STOP, Task, clear_signals, read_failure, run

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
_log = logging.getLogger("ganymede.training")


def train_on_workers(task: Task, context: StageContext) -> None:
    """Runs `task` to its last step on Ray Train workers, resuming from its newest checkpoint.

    Figures go to the tracker and to progress as they come. If the caller is interrupted, or loses its lease, the
    workers stop after the step at hand, with a checkpoint.

    Raises:
        ConfigError: the cluster has too few processors or GPUs.
        StageError: training diverged, or workers died more often than `max_failures` allows.
        GanymedeError: what a worker could not go on with.
    """
    _check_resources(task.config)
    context.check_lease()
    clear_signals(task.work)
    outcome: list[BaseException] = []
    fitting = threading.Thread(target=_fit, args=(task, outcome), name="ray-train", daemon=True)
    follower = Follower(task.work / FILE)
    context.progress(Progress(0, task.config.steps, "step"))
    fitting.start()
    try:
        checked = time.monotonic()
        while fitting.is_alive():
            fitting.join(_LOOK_SECONDS)
            _forward(follower, task.config, context)
            if time.monotonic() - checked > _LEASE_SECONDS:
                context.check_lease()
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
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers, use_gpu=config.use_gpu, resources_per_worker=resources
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


def _forward(follower: Follower, config: TrainingConfig, context: StageContext) -> None:
    for line in follower.new_lines():
        if "notice" in line:
            _log.warning("%s", line["notice"])
            continue
        step, time_ms = line.pop("step"), line.pop("time_ms")
        context.run.log_metrics(line, step=step, time_ms=time_ms)
        context.progress(Progress(step, config.steps, "step", line))


def _check_resources(config: TrainingConfig) -> None:
    there = ray.cluster_resources()
    needed = {"CPU": config.workers * config.cpus_per_worker, "GPU": config.workers if config.use_gpu else 0}
    for resource, count in needed.items():
        if there.get(resource, 0) < count:
            raise ConfigError(
                f"training needs {count} {resource}s for {config.workers} workers; the cluster has fewer",
                received=there.get(resource, 0),
                allowed=f"at least {count}",
                next_step="lower training.workers or training.cpus_per_worker, or set training.use_gpu=false",
            )


def _explained(error: BaseException, config: TrainingConfig) -> StageError:
    failures = getattr(error, "worker_failures", {})
    causes = "; ".join(f"worker {rank}: {str(cause).strip().splitlines()[-1]}" for rank, cause in failures.items())
    return StageError(
        f"training workers failed more than max_failures = {config.max_failures} times: {causes or error}",
        next_step="look at the worker's log (ray logs); run the same command to resume from the last checkpoint",
    )
