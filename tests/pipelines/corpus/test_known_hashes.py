"""Files that did not change are hashed once; files that did are never taken for what they were."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from pipelines.corpus.known_hashes import kept_in
from pipelines.corpus.sources import Listing, check_unchanged, list_source

LISTING = """
import sys, json
from pathlib import Path
from configs.schema.corpus import SourceConfig
from pipelines.corpus.known_hashes import kept_in
from pipelines.corpus.sources import list_source
def read(): return int(Path("/proc/self/io").read_text().split()[1])
before = read()
with kept_in(Path(sys.argv[2])):
    listing = list_source(SourceConfig(path=sys.argv[1]))
print(json.dumps([listing.digest, len(listing.files), read() - before]))
"""


def _in_a_process(source: Path, kept: Path) -> tuple[str, int, int]:
    """Digest, number of files, and bytes the process read for them."""
    done = subprocess.run([sys.executable, "-c", LISTING, source, kept], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what a process reads")
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_second_run_does_not_read_the_files_again(tmp_path: Path, count: int) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for n in range(count):
        (many / f"{n:05}.txt").write_bytes(b"%5d " % n * 400)
    time.sleep(2.1)
    digest, files, read = _in_a_process(many, tmp_path / "hashes")
    assert (files, read > count * 2400) == (count, True)
    again, files, read = _in_a_process(many, tmp_path / "hashes")
    assert (again, files) == (digest, count)
    assert read < count * 300  # most of it the hashes that were kept


@pytest.fixture(scope="module")
def old_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that are long finished, one for each test; the waiting is done for all at once."""
    folders = [tmp_path_factory.mktemp("old") for _ in range(5)]
    for folder in folders:
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(f"text of {name}")
    time.sleep(2.1)
    return iter(folders)


@pytest.fixture
def old(old_folders: Iterator[Path]) -> Path:
    return next(old_folders)


def _list(folder: Path, kept: Path) -> Listing:
    with kept_in(kept):
        return list_source(SourceConfig(path=str(folder)))


def test_a_file_changed_behind_the_clocks_back_is_hashed_again(old: Path, tmp_path: Path) -> None:
    before = _list(old, tmp_path / "hashes")
    file = old / "a.txt"
    times = file.stat()
    file.write_text("TEXT of a.txt")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert _list(old, tmp_path / "hashes").digest != before.digest


def test_another_file_at_the_same_place_is_hashed_again(old: Path, tmp_path: Path) -> None:
    before = _list(old, tmp_path / "hashes")
    (old / "a.txt").rename(tmp_path / "away")
    (old / "b.txt").rename(old / "a.txt")
    (tmp_path / "away").rename(old / "b.txt")
    after = _list(old, tmp_path / "hashes")
    assert [f.blake3 for f in after.files] == [f.blake3 for f in reversed(before.files)]


def test_a_change_while_a_stage_reads_is_seen_although_hashes_are_kept(old: Path, tmp_path: Path) -> None:
    source = SourceConfig(path=str(old))
    with kept_in(tmp_path / "hashes"):
        listing = list_source(source)
        check_unchanged(listing, source)
        times = (old / "a.txt").stat()
        (old / "a.txt").write_text("TEXT of a.txt")
        os.utime(old / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(DataError, match="changed while"):
            check_unchanged(listing, source)


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.txt").write_text("new")
    _list(tmp_path / "new", tmp_path / "hashes")
    assert not (tmp_path / "hashes").exists()


def test_kept_hashes_that_are_damaged_are_thrown_away_and_the_log_says_so(
    old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = _list(old, tmp_path / "hashes").digest
    (kept,) = (tmp_path / "hashes").glob("*.json")
    whole = kept.read_bytes()
    for damage in (
        b"",
        b"nonsense",
        b"\xff\xfe\n{}",
        b"0" * 64 + b"\n{}",
        whole[:-1],
        whole.replace(b"a.txt", b"c.txt"),
    ):
        kept.write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ganymede.corpus"):
            assert _list(old, tmp_path / "hashes").digest == digest
        assert f"hashes kept at {kept} cannot be used" in caplog.text
        assert kept.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_said_and_costs_nothing_else(
    old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hashes").write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING, "ganymede.corpus"):
        assert len(_list(old, tmp_path / "hashes").files) == 2
    assert "cannot be kept" in caplog.text
