"""The runner reuses what stands, resumes what was interrupted, refuses drift, and leaves nothing half made."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import NoTracker
from configs.errors import ArtifactError, ConfigError, DriftError, LeaseError, StageError, StorageError
from configs.schema.corpus import SourceConfig
from configs.schema.project import Recipe
from pipelines.corpus.sources import list_source
from pipelines.runner import Outcome, Runner, RunReport
from pipelines.stage import Progress, StageContext

RECIPE = {
    "name": "toy",
    "stages": {
        "tokenizer": {"source": {"path": "somewhere"}, "vocab_size": 500},
        "corpus": {"tokenizer": "tokenizer", "source": {"path": "somewhere"}},
    },
}


class Writer:
    """A stage that writes what decides its content, and counts how often it ran."""

    artifact_kind: str | None
    code_version = 1

    def __init__(self, kind: str, act: Callable[[StageContext], None] = lambda context: None) -> None:
        self.kind = self.artifact_kind = kind
        self.act = act
        self.runs = 0

    def sources(self, config: Any) -> Mapping[str, str]:
        return {"source": "digest-of-the-source"}

    def run(self, config: Any, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        self.runs += 1
        context.progress(Progress(1, 2, "files"))
        (context.out / "content.txt").write_text(f"{self.kind} from {[a.digest for a in inputs.values()]}")
        self.act(context)
        return {"runs": self.runs}


class Watcher:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def stage_started(self, name: str, kind: str) -> None:
        self.seen.append(f"start {name}")

    def stage_progress(self, name: str, progress: Progress) -> None:
        self.seen.append(f"{name} {progress.done:g}/{progress.total:g} {progress.unit}")

    def stage_finished(self, name: str, outcome: Outcome) -> None:
        self.seen.append(f"{outcome.status} {name}")


class Bench:
    """A store and a set of stages; every call of `run` is a new runner, as a new process would make it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = ArtifactStore(home / "artifacts")
        self.tokenizer = Writer("tokenizer")
        self.corpus = Writer("corpus")
        self.watcher = Watcher()

    def run(self, overrides: Mapping[str, Any] | None = None, **options: Any) -> RunReport:
        recipe = Recipe.model_validate({**RECIPE, **(overrides or {})})
        stages = {"tokenizer": self.tokenizer, "corpus": self.corpus}
        return Runner(recipe, self.store, NoTracker(), self.home, stages, self.watcher).run(**options)

    def half_made(self) -> list[Path]:
        return list((self.home / "artifacts" / ".staging").glob("*"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_second_run_reuses_every_stage(bench: Bench) -> None:
    first = bench.run()
    second = bench.run()
    assert [o.status for o in first.outcomes] == ["made", "made"]
    assert [o.status for o in second.outcomes] == ["reused", "reused"]
    assert [o.digest for o in first.outcomes] == [o.digest for o in second.outcomes]
    assert (bench.tokenizer.runs, bench.corpus.runs) == (1, 1)
    assert bench.watcher.seen[:3] == ["start tokenizer", "tokenizer 1/2 files", "made tokenizer"]
    assert bench.half_made() == []
    assert list((bench.home / "work").iterdir()) == []


def test_an_interrupted_stage_finds_its_work_folder_again(bench: Bench) -> None:
    def interrupted(context: StageContext) -> None:
        (context.work / "part").write_text("half the work")
        raise KeyboardInterrupt

    found: list[str] = []
    bench.corpus.act = interrupted
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert [str(m.ref) for m in bench.store.list()] == ["tokenizer/toy-tokenizer@1"]
    bench.corpus.act = lambda context: found.append((context.work / "part").read_text())
    statuses = [o.status for o in bench.run().outcomes]
    assert statuses == ["reused", "made"]
    assert found == ["half the work"]


def test_drift_names_the_keys_and_another_version_keeps_both(bench: Bench) -> None:
    bench.run()
    stages: dict[str, Any] = {**RECIPE["stages"], "corpus": {**RECIPE["stages"]["corpus"], "shard_tokens": 8192}}  # type: ignore[index,dict-item]
    with pytest.raises(DriftError) as caught:
        bench.run({"stages": stages})
    assert caught.value.received == "config.shard_tokens: 4194304 -> 8192"
    assert "--set version=2" in str(caught.value)
    report = bench.run({"stages": stages, "version": 2})
    assert [(o.status, o.ref) for o in report.outcomes] == [
        ("reused", "tokenizer/toy-tokenizer@1"),
        ("made", "corpus/toy-corpus@2"),
    ]


def test_placement_does_not_change_the_fingerprint(bench: Bench) -> None:
    bench.run()
    stages: dict[str, Any] = {
        "tokenizer": {"source": {"path": "another/place"}, "vocab_size": 500},
        "corpus": {"tokenizer": "tokenizer", "source": {"path": "another/place"}, "max_in_flight": 7},
    }
    assert [o.status for o in bench.run({"stages": stages}).outcomes] == ["reused", "reused"]


def test_a_stage_under_way_elsewhere_is_not_started_twice(bench: Bench) -> None:
    def second_run(context: StageContext) -> None:
        with pytest.raises(LeaseError, match="is being made by process"):
            Bench(bench.home).run()

    bench.tokenizer.act = second_run
    assert bench.run().outcomes[0].status == "made"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_fails_clearly_and_leaves_no_half_artifact(bench: Bench, wrapped: bool) -> None:
    def full(context: StageContext) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "shard-0")
        except OSError as error:
            if wrapped:
                raise RuntimeError("worker failed") from error
            raise

    bench.corpus.act = full
    with pytest.raises(StorageError, match="No space left on device"):
        bench.run()
    assert [m.kind for m in bench.store.list()] == ["tokenizer"]
    assert bench.half_made() == []


def test_an_unforeseen_failure_names_the_stage(bench: Bench) -> None:
    def broken(context: StageContext) -> None:
        raise ZeroDivisionError("division by zero")

    bench.corpus.act = broken
    with pytest.raises(StageError, match=r"stage corpus failed: ZeroDivisionError: division by zero"):
        bench.run()


def test_only_and_from_choose_stages(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="--only names no stage"):
        bench.run(only="corps")
    with pytest.raises(ConfigError, match="was left out"):
        bench.run(only="corpus")
    assert [o.stage for o in bench.run(only="tokenizer").outcomes] == ["tokenizer"]
    assert [o.stage for o in bench.run(start="corpus").outcomes] == ["corpus"]


def test_an_input_may_be_an_artifact_of_another_recipe(bench: Bench) -> None:
    bench.run()
    recipe = {
        "name": "other",
        "stages": {"corpus": {**RECIPE["stages"]["corpus"], "tokenizer": "tokenizer/toy-tokenizer@1"}},
    }  # type: ignore[index,dict-item]
    made = bench.run(recipe)
    assert bench.store.get(str(made.outcomes[0].ref)).manifest.inputs["tokenizer"].ref == "tokenizer/toy-tokenizer@1"
    recipe["stages"]["corpus"]["tokenizer"] = "tokenizer/missing@1"  # type: ignore[index]
    with pytest.raises(ArtifactError, match="no artifact tokenizer/missing@1"):
        bench.run({**recipe, "name": "third"})


def test_hashes_of_source_files_are_kept_in_the_state_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("text")
    os.utime(source / "a.txt", (1, 1))
    time.sleep(2.1)

    class Listing(Writer):
        def sources(self, config: Any) -> Mapping[str, str]:
            return {"source": list_source(SourceConfig(path=str(source))).digest}

    bench = Bench(tmp_path / "home")
    bench.tokenizer = Listing("tokenizer")
    bench.run()
    assert len(list((tmp_path / "home/hashes").glob("*.json"))) == 1
