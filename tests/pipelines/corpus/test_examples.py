"""Datasets of labelled examples: what is read, split, quarantined and refused, and the baselines over them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import NoTracker
from configs.artifacts import Identity, Ref
from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from configs.schema.examples import BaselineConfig, ExamplesConfig
from pipelines.corpus.examples import begin_spans
from pipelines.corpus.sources import list_source
from pipelines.stage import StageContext
from pipelines.stages.baseline import BaselineStage
from pipelines.stages.examples import ExamplesStage

GOOD, BAD = ("splendid", "moving", "charming"), ("dull", "tedious", "wooden")
REVIEWS = [f"a {word} film about {thing}\t{int(word in GOOD)}" for word in (*GOOD, *BAD) for thing in range(20)]


def context_in(folder: Path) -> StageContext:
    out = folder / "out"
    out.mkdir(parents=True)
    return StageContext(
        name="examples", work=folder, out=out, run=NoTracker().run("k", "n"), progress=lambda progress: None,
        check_lease=lambda: None, store=ArtifactStore(folder / "store"), home=folder, acted={},
    )  # fmt: skip


def make(folder: Path, **config: Any) -> tuple[dict[str, Any], Path]:
    context = context_in(folder)
    return ExamplesStage().run(ExamplesConfig.model_validate(config), {}, context), context.out


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as opened:
        return [json.loads(line) for line in opened]


def tsv(path: Path) -> dict[str, Any]:
    return {"path": str(path), "format": "tsv", "columns": ["text", "label"], "fields": {"label": "label"}}


def dataset(folder: Path, out: Path) -> Artifact:
    return ArtifactStore(folder / "published").publish(
        out, ref=Ref("dataset", "demo", 1), identity=Identity("dataset", 1, {}, {}, {}), config={}, inputs={},
        summary={}, tracking_run=None, fence=lambda: None,
    )  # fmt: skip


def baseline(folder: Path, data: Artifact) -> tuple[dict[str, Any], Path]:
    context = context_in(folder / "baseline")
    return BaselineStage().run(BaselineConfig(data="examples"), {"data": data}, context), context.out


def test_a_table_of_classes_is_split_by_the_hash_of_its_text(tmp_path: Path) -> None:
    source = tmp_path / "reviews.tsv"
    source.write_text("\n".join([*REVIEWS, REVIEWS[0]]) + "\n")
    split = {"validation_fraction": 0.2}
    names = {"0": "bad", "1": "good"}
    summary, out = make(tmp_path / "a", task="classify", source=tsv(source), split=split, labels=names)
    train, heldout = lines(out / "train.jsonl"), lines(out / "heldout.jsonl")
    assert summary["examples"] == {"train": len(train), "heldout": len(heldout)}
    assert summary["left_out"] == {"also_held_out": 0, "repeated": 1}
    assert len(train) + len(heldout) == len(REVIEWS)
    assert {e["text"] for e in train}.isdisjoint(e["text"] for e in heldout)
    assert 5 < len(heldout) < 60
    assert json.loads((out / "labels.json").read_text()) == {"task": "classify", "labels": ["bad", "good"]}
    first = next(e for e in (*train, *heldout) if e["source"] == "reviews.tsv:0")
    assert (first["text"], first["label"]) == ("a splendid film about 0", "good")

    shuffled = tmp_path / "other.tsv"
    shuffled.write_text("\n".join(reversed(REVIEWS)) + "\n")
    _, again = make(tmp_path / "b", task="classify", source=tsv(shuffled), split=split, labels=names)
    assert {e["id"] for e in lines(again / "heldout.jsonl")} == {e["id"] for e in heldout}


def test_held_out_texts_are_no_training_examples(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("\n".join(REVIEWS) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join(REVIEWS[::10]) + "\n")
    summary, out = make(
        tmp_path / "a", task="classify", source=tsv(tmp_path / "train.tsv"), heldout=tsv(tmp_path / "dev.tsv")
    )
    assert summary["examples"] == {"train": 108, "heldout": 12}
    assert summary["left_out"]["also_held_out"] == 12
    assert {e["text"] for e in lines(out / "train.jsonl")}.isdisjoint(e["text"] for e in lines(out / "heldout.jsonl"))


def test_records_that_make_no_example_are_quarantined_with_their_place(tmp_path: Path) -> None:
    source = tmp_path / "reviews.tsv"
    source.write_bytes("\n".join(REVIEWS).encode() + b"\nno label at all\nunnamed\t7\nbroken \xff bytes\t1\nempty\t\n")
    config = {**tsv(source), "max_bad_fraction": 0.1}
    names = {"0": "bad", "1": "good"}
    summary, out = make(tmp_path / "a", task="classify", source=config, labels=names)
    assert summary["quarantined"] == 4
    rejected = json.loads((out / "report.json").read_text())["sources"]["source"]["rejected"]
    assert [(r["path"], r["reason"]) for r in rejected] == [
        ("reviews.tsv", "1 fields, not 2"),
        ("reviews.tsv", "label '7' has no name in labels"),
        ("reviews.tsv", "not UTF-8: invalid start byte"),
        ("reviews.tsv", "no label"),
    ]
    with pytest.raises(DataError, match="4 of 124 records are unusable"):
        make(tmp_path / "b", task="classify", source=tsv(source), labels=names)


def test_sentences_of_tagged_words_come_with_spans_that_begin_with_b(tmp_path: Path) -> None:
    source = tmp_path / "words.conll.gz"
    text = (
        "Ada I-PER\nLovelace I-PER\nslept O\n\nIn\tO\nNew York\tB-LOC\n\t\nword without tag\nBabbage X-PER\n\nalone\n"
    )
    source.write_bytes(gzip.compress(text.encode()))
    (tmp_path / "dev.conll").write_text("Ada B-PER\n")
    config = {"path": str(source), "format": "paragraphs", "max_bad_fraction": 0.5}
    heldout = {"path": str(tmp_path / "dev.conll"), "format": "paragraphs"}
    _, out = make(tmp_path / "a", task="tag", source=config, heldout=heldout)
    assert [(e["words"], e["tags"]) for e in lines(out / "train.jsonl")] == [
        (["Ada", "Lovelace", "slept"], ["B-PER", "I-PER", "O"]),
        (["In", "New York"], ["O", "B-LOC"]),
    ]
    rejected = json.loads((out / "report.json").read_text())["sources"]["source"]["rejected"]
    assert [r["reason"] for r in rejected] == [
        "tag 'tag' is neither O nor B-type nor I-type",
        "no word and tag in the line 'alone'",
    ]
    assert json.loads((out / "labels.json").read_text())["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_only_the_first_word_of_a_span_begins_it() -> None:
    assert begin_spans(["I-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER", "I-PER"]) == [
        "B-PER", "I-PER", "O", "B-LOC", "B-PER", "B-PER", "I-PER",
    ]  # fmt: skip


def parallel(folder: Path, french: str, english: str) -> dict[str, Any]:
    for name, text in (("a.fr", french), ("a.en.gz", english)):
        content = text.encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return {
        "task": "seq2seq",
        "source": {"path": str(folder / "a.fr"), "format": "lines", "max_bad_fraction": 0.5},
        "target": {"path": str(folder / "a.en.gz"), "format": "lines"},
        "split": {"validation_fraction": 0.5, "salt": "two halves"},
    }


def test_parallel_lines_stay_parallel_around_blank_and_broken_ones(tmp_path: Path) -> None:
    french = "".join(f"chien {i}\n" for i in range(8)) + "\nsans pair\nrompu \udcff\n"
    english = "".join(f"dog {i}\n" for i in range(8)) + "no pair\n\nbroken\n"
    summary, out = make(tmp_path / "a", **parallel(tmp_path, french, english))
    pairs = [*lines(out / "train.jsonl"), *lines(out / "heldout.jsonl")]
    assert sorted((p["prompt"], p["completion"]) for p in pairs) == [(f"chien {i}", f"dog {i}") for i in range(8)]
    assert summary["quarantined"] == 3
    rejected = json.loads((out / "report.json").read_text())["sources"]["source"]["rejected"]
    assert [(r["offset"], r["reason"]) for r in rejected] == [
        (9, "nothing on one side"), (10, "nothing on one side"), (11, "not UTF-8 on one side")
    ]  # fmt: skip


def test_sides_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not parallel.*a\.fr 2; a\.en\.gz 3"):
        make(tmp_path / "a", **parallel(tmp_path, "un\ndeux\n", "one\ntwo\nthree\n"))


def test_a_record_can_hold_the_text_to_write(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text(
        "".join(json.dumps({"dialogue": f"A: {i}\nB: ja", "summary": f"sum {i}"}) + "\n" for i in range(9))
    )
    config = {"path": str(source), "fields": {"text": "dialogue", "label": "summary"}}
    _, out = make(tmp_path / "a", task="seq2seq", source=config, split={"validation_fraction": 0.4})
    pairs = [*lines(out / "train.jsonl"), *lines(out / "heldout.jsonl")]
    assert {p["prompt"]: p["completion"] for p in pairs} == {f"A: {i}\nB: ja": f"sum {i}" for i in range(9)}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"task": "classify", "source": {"path": "x"}}, "source.fields.label"),
        ({"task": "tag", "source": {"path": "x", "format": "lines"}}, "set source.format to paragraphs"),
        ({"task": "seq2seq", "source": {"path": "x"}}, "either source.fields.label or a target"),
        ({"task": "tag", "source": {"path": "x", "format": "paragraphs"}, "labels": {"a": "b"}}, "labels name classes"),
    ],
)
def test_a_config_that_does_not_fit_its_task_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ExamplesConfig.model_validate(config)


def test_data_paths_are_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.txt").write_text("text")
    monkeypatch.setenv("GANYMEDE_DATA", str(tmp_path))
    digest = list_source(SourceConfig(path="data:set/a.txt")).digest
    assert digest == list_source(SourceConfig(path=str(tmp_path / "set/a.txt"))).digest
    monkeypatch.delenv("GANYMEDE_DATA")
    with pytest.raises(DataError, match=r"GANYMEDE_DATA does not say where.*set GANYMEDE_DATA to the folder"):
        list_source(SourceConfig(path="data:set/a.txt"))


def test_the_baseline_of_classes_learns_words(tmp_path: Path) -> None:
    (tmp_path / "reviews.tsv").write_text("\n".join(REVIEWS) + "\n")
    split = {"validation_fraction": 0.2}
    _, out = make(tmp_path / "a", task="classify", source=tsv(tmp_path / "reviews.tsv"), split=split)
    summary, report = baseline(tmp_path, dataset(tmp_path, out))
    assert summary["accuracy"] == 1.0
    assert all(line["expected"] == line["predicted"] for line in lines(report / "predictions.jsonl"))


def test_the_baseline_of_tags_gives_each_word_its_usual_tag(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(
        "Paris B-LOC\nslept O\n\nParis B-LOC\nHilton O\n\nParis B-PER\nHilton I-PER\n"
    )
    (tmp_path / "dev.conll").write_text("Paris B-LOC\nand O\nRome B-LOC\n\nParis B-PER\n")
    sources = {
        role: {"path": str(tmp_path / name), "format": "paragraphs"}
        for role, name in (("source", "train.conll"), ("heldout", "dev.conll"))
    }
    _, out = make(tmp_path / "a", task="tag", **sources)
    summary, report = baseline(tmp_path, dataset(tmp_path, out))
    assert [line["predicted"] for line in lines(report / "predictions.jsonl")] == [["B-LOC", "O", "O"], ["B-LOC"]]
    assert (summary["span_precision"], summary["span_recall"]) == (0.5, pytest.approx(1 / 3))


def test_the_baseline_of_texts_is_how_the_source_begins(tmp_path: Path) -> None:
    rows = [
        {"dialogue": f"#A#: Number {i}.\n#B#: Yes.\n#A#: Well.\n#B#: Bye.", "summary": f"#A#: Number {i}. #B#: Yes."}
        for i in range(20)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "talks.jsonl"), "fields": {"text": "dialogue", "label": "summary"}}
    _, out = make(tmp_path / "a", task="seq2seq", source=source, split={"validation_fraction": 0.3})
    summary, report = baseline(tmp_path, dataset(tmp_path, out))
    for line in lines(report / "predictions.jsonl"):
        assert line["predicted"] == f"{line['expected']} #A#: Well."
    assert summary["rouge_1"] == pytest.approx(100 * 2 * 5 / (5 + 7))
    assert "stemmer:no" in json.loads((report / "report.json").read_text())["settings"]["rouge"]


def test_a_dataset_without_a_baseline_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "heldout"):
        (folder / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"no baseline for dataset/demo@1.*task pairs"):
        baseline(tmp_path, dataset(tmp_path, folder))
