"""A small real source, a tokenizer trained on it, and a Ray cluster of two CPUs."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import JsonLinesTracker
from configs.artifacts import Identity, Ref
from configs.schema.corpus import SourceConfig, TokenizerConfig
from pipelines.stage import StageContext
from pipelines.stages.tokenizer import TokenizerStage

PACKAGES = ("json", "email", "logging", "concurrent", "wsgiref", "html")


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some packages of the standard library: about 60 files of real text, one of them empty."""
    folder = tmp_path_factory.mktemp("source")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        shutil.copytree(stdlib / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "empty.py").write_text("")
    (folder / "special.py").write_text('"""Special tokens in text."""\nEND = "<|end|>"\nEOT = "<|endoftext|>"\n')
    return folder


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[[str], StageContext]:
    return lambda name: stage_context(tmp_path / name)


@pytest.fixture(scope="session")
def context_at() -> Callable[[Path], StageContext]:
    """The same in a folder of the caller's choice, for fixtures that live longer than a test."""
    return stage_context


def stage_context(folder: Path) -> StageContext:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    return StageContext(
        name=folder.name,
        work=folder / "work",
        out=folder / "out",
        run=JsonLinesTracker(folder / "tracked").run("key", folder.name),
        progress=lambda progress: None,
        check_lease=lambda: None,
        store=ArtifactStore(folder / "store"),
        home=folder,
    )


@pytest.fixture(scope="session")
def tokenizer(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A published tokenizer of 600 entries."""
    context = stage_context(tmp_path_factory.mktemp("tokenizer") / "demo")
    config = TokenizerConfig(source=SourceConfig(path=str(source_folder)), vocab_size=600)
    summary = TokenizerStage().run(config, {}, context)
    return context.store.publish(
        context.out,
        ref=Ref("tokenizer", "demo", 1),
        identity=Identity("tokenizer", 1, {}, {}, {}),
        config={},
        inputs={},
        summary=summary,
        tracking_run=None,
        fence=lambda: None,
    )


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray with two CPUs; one that another test module started is used as it is."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    if started:
        ray.shutdown()
