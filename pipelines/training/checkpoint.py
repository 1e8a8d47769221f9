"""Durable checkpoints of a training run: safetensors and JSON, never pickle.

A checkpoint is a folder `step-XXXXXXXX` of shards and `state.json`. Shard r of n is a safetensors file that rank r of n
writes: its rows of every tensor, cut as `Ranks.rows` says, one after another; a run whose ranks all hold everything
writes a single one. `state.json` has the shape of every tensor, where its rows are cut, the blake3 of every shard and
of itself. A checkpoint can be read by any number of ranks, each of which opens the shards that hold its rows.

All is written aside, flushed to disk and renamed, so a folder of that name is whole unless the disk itself damaged
it, and that is found on load. Random state is not stored: batches and dropout are functions of the step, and
nothing else is drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actors.store.artifacts import file_blake3, remove_tree, sync_file, sync_folder
from configs.artifacts import canonical_json
from configs.errors import CorruptArtifactError, StorageError
from pipelines.training.parallel import Ranks

_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps, or what one rank holds of it."""

    step: int
    tokens_seen: int
    """Training targets seen so far."""
    tensors: Mapping[str, Tensor]
    """By name; of a rank that holds a part, its rows of each."""
    recent_losses: tuple[float, ...] = ()
    """What the guard compares later losses with."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the whole tensors, where `tensors` are rows of them."""


class Checkpoints:
    """The checkpoints of one run in `folder`; the newest `keep` are kept, and those of every `every_steps`-th step.
    One run writes, any process may read.
    """

    def __init__(self, folder: Path, *, keep: int = 2, every_steps: int | None = None) -> None:
        self._folder = folder
        self._keep = keep
        self._every_steps = every_steps

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of `step` stays when newer ones are there."""
        return self._every_steps is not None and step % self._every_steps == 0

    def steps(self) -> list[int]:
        """Steps that checkpoints are there for, newest first."""
        found = (path.name.removeprefix("step-") for path in self._folder.glob("step-*"))
        return sorted((int(name) for name in found if name.isdigit()), reverse=True)

    def save(self, checkpoint: Checkpoint, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - frozen
        """Makes `checkpoint` durable, then removes those that are not to be kept.

        Each of `ranks` gives the rows that it holds, all of them at the same time.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        target = aside = self._path(checkpoint.step)
        device = next(iter(checkpoint.tensors.values())).device
        try:
            # The first rank's process id tells apart what a run that was killed, or is about to be, writes aside.
            writer = ranks.from_first(self._begin(target) if ranks.rank == 0 else 0, device)
            if writer == 0:
                return
            aside = _aside(target, writer)
            shard = aside / _shard_name(ranks.rank, ranks.world_size)
            save_file({name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}, shard)
            sync_file(shard)
            digests = ranks.gather(bytes.fromhex(file_blake3(shard)), device)
            if ranks.rank == 0:
                self._finish(checkpoint, aside, target, [digest.hex() for digest in digests])
        except OSError as error:
            if aside != target:
                shutil.rmtree(aside, ignore_errors=True)
            raise StorageError(
                f"cannot write checkpoint {target}: {error}",
                next_step="free space or make the folder writable, then run the same command: training resumes",
            ) from error

    def load(self, step: int, ranks: Ranks = Ranks()) -> Checkpoint:  # noqa: B008 - frozen
        """What `ranks` holds of the checkpoint of `step`; what is read of it is verified.

        Raises:
            CorruptArtifactError: a file is missing, or its content is not what was written.
        """
        folder = self._path(step)
        with _readable(folder):
            state = _read_state(folder)
            places = {number: _places(state, ranks, number) for number in range(len(state["blake3"]))}
            used = {number: found for number, found in places.items() if found}
            _verify(folder, state, used)
            tensors = _read(folder, state, used)
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        return Checkpoint(state["step"], state["tokens_seen"], tensors, tuple(state["recent_losses"]), shapes)

    def newest(self, on_damage: Callable[[CorruptArtifactError], None]) -> int | None:
        """Step of the newest whole checkpoint; a damaged one is handed to `on_damage` and removed."""
        for step in self.steps():
            folder = self._path(step)
            try:
                with _readable(folder):
                    state = _read_state(folder)
                    _verify(folder, state, range(len(state["blake3"])))
                return step
            except CorruptArtifactError as error:
                on_damage(error)
                remove_tree(folder)
        return None

    def _begin(self, target: Path) -> int:
        """Makes the folder that a checkpoint is written to aside; this process's id, or 0 if the checkpoint stands."""
        if target.exists():
            return 0
        for left in self._folder.glob(".step-*"):
            remove_tree(left)
        _aside(target, os.getpid()).mkdir(parents=True)
        return os.getpid()

    def _finish(self, checkpoint: Checkpoint, aside: Path, target: Path, digests: list[str]) -> None:
        """Makes the shards in `aside` the checkpoint `target`."""
        whole = {name: list(checkpoint.shapes.get(name, tensor.shape)) for name, tensor in checkpoint.tensors.items()}
        state = {
            "step": checkpoint.step,
            "tokens_seen": checkpoint.tokens_seen,
            "recent_losses": list(checkpoint.recent_losses),
            "shapes": whole,
            "blake3": digests,
        }
        (aside / _STATE).write_bytes(canonical_json({"state": state, "blake3": _json_hash(state)}))
        sync_file(aside / _STATE)
        sync_folder(aside)
        aside.rename(target)
        sync_folder(self._folder)
        for step in [step for step in self.steps() if not self.is_kept(step)][self._keep :]:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `prefix/` before each name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix/`, by the rest of the name."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _aside(target: Path, writer: int) -> Path:
    return target.with_name(f".{target.name}.{writer}")


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CorruptArtifactError(f"checkpoint {folder} cannot be read: {error}") from error


def _read_state(folder: Path) -> dict[str, Any]:
    document = json.loads((folder / _STATE).read_bytes())
    if document["blake3"] != _json_hash(document["state"]):
        raise _damaged(folder)
    state: dict[str, Any] = document["state"]
    return state


def _verify(folder: Path, state: Mapping[str, Any], shards: Iterable[int]) -> None:
    digests = state["blake3"]
    for number in shards:
        if file_blake3(folder / _shard_name(number, len(digests))) != digests[number]:
            raise _damaged(folder)


def _damaged(folder: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"checkpoint {folder} is damaged: its content is not what was written",
        next_step="check the disk; training goes on from the checkpoint before",
    )


def _places(state: Mapping[str, Any], ranks: Ranks, shard: int) -> dict[str, slice]:
    """Where in `shard` rows lie that `ranks` holds, of each tensor that has such rows there."""
    places = {}
    for name, shape in state["shapes"].items():
        count = shape[0] if shape else 1
        wanted, there = ranks.rows(count), Ranks(shard, len(state["blake3"])).rows(count)
        begin, end = max(wanted.start, there.start), min(wanted.stop, there.stop)
        if begin < end:
            places[name] = slice(begin - there.start, end - there.start)
    return places


def _read(folder: Path, state: Mapping[str, Any], shards: Mapping[int, Mapping[str, slice]]) -> dict[str, Tensor]:
    """The tensors whose rows lie in `shards`, by place."""
    found: dict[str, list[Tensor]] = {name: [] for name in state["shapes"]}
    for number, places in shards.items():
        with safe_open(folder / _shard_name(number, len(state["blake3"])), framework="pt") as shard:
            for name, place in places.items():
                scalar = not state["shapes"][name]
                found[name].append(shard.get_tensor(name) if scalar else shard.get_slice(name)[place])
    none = {name: torch.empty((0, *shape[1:])) for name, shape in state["shapes"].items()}
    return {name: torch.cat(rows) if len(rows) > 1 else (rows or [none[name]])[0] for name, rows in found.items()}


def _json_hash(value: object) -> str:
    return blake3.blake3(canonical_json(value)).hexdigest()
