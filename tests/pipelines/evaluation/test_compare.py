"""Decoders side by side: perplexity by position, and the report and picture made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import NoTracker
from actors.text import CONTRACT, Text, make_contract
from configs.artifacts import Identity, Ref
from configs.errors import ContractError
from configs.schema.comparison import CompareConfig
from configs.schema.model import ModelConfig
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.evaluation.positions import doubling_means, nats_by_position, nats_of_stream, window_starts
from pipelines.stage import StageContext
from pipelines.stages.compare import CompareStage
from pipelines.training.models import build_model, save_model
from tests.pipelines.corpus.corpus_files import write_text_corpus

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20] * 4
CURVE = [{"step": 5, "tokens_seen": 640, "loss": 5.0, "validation_loss": 4.5}]


def published(folder: Path, files: Path, kind: str, name: str) -> Artifact:
    return ArtifactStore(folder / "store").publish(
        files, ref=Ref(kind, name, 1), identity=Identity(kind, 1, {"name": name}, {}, {}), config={}, inputs={},
        summary={}, tracking_run=None, fence=lambda: None,
    )  # fmt: skip


def text_folder(folder: Path, texts: list[str]) -> Any:
    tokenizer = train_tokenizer(texts, 300)
    save_tokenizer(tokenizer, folder)
    (folder / CONTRACT).write_text(make_contract(folder).model_dump_json())
    return tokenizer


def model(folder: Path, architecture: Any, texts: list[str] = TEXTS) -> Artifact:
    files = folder / architecture
    text_folder(files, texts)
    dials = ModelConfig(architecture=architecture, hidden_size=32, layers=1, heads=2, context_length=24)
    size = Text.load(files).vocab_size
    save_model(build_model(dials, vocab_size=size, eos_token_id=0, seed=1), files, eos_token_ids=[0], pad_token_id=0)
    (files / "curve.json").write_text(json.dumps(CURVE))
    return published(folder, files, "model", architecture)


def compare(folder: Path, models: dict[str, Artifact], **settings: Any) -> tuple[dict[str, Any], Path]:
    corpus = folder / "corpus"
    corpus.mkdir()
    tokenizer = text_folder(folder / "text", TEXTS)
    write_text_corpus(corpus, {"train": TEXTS, "validation": TEXTS}, tokenizer)
    index = json.loads((corpus / "index.json").read_text())
    index["contract"] = make_contract(folder / "text").hash
    (corpus / "index.json").write_text(json.dumps(index))
    out = folder / "out"
    out.mkdir()
    context = StageContext(
        name="compare", work=folder, out=out, run=NoTracker().run("k", "n"), progress=lambda progress: None,
        check_lease=lambda: None, store=ArtifactStore(folder / "store"), home=folder, acted={},
    )  # fmt: skip
    inputs = {f"models.{label}": model for label, model in models.items()}
    inputs["corpus"] = published(folder, corpus, "corpus", "demo")
    config = CompareConfig.model_validate({"models": dict.fromkeys(models, "x"), "corpus": "x", "rows": 6, **settings})
    return CompareStage().run(config, inputs, context), out


def test_a_transformer_and_an_lstm_are_read_on_the_same_rows(tmp_path: Path) -> None:
    summary, out = compare(tmp_path, {name: model(tmp_path, name) for name in ("llama", "lstm")})
    report = json.loads((out / "report.json").read_text())
    assert list(summary["models"]) == ["llama", "lstm"]
    for figures in report["models"].values():
        assert figures["perplexity"] == pytest.approx(300, rel=0.5)
        assert figures["curve"] == CURVE
        assert [part[:2] for part in figures["perplexity_by_position"]] == [
            [1, 1], [2, 2], [3, 4], [5, 8], [9, 16], [17, 24]
        ]  # fmt: skip
    assert (out / "comparison.png").stat().st_size > 1000


def test_a_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"models\.llama cannot be read on corpus/demo@1"):
        compare(tmp_path, {"llama": model(tmp_path, "llama", ["something else entirely, and more of it " * 30])})


def test_perplexity_by_position_is_that_of_the_model() -> None:
    dials = ModelConfig(hidden_size=32, layers=1, heads=2, context_length=16)
    llama: Any = build_model(dials, vocab_size=50, eos_token_id=0, seed=1)
    rows = np.random.default_rng(1).integers(0, 50, (11, 17))
    nats = nats_by_position(llama, rows, lambda done: None)
    tokens = torch.from_numpy(rows)
    with torch.no_grad():
        mean = llama(input_ids=tokens[:, :-1], labels=None).logits.log_softmax(-1)
    expected = -mean.gather(2, tokens[:, 1:, None])[:, :, 0].mean(0)
    np.testing.assert_allclose(nats, expected.numpy(), rtol=1e-5)
    assert doubling_means([0.0, math.log(2), math.log(4), math.log(4)]) == [
        (1, 1, 1.0), (2, 2, pytest.approx(2.0)), (3, 4, pytest.approx(4.0))
    ]  # fmt: skip


def test_perplexity_per_word_counts_line_ends_as_words_and_unknown_words_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" the lazy <unk> jumps . \n \n = A fox = \n")
    llama = model(tmp_path, "llama")
    summary, out = compare(tmp_path, {"llama": llama}, text={"path": str(tmp_path / "text.txt"), "format": "lines"})
    report = json.loads((out / "report.json").read_text())
    assert report["text"]["words"] == 5 + 1 + 4 + 1
    text = Text.load(llama.path)
    ids = [0, *text.encode(" the lazy <unk> jumps . "), 0, *text.encode(" = A fox = "), 0]
    assert report["text"]["tokens"] == len(ids) - 1
    # An untrained model gives each token about the same probability.
    expected = text.vocab_size ** ((len(ids) - 1) / 11)
    assert summary["models"]["llama"]["word_perplexity"] == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize(("tokens", "length"), [(5, 8), (9, 8), (10, 8), (41, 8), (40, 9)])
def test_every_token_of_a_stream_counts_once_and_sees_at_least_half_a_window(tokens: int, length: int) -> None:
    dials = ModelConfig(hidden_size=32, layers=1, heads=2, context_length=16)
    llama: Any = build_model(dials, vocab_size=50, eos_token_id=0, seed=1)
    ids = np.random.default_rng(1).integers(0, 50, tokens)
    expected = 0.0
    for place in range(1, tokens):
        skipped = -(-max(place - length, 0) // (length // 2)) * (length // 2)
        with torch.no_grad():
            last = llama(input_ids=torch.from_numpy(ids[None, skipped:place])).logits[0, -1]
        expected -= float(last.log_softmax(0)[ids[place]])
    read: list[int] = []
    assert nats_of_stream(llama, ids, length, read.append) == pytest.approx(expected, rel=1e-5)
    assert read[-1] == len(window_starts(tokens, length))
