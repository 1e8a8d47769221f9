"""Files that a command writes where the user says."""

from __future__ import annotations

from pathlib import Path

from infra.cli.output import say


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all, and says so on standard error. Raises `StorageError` if it cannot."""
    from actors.store.artifacts import write_durably
    from configs.errors import StorageError

    try:
        write_durably(path, content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", next_step="name another file") from error
    say(f"wrote {path}")
