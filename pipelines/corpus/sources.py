"""Which files a source holds, wherever it is, and what they contain.

A listing is the sorted set of (name, blake3 of the content), with names relative to the source: the same data at
another path, in another store or on another machine has the same digest. A file's size, times and entity tag only
decide whether it has to be hashed again (`pipelines.corpus.known_hashes`).
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import blake3
from pyarrow import fs

from configs.artifacts import hash_json
from configs.errors import DataError, StorageError
from configs.schema.corpus import SourceConfig, SplitConfig
from pipelines.corpus.known_hashes import SourceHashes, hashes_of, take_stamp

STDLIB = "python:stdlib"
HUB = "hf://"
DATA = "data:"
DATA_FOLDER = "GANYMEDE_DATA"

_CHUNK_BYTES = 1 << 22
_HASHING_THREADS = 8
_NO_ANSWER = re.compile(
    r"AWS Error (NETWORK_CONNECTION|REQUEST_TIMEOUT|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING)"
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL)"
)
_REFUSAL = re.compile(r"AWS Error (\w+)")


@dataclass(frozen=True)
class Rejected:
    """Something of a source that cannot be used."""

    name: str
    """Path relative to the source."""
    offset: int
    """Byte in the file, after decompression; row in a Parquet or Arrow file."""
    reason: str
    rest: bool = False
    """Whether the rest of the file is lost with it."""


@dataclass(frozen=True)
class SourceFile:
    """A file of a source. `name` is relative to the source's root, with forward slashes."""

    name: str
    size_bytes: int
    blake3: str


@dataclass(frozen=True)
class Listing:
    """The files of a source, sorted by name, and the files that could not be opened. Can be sent to other machines."""

    filesystem: Any
    """`pyarrow.fs.FileSystem` that the files are in."""
    root: str
    files: tuple[SourceFile, ...]
    unreadable: tuple[Rejected, ...] = ()

    @property
    def digest(self) -> str:
        """Digest over names and contents; the root and the order of the file system are not in it."""
        readable = [[f.name, f.blake3] for f in self.files]
        return hash_json([readable, sorted(r.name for r in self.unreadable)])

    @property
    def size_bytes(self) -> int:
        """Bytes of all readable files."""
        return sum(f.size_bytes for f in self.files)

    def open(self, file: SourceFile) -> Any:
        """`file` as a random-access `pyarrow.NativeFile`.

        Raises:
            DataError: it is gone, or has another size than when the listing was made.
        """
        path = _join(self.root, file.name)
        try:
            opened = self.filesystem.open_input_file(path)
            size = opened.size()
        except OSError as error:
            check_reached(error, file.name)
            raise _changed(path, _reason(error)) from error
        if size != file.size_bytes:
            raise _changed(path, f"{size} bytes")
        return opened

    def read(self, file: SourceFile) -> bytes:
        """The content of `file` as it is stored, compared with the listing.

        Raises:
            DataError: it is not what it was when the listing was made.
        """
        path = _join(self.root, file.name)
        with self.open(file) as opened:
            try:
                content: bytes = opened.read()
            except OSError as error:
                check_reached(error, file.name)
                raise _changed(path, _reason(error)) from error
        if blake3.blake3(content).hexdigest() != file.blake3:
            raise _changed(path, "other content")
        return content


def _join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def check_reached(error: BaseException, name: str) -> None:
    """Tells a store that does not answer from a file that is broken.

    Raises:
        StorageError: `error` says the former; nothing is then known of the file `name`.
    """
    if _NO_ANSWER.search(str(error)):
        raise StorageError(
            f"the object store did not answer while {name} was read: {error}",
            next_step="run the same command again once it is reached: finished work is kept",
        ) from error


def _reason(error: OSError) -> str:
    """What the operating system says, without the path: the path is not part of what a corpus says about a file."""
    refusal = _REFUSAL.search(str(error))
    return refusal[0] if refusal else os.strerror(error.errno) if error.errno else str(error)


def _changed(path: str, received: str) -> DataError:
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
        StorageError: the file system cannot be reached, or refuses.
    """
    try:
        filesystem, root, names = _find(config)
    except OSError as error:
        said = " ".join(str(error).split())  # the hub's errors have several lines
        raise StorageError(
            f"source.path {config.path} cannot be reached: {said}", next_step="check the address and the credentials"
        ) from error
    files: list[SourceFile] = []
    unreadable: list[Rejected] = []
    known = hashes_of(f"{filesystem.type_name} {root} {urlsplit(config.path).query if '://' in config.path else ''}")
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for found in pool.map(lambda name: _describe(filesystem, root, name, known), sorted(names)):
            (files if isinstance(found, SourceFile) else unreadable).append(found)  # type: ignore[arg-type]
            known.save(now=False)
    known.save(now=True)
    if not files and not unreadable:
        raise DataError(
            f"no file below {config.path} matches the source", received=config.include,
            allowed="patterns that match a file",
            next_step="correct source.path, source.include or source.exclude in the recipe",
        )  # fmt: skip
    return Listing(filesystem, root, tuple(files), tuple(unreadable))


def check_unchanged(listing: Listing, config: SourceConfig) -> None:
    """Lists a source again; files that bear the stamp they were hashed with are not read.

    Raises:
        DataError: it is not what it was, and what was read of it may be a mixture.
    """
    if list_source(config).digest != listing.digest:
        raise _changed(config.path, "other files or content")


def _find(config: SourceConfig) -> tuple[Any, str, list[str]]:
    """File system, root and names of the files of a source."""
    filesystem, path = _locate(config.path)
    pattern = None
    if any(c in path for c in "*?["):
        parts = PurePosixPath(path).parts
        fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        path, pattern = str(PurePosixPath(*parts[:fixed])), "/".join(parts[fixed:])
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise DataError(
            "source.path does not exist", received=config.path,
            allowed=f"a file, a folder, a glob, a URI or {STDLIB}", next_step="correct source.path in the recipe",
        )  # fmt: skip
    if kind == fs.FileType.File:
        return filesystem, str(PurePosixPath(path).parent), [PurePosixPath(path).name]
    names: Iterable[str] = _walk(filesystem, path, config)
    if pattern is not None:
        names = (name for name in names if fnmatchcase(name, pattern))
    return filesystem, path, list(_dataset_files(filesystem, path, list(names)))


def _locate(path: str) -> tuple[Any, str]:
    if path == STDLIB:
        return fs.LocalFileSystem(), sysconfig.get_path("stdlib")
    if path.startswith(DATA):
        return fs.LocalFileSystem(), str(_data_folder(path) / path.removeprefix(DATA))
    if path.startswith(HUB):
        return _hub(), path.removeprefix(HUB)
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    if urlsplit(path).password is not None:
        raise DataError(
            "source.path holds a secret, and paths are written into logs and manifests",
            received=f"{urlsplit(path).scheme}://...@{urlsplit(path).hostname}",
            allowed="an address without credentials",
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or role of the machine",
        )
    try:
        filesystem, inside = fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"source.path is not an address that can be opened: {error}", received=path,
            allowed="file://, s3://, gs://, hdfs:// or hf://", next_step="correct source.path in the recipe",
        )  from error  # fmt: skip
    return filesystem, inside


def _data_folder(path: str) -> Path:
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        raise DataError(
            f"source.path {path} is below the data folder, and ${DATA_FOLDER} does not say where that is",
            allowed=f"{DATA_FOLDER}=FOLDER in the environment",
            next_step=f"get the data that the recipe names, and set {DATA_FOLDER} to the folder that it is in",
        )
    return Path(folder).expanduser().absolute()


def _hub() -> Any:
    """The Hugging Face hub as a file system; asked for only when a recipe names it."""
    from huggingface_hub import HfFileSystem, constants

    if constants.HF_HUB_OFFLINE:
        raise DataError(
            "source.path names a dataset on the Hugging Face hub, and this process is offline",
            received="HF_HUB_OFFLINE=1",
            allowed="hf:// with a connection, or a local folder",
            next_step="set HF_HUB_OFFLINE=0, or download the dataset and give its folder as source.path",
        )
    return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))


def _walk(filesystem: Any, root: str, config: SourceConfig) -> Iterator[str]:
    """Names below `root` that the patterns choose. Folders that are left out whole are not looked into."""
    include = config.include or (("*.py",) if config.path == STDLIB else None)
    if isinstance(filesystem, fs.LocalFileSystem):
        found = _walk_local(root, config)
    else:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        found = (i.path[len(root) :].lstrip("/") for i in infos if i.type == fs.FileType.File)
    for name in found:
        if include is None:
            included = not any(part.startswith(".") for part in name.split("/"))
        else:
            included = any(fnmatchcase(name, pattern) for pattern in include)
        if included and not any(fnmatchcase(name, pattern) for pattern in config.exclude):
            yield name


def _walk_local(root: str, config: SourceConfig) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        folders[:] = [f for f in folders if not _pruned((relative / f).as_posix(), config)]
        yield from ((relative / name).as_posix() for name in names)


def _pruned(folder: str, config: SourceConfig) -> bool:
    """True if a pattern leaves out all below `folder`: `*` crosses slashes, so `x/*` is the whole tree under x."""
    return any(pattern.endswith("/*") and fnmatchcase(folder, pattern[:-2]) for pattern in config.exclude)


def _dataset_files(filesystem: Any, root: str, names: list[str]) -> Iterator[str]:
    """`names`, but of a folder that `datasets.save_to_disk` wrote only the files that hold its rows.

    Such a folder has a state.json that lists them; caches and descriptions lie beside.
    """
    present = set(names)
    saved: dict[str, set[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == "state.json" and (f"{folder}/" if folder else "") + "dataset_info.json" in present:
            saved[folder] = _rows_of(filesystem, root, name)
    for name in names:
        folder, _, last = name.rpartition("/")
        if last == "dataset_dict.json" or (folder in saved and last not in saved[folder]):
            continue
        yield name


def _rows_of(filesystem: Any, root: str, state: str) -> set[str]:
    path = _join(root, state)
    try:
        with filesystem.open_input_stream(path, compression=None) as opened:
            return {entry["filename"] for entry in json.loads(opened.read())["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the state of a saved dataset: {error}", allowed="what datasets.save_to_disk writes",
            next_step="save the dataset again, or leave the file out with source.exclude",
        ) from error  # fmt: skip


def _describe(filesystem: Any, root: str, name: str, known: SourceHashes) -> SourceFile | Rejected:
    path = _join(root, name)
    began_ns = time.time_ns()
    try:
        stamp = take_stamp(filesystem, path)
        digest = None if stamp is None else known.find(name, stamp)
        if stamp is not None and digest is not None:
            return SourceFile(name, stamp.size_bytes, digest)
        size, digest = _hash(filesystem, path)
        if stamp is not None and stamp == take_stamp(filesystem, path):
            known.add(name, stamp, digest, began_ns=began_ns)
    except OSError as error:
        check_reached(error, name)
        return Rejected(name, 0, _reason(error))
    return SourceFile(name, size, digest)


def _hash(filesystem: Any, path: str) -> tuple[int, str]:
    hasher = blake3.blake3()
    size = 0
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with filesystem.open_input_stream(path, compression=None) as opened:
        while count := opened.readinto(chunk):
            hasher.update(chunk[:count])
            size += count
    return size, hasher.hexdigest()


def hash_fraction(salt: str, digest: str) -> float:
    """A number in [0, 1) that `salt` and `digest` decide; uniform over digests."""
    return int.from_bytes(blake3.blake3(f"{salt}\0{digest}".encode()).digest(6), "big") / 2**48


def is_validation(digest: str, split: SplitConfig) -> bool:
    """Whether the document with this blake3 is held out: copies of one document never straddle the split."""
    return hash_fraction(split.salt, digest) < split.validation_fraction
