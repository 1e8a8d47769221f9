"""`kill -9` of a worker or the driver of a corpus stage, at moments spread over all of it: the same manifest digest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from actors.store.artifacts import ArtifactStore, verify_files

KILLS = 20
SEED = 3
SOURCE_BYTES = 12_000_000
_RUN = (sys.executable, "-m", "infra.cli.main", "run", "--json", "--tracker", "none")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Moment(NamedTuple):
    """A point of a run that later runs pass too: so many seconds after so many spans are committed."""

    spans: int
    seconds: float


class Command:
    """`ganymede run` on the recipe of this module, in a process of its own, and how far its corpus stage is."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._reached: list[float] = []
        environment = {**os.environ, "GANYMEDE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        self.log = (home.parent / f"{home.name}.log").open("a")
        self.process = subprocess.Popen(
            [*_RUN, str(home.parent / "recipe.yaml")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def spans(self) -> int | None:
        """Committed spans, once this run's corpus stage has begun."""
        leases = self.home.glob("leases/corpus-*/*.json")
        if not any(f'"pid": {self.process.pid},' in _text(lease) for lease in leases):
            return None
        return sum(1 for _ in self.home.glob("work/corpus-*/parts-*/??????.json"))

    def ended(self) -> bool:
        return self.process.poll() is not None

    def passed(self, moment: Moment) -> bool:
        """Whether the run is at `moment`, or past it."""
        now = time.monotonic()
        spans = self.spans()
        if spans is not None:
            self._reached += [now] * (spans + 1 - len(self._reached))
        return len(self._reached) > moment.spans and now >= self._reached[moment.spans] + moment.seconds

    def workers(self) -> list[psutil.Process]:
        """Ray's worker processes; those with a task, if there are any."""
        found = [(p, " ".join(_command(p))) for p in psutil.Process(self.process.pid).children(recursive=True)]
        every = [p for p, command in found if command.startswith("ray::")]
        return [p for p, command in found if command.startswith("ray::_")] or every

    def kill(self) -> list[psutil.Process]:
        """kill -9 of the driver; its Ray processes, which follow by and by, may still write."""
        family: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        return family

    def finish(self) -> str:
        """The corpus' digest, from a run that must succeed; every file of it verifies."""
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, f"see {self.log.name}: {_text(Path(self.log.name))[-3000:]}"
        outcomes = {o["stage"]: o for o in json.loads(output)["outcomes"]}
        corpus = ArtifactStore(self.home / "artifacts").get(outcomes["corpus"]["ref"])
        verify_files(corpus)
        return corpus.digest


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def _until(happened: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "the condition did not come"
        time.sleep(0.01)


def _modules() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_bytes().decode(errors="ignore")
            yield from (text[begin : begin + 8000] for begin in range(0, len(text), 8000))


def _write_source(folder: Path) -> None:
    """Pieces of the standard library, every fifth of them again as it is, every seventh again with a word more; and an
    evaluation set of passages out of them."""
    folder.mkdir()
    size, passages = 0, []
    with (folder / "source.jsonl").open("w") as lines:
        for number, text in enumerate(_modules()):
            again = [text] * (number % 5 == 0) + [f"again {text}"] * (number % 7 == 0)
            size += sum(lines.write(json.dumps({"text": one}) + "\n") for one in (text, *again))
            if number % 40 == 0:
                passages.append(" ".join(islice(text.split(), 100)))
            if size > SOURCE_BYTES:
                break
    (folder / "passages.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))


def _write_recipe(folder: Path) -> None:
    source: dict[str, Any] = {"path": str(folder / "data/source.jsonl")}
    corpus = {
        "tokenizer": "tokenizer",
        "source": {**source, "filters": {"rules": ["gopher_repetition"]}},
        "span_bytes": 1 << 18,
        "shard_tokens": 1 << 18,
        "dedup": {"near": {}},
        "contamination": {"sets": {"passages": {"path": str(folder / "data/passages.jsonl")}}},
    }
    tokenizer = {"source": source, "vocab_size": 600, "sample_bytes": 200_000}
    recipe = {"name": "killed", "stages": {"tokenizer": tokenizer, "corpus": corpus}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _uninterrupted(home: Path, numbers: random.Random) -> tuple[str, list[Moment]]:
    """The digest of a run left alone, and `KILLS` random moments of its corpus stage, in order."""
    run = Command(home)
    reached: list[float] = []
    while not run.ended():
        spans = run.spans()
        if spans is not None:
            reached += [time.monotonic()] * (spans + 1 - len(reached))
            last = time.monotonic()
        time.sleep(0.01)
    moments = []
    for when in sorted(numbers.uniform(reached[0], last) for _ in range(KILLS)):
        spans = sum(time <= when for time in reached) - 1
        moments.append(Moment(spans, when - reached[spans]))
    return run.finish(), moments


def test_a_corpus_killed_at_twenty_random_moments_is_the_corpus_of_a_run_left_alone(tmp_path: Path) -> None:
    numbers = random.Random(SEED)
    _write_source(tmp_path / "data")
    _write_recipe(tmp_path)
    expected, moments = _uninterrupted(tmp_path / "untouched", numbers)
    assert max(m.spans for m in moments) > 30, "the moments are not spread over the stage"

    digests, homes, orphans = [], 1, []
    run = Command(tmp_path / "home-1")
    for number, moment in enumerate(moments):
        _until(lambda run=run, moment=moment: run.ended() or run.passed(moment))  # type: ignore[misc]
        if run.ended():  # faster than the run left alone: its end came before the moment
            digests.append(run.finish())
            homes += 1
            run = Command(tmp_path / f"home-{homes}")
            _until(lambda run=run, moment=moment: run.passed(moment))  # type: ignore[misc]
        if number % 2:
            numbers.choice(run.workers()).send_signal(signal.SIGKILL)
        else:
            orphans += run.kill()
            run = Command(run.home)
    digests.append(run.finish())

    assert set(digests) == {expected}
    assert not psutil.wait_procs(orphans, timeout=60)[1]
