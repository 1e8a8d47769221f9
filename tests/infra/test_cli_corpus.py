"""`ganymede corpus` on a small corpus in a store of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.store.artifacts import Artifact, ArtifactStore
from configs.artifacts import Identity, Ref
from configs.errors import ArtifactError, DataError, InputError
from infra.cli.corpus import app
from pipelines.stages.pretrain import PretrainStage
from tests.pipelines.corpus.corpus_files import write_byte_tokenizer, write_text_corpus

TEXT = "def answer():\n    return 42  # naïve [bold]\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a byte-level tokenizer and a corpus."""
    monkeypatch.setenv("GANYMEDE_HOME", str(tmp_path / "home"))
    store = ArtifactStore(tmp_path / "home/artifacts")
    (tmp_path / "corpus").mkdir()
    opened = write_byte_tokenizer(tmp_path / "tokenizer")
    write_text_corpus(tmp_path / "corpus", {"train": [TEXT, "x" * 2000], "validation": ["held out"]}, opened)
    tokenizer = _publish(store, tmp_path / "tokenizer", "tokenizer", {})
    _publish(store, tmp_path / "corpus", "corpus", {"tokenizer": tokenizer})
    return tmp_path


def _publish(
    store: ArtifactStore, folder: Path, kind: str, inputs: Mapping[str, Artifact], *,
    config: Mapping[str, Any] | None = None, version: int = 1,
) -> Artifact:  # fmt: skip
    return store.publish(
        folder, ref=Ref(kind, "demo", 1), identity=Identity(kind, version, {}, {}, {}), config=dict(config or {}),
        inputs=inputs, summary={}, tracking_run=None, fence=lambda: None,
    )  # fmt: skip


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_document_is_shown_with_its_text_tokens_and_origin(home: Path) -> None:
    shown = _run("inspect", "corpus/demo@1", "--doc", "train/0")
    assert "train/0  (shards/train-00000.arrow, row 0)" in shown
    assert "  name: 0.txt\n" in shown
    assert "    def answer():\n        return 42  # naïve [bold]\n" in shown
    assert " <|endoftext|>:0\n" in shown


def test_without_a_document_splits_and_shortened_samples_are_shown(home: Path) -> None:
    shown = _run("inspect", "corpus/demo@1", "--sample", "2", "--row-tokens", "100")
    assert next(line.split()[:3] for line in shown.splitlines() if line.startswith("train ")) == [
        "train",
        "2",
        f"{len(TEXT.encode()) + 2002:,}",
    ]
    assert "... 1,400 more characters" in shown
    assert {"concat", "best_fit", "one_document"} <= set(shown.split())


def test_json_holds_everything(home: Path) -> None:
    document = json.loads(_run("inspect", "corpus/demo@1", "--doc", "train/0", "--json"))["documents"][0]
    assert document["text"] == TEXT
    assert len(document["tokens"]) == len(TEXT.encode()) + 1


def test_export_writes_both_files(home: Path) -> None:
    shown = _run("export", "corpus/demo@1", str(home / "megatron/demo"))
    assert [Path(line).name for line in shown.split()] == ["demo.bin", "demo.idx"]
    assert (home / "megatron/demo.bin").stat().st_size == 2 * (len(TEXT.encode()) + 2002)


def test_what_is_no_corpus_or_no_document_is_an_error(home: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a corpus"):
        _run("inspect", "tokenizer/demo@1")
    with pytest.raises(DataError, match="no such document"):
        _run("inspect", "corpus/demo@1", "--doc", "nothing")


def test_the_ledger_names_the_documents_of_a_training_step(home: Path) -> None:
    store = ArtifactStore(home / "home/artifacts")
    (home / "model").mkdir()
    (home / "model/weights").write_text("none")
    pretrain = {
        "kind": "pretrain",
        "corpus": {"a": "one", "b": "two"},
        "data": {"packing": "best_fit", "mixture": {"a": 3, "b": 1}},
        "model": {"context_length": 1000},
        "training": {"steps": 5, "batch_rows": 8},
    }
    corpus = store.get("corpus/demo@1")
    version = PretrainStage.code_version
    _publish(store, home / "model", "model", {"corpus.a": corpus, "corpus.b": corpus}, config=pretrain, version=version)

    samples = json.loads(_run("ledger", "model/demo@1", "--step", "5", "--json"))
    assert [s["source"] for s in samples].count("a") == 6
    assert {s["row"]: s["documents"] for s in samples} == {0: [1], 1: [1], 2: [0]}
    shown = _run("ledger", "model/demo@1", "--step", "5").splitlines()
    assert [line.split()[-1] for line in shown[1:]] == [f"train/{s['documents'][0]}" for s in samples]
    with pytest.raises(InputError, match="6; allowed: 1 to 5"):
        _run("ledger", "model/demo@1", "--step", "6")
    with pytest.raises(ArtifactError, match="not pretrained on a corpus"):
        _run("ledger", "corpus/demo@1", "--step", "1")
