"""Durable checkpoints of a training run: safetensors and JSON, never pickle.

A checkpoint is a folder `step-XXXXXXXX` with `tensors.safetensors` and `state.json`; the latter carries the blake3 of
both. It is written aside, flushed to disk and renamed, so a folder of that name is whole unless the disk itself damaged
it, and that is found on load. Random state is not stored: batches and dropout are functions of the step, and
nothing else is drawn.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.store.artifacts import file_blake3, remove_tree, sync_file, sync_folder
from configs.artifacts import canonical_json
from configs.errors import CorruptArtifactError, StorageError

_TENSORS = "tensors.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps."""

    step: int
    tokens_seen: int
    """Training targets seen so far."""
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run in `folder`; the newest `keep` are kept. One process writes, any may read."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps that checkpoints are there for, newest first."""
        found = (path.name.removeprefix("step-") for path in self._folder.glob("step-*"))
        return sorted((int(name) for name in found if name.isdigit()), reverse=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Makes `checkpoint` durable, then removes those beyond `keep`.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        target = self._path(checkpoint.step)
        if target.exists():
            return
        aside = self._folder / f".{target.name}.{os.getpid()}"
        try:
            remove_tree(aside)
            aside.mkdir(parents=True)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            save_file(tensors, aside / _TENSORS)
            state = {
                "step": checkpoint.step,
                "tokens_seen": checkpoint.tokens_seen,
                "tensors_blake3": file_blake3(aside / _TENSORS),
            }
            (aside / _STATE).write_bytes(canonical_json({"state": state, "blake3": _json_hash(state)}))
            for path in (aside / _TENSORS, aside / _STATE):
                sync_file(path)
            sync_folder(aside)
            aside.rename(target)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise StorageError(
                f"cannot write checkpoint {target}: {error}",
                next_step="free space or make the folder writable, then run the same command: training resumes",
            ) from error
        for step in self.steps()[self._keep :]:
            shutil.rmtree(self._path(step), ignore_errors=True)
        for left in self._folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of `step`.

        Raises:
            CorruptArtifactError: a file is missing, or its content is not what was written.
        """
        folder = self._path(step)
        try:
            document = json.loads((folder / _STATE).read_bytes())
            state = document["state"]
            expected = state["tensors_blake3"], document["blake3"]
            whole = expected == (file_blake3(folder / _TENSORS), _json_hash(state))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(f"checkpoint {folder} cannot be read: {error}") from error
        if not whole:
            raise CorruptArtifactError(
                f"checkpoint {folder} is damaged: its content is not what was written",
                next_step="check the disk; training goes on from the checkpoint before",
            )
        return Checkpoint(state["step"], state["tokens_seen"], load_file(folder / _TENSORS))

    def newest(self, on_damage: Callable[[CorruptArtifactError], None]) -> Checkpoint | None:
        """The newest whole checkpoint; a damaged one is handed to `on_damage` and removed."""
        for step in self.steps():
            try:
                return self.load(step)
            except CorruptArtifactError as error:
                on_damage(error)
                remove_tree(self._path(step))
        return None

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with `prefix/` before each name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` whose names begin with `prefix/`, by the rest of the name."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _json_hash(value: object) -> str:
    return blake3.blake3(canonical_json(value)).hexdigest()
