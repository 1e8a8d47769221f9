"""Which documents a source holds, and which of them are held out.

A listing is the sorted set of (name, blake3 of the content): the same data at another path has the same digest, and a
document is in the validation split or not by its content alone, so that copies of one file never straddle the split.
Every file is one document; its content is read again, and checked against the listing, by whoever processes it.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import blake3

from configs.artifacts import hash_json
from configs.errors import DataError
from configs.schema.corpus import SourceConfig, SplitConfig
from pipelines.corpus.clean import Rejected

STDLIB = "python:stdlib"


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `name` is relative to the source's root, with forward slashes."""

    name: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True)
class Listing:
    """The files of a source, sorted by name, and the files that could not be opened."""

    root: Path
    files: tuple[SourceFile, ...]
    unreadable: tuple[Rejected, ...]

    @property
    def digest(self) -> str:
        """Digest over names and contents; the root and the order of the file system are not in it."""
        readable = [[f.name, f.blake3] for f in self.files]
        return hash_json([readable, sorted(r.name for r in self.unreadable)])

    @property
    def size_bytes(self) -> int:
        """Bytes of all readable files."""
        return sum(f.size_bytes for f in self.files)

    def read(self, file: SourceFile) -> bytes:
        """The content of `file`.

        Raises:
            DataError: it is not what it was when the listing was made.
        """
        try:
            content = (self.root / file.name).read_bytes()
        except OSError as error:
            raise _changed(self.root / file.name, error.strerror or str(error)) from error
        if blake3.blake3(content).hexdigest() != file.blake3:
            raise _changed(self.root / file.name, "other content")
        return content


def _changed(path: Path, received: str) -> DataError:
    return DataError(
        f"{path} changed while the stage was reading the source",
        received=received,
        allowed="the content it had when the stage began",
        next_step="leave the source alone and run again",
    )


def list_source(config: SourceConfig) -> Listing:
    """Finds and hashes every file of a source.

    Raises:
        DataError: the path does not exist, or no file matches.
    """
    path = Path(sysconfig.get_path("stdlib")) if config.path == STDLIB else Path(config.path).expanduser()
    if not path.exists():
        raise DataError(
            "source.path does not exist", received=config.path, allowed=f"a file, a folder or {STDLIB}",
            next_step="correct source.path in the recipe",
        )  # fmt: skip
    root = path if path.is_dir() else path.parent
    files: list[SourceFile] = []
    unreadable: list[Rejected] = []
    for name in sorted(_names(path, config)):
        try:
            content = (root / name).read_bytes()
        except OSError as error:
            unreadable.append(Rejected(name, 0, error.strerror or str(error)))
            continue
        files.append(SourceFile(name, len(content), blake3.blake3(content).hexdigest()))
    if not files and not unreadable:
        raise DataError(
            f"no file below {path} matches the source", received=config.include, allowed="patterns that match a file",
            next_step="correct source.path, source.include or source.exclude in the recipe",
        )  # fmt: skip
    return Listing(root, tuple(files), tuple(unreadable))


def _names(path: Path, config: SourceConfig) -> Iterator[str]:
    if not path.is_dir():
        if _wanted(path.name, config):
            yield path.name
        return
    for folder, folders, names in os.walk(path):
        relative = Path(folder).relative_to(path)
        folders[:] = [f for f in folders if not _pruned((relative / f).as_posix(), config)]
        for name in names:
            joined = (relative / name).as_posix()
            if _wanted(joined, config):
                yield joined


def _wanted(name: str, config: SourceConfig) -> bool:
    included = any(fnmatchcase(name, pattern) for pattern in config.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in config.exclude)


def _pruned(folder: str, config: SourceConfig) -> bool:
    """True if a pattern leaves out all below `folder`: `*` crosses slashes, so `x/*` is the whole tree under x."""
    return any(pattern.endswith("/*") and fnmatchcase(folder, pattern[:-2]) for pattern in config.exclude)


def hash_fraction(salt: str, digest: str) -> float:
    """A number in [0, 1) that `salt` and `digest` decide; uniform over digests."""
    return int.from_bytes(blake3.blake3(f"{salt}\0{digest}".encode()).digest(6), "big") / 2**48


def is_validation(file: SourceFile, split: SplitConfig) -> bool:
    """Whether `file` is held out."""
    return hash_fraction(split.salt, file.blake3) < split.validation_fraction


def check_rejected(rejected: int, total: int, config: SourceConfig, first: Rejected | None) -> None:
    """Raises `DataError` if more of a source's files are unusable than `max_bad_fraction` allows."""
    if first is not None and rejected > config.max_bad_fraction * total:
        raise DataError(
            f"{rejected} of {total} files are unusable; the first is {first.name} at byte {first.offset}: "
            f"{first.reason}",
            received=round(rejected / total, 6),
            allowed=f"source.max_bad_fraction {config.max_bad_fraction}",
            next_step="mend or exclude the files (source.exclude), or raise source.max_bad_fraction",
        )
