"""What runs in each training process: sets it up, trains, and leaves its errors where the driver finds them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.store.artifacts import write_durably
from configs import errors
from configs.errors import GanymedeError, StageError
from configs.schema.training import TrainingConfig
from pipelines.training import samples
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.hardware import Hardware, is_out_of_memory, peak_memory_bytes
from pipelines.training.loop import Hooks, Trainer
from pipelines.training.metrics import FILE, MetricsFile
from pipelines.training.objectives import Objective
from pipelines.training.parallel import Ranks
from pipelines.training.presence import Presence, is_timeout
from pipelines.training.samples import keep_samples

CHECKPOINTS = "checkpoints"
STOP = "stop"
HARDWARE = "hardware.json"
PEAK = "peak.json"
_FAILURE = "failure.json"


@dataclass(frozen=True)
class Task:
    """One training run, as it is sent to workers."""

    work: Path
    """Folder that all workers share: checkpoints, metrics, hardware, peak memory, stop flag, failure."""
    config: TrainingConfig
    assemble: Callable[[], tuple[nn.Module, Objective[Any]]]
    """Builds model and objective on each worker; must give the same on all."""


def run(task: Task, ranks: Ranks, device: torch.device) -> None:
    """Trains `task` as one of `ranks`.

    A `GanymedeError`, or memory that ran out, ends the run for good and is left for the driver (`read_failure`):
    repeating would only repeat it. Any other exception passes, so that whoever started this process may replace it; if
    it is that other ranks did not come, those are named in a notice.
    """
    if (task.work / _FAILURE).exists():
        return
    torch.set_num_threads(task.config.cpus_per_worker)
    metrics = MetricsFile(task.work / FILE)
    presence = Presence(task.work, ranks.rank, ranks.world_size)

    def resumed(done: int) -> None:
        metrics.resumed(done)
        if not isinstance(task.config.workers, int):
            metrics.append({"notice": f"workers: {ranks.world_size} from step {done + 1} on"})

    try:
        hardware = Hardware.resolve(task.config, device)
        if ranks.rank == 0:
            write_durably(task.work / HARDWARE, json.dumps(hardware.describe()).encode())
        model, objective = task.assemble()
        trainer = Trainer(
            model,
            objective,
            task.config,
            hardware=hardware,
            ranks=ranks,
            checkpoints=Checkpoints(task.work / CHECKPOINTS, every_steps=task.config.checkpoint_every_steps),
            hooks=Hooks(
                report=metrics.append,
                resumed=resumed,
                notice=lambda text: metrics.append({"notice": text}),
                arrived=presence.arrive,
                should_stop=(task.work / STOP).exists,
                wrote=functools.partial(keep_samples, task.work / samples.FILE),
            ),
        )
        trainer.run()
        if ranks.rank == 0:
            write_durably(task.work / PEAK, json.dumps({"peak_memory_bytes": peak_memory_bytes(device)}).encode())
    except GanymedeError as error:
        _leave_failure(task.work, error)
        if not isinstance(error, StageError):
            raise  # the other ranks may be waiting for this one: let the group be replaced, and end at once
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _leave_failure(task.work, _too_large(task.config, error))
        if is_timeout(error):
            waited = f"within {task.config.hang_seconds} s; all workers are replaced"
            metrics.append({"notice": f"{presence.missing()} {waited}"})
        raise
    finally:
        metrics.close()
        presence.close()


def _too_large(config: TrainingConfig, error: BaseException) -> StageError:
    return StageError(
        f"a training worker ran out of memory: {str(error).strip().splitlines()[0]}",
        next_step=f"lower training.micro_batch_rows (now {config.micro_batch_rows}; the batch stays the same), set "
        "training.activation_checkpointing=true, take fewer training.workers a machine, or a smaller model; the last "
        "checkpoint stands",
    )


def _leave_failure(work: Path, error: GanymedeError) -> None:
    fields = {
        "error": type(error).__name__,
        "what": error.what,
        "received": error.received if isinstance(error.received, str | int | float | None) else repr(error.received),
        "allowed": error.allowed,
        "next_step": error.next_step,
    }
    write_durably(work / _FAILURE, json.dumps(fields).encode())


def clear_signals(work: Path) -> None:
    """Removes stop flag and failure of an earlier attempt."""
    for name in (STOP, _FAILURE):
        (work / name).unlink(missing_ok=True)


def read_failure(work: Path) -> GanymedeError | None:
    """The error that ended the run for good, if one did."""
    path = work / _FAILURE
    if not path.exists():
        return None
    fields = json.loads(path.read_bytes())
    kind: type[GanymedeError] = getattr(errors, fields.pop("error"))
    return kind(fields.pop("what"), **fields)
