"""Duplicates, overlaps with evaluation sets and the report, through the whole stage."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import blake3
import pytest

from actors.store.artifacts import Artifact
from configs.errors import DataError
from configs.schema.base import references
from configs.schema.corpus import (
    ContaminationConfig,
    CorpusConfig,
    DedupConfig,
    EvaluationSetConfig,
    FieldsConfig,
    NearConfig,
    SourceConfig,
    SplitConfig,
)
from pipelines.corpus.shards import CorpusIndex, read_batch
from pipelines.stage import StageContext
from pipelines.stages.corpus import CorpusStage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

QUESTION = "If a train leaves the old station at nine and travels sixty miles an hour when does it come home?"
Run = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of two sources, then two copies, two almost-copies, and two that quote a question."""
    paragraphs = [
        " ".join(f"{word}{n}" for word in ("alpha", "beta", "gamma") for n in range(40 * i, 40 * i + 40))
        for i in range(60)
    ]
    lines = [{"text": text, "from": "web" if i % 3 else "books", "id": f"d{i}"} for i, text in enumerate(paragraphs)]
    lines += [{"text": paragraphs[i], "from": "web", "id": f"copy{i}"} for i in (3, 3)]
    lines += [{"text": f"{paragraphs[i]} <one> more", "from": None, "id": f"near{i}"} for i in (5, 7)]
    lines += [
        {"text": f"Quiz {n}: {QUESTION.upper()} " + "So it goes. " * n, "from": "web", "id": f"quiz{n}"}
        for n in range(8)
    ]
    path = tmp_path_factory.mktemp("records") / "all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(tokenizer: Artifact, records: Path, make_context: Callable[[str], StageContext]) -> Run:
    def go(name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
        context = make_context(name)
        config = CorpusConfig(
            tokenizer="tokenizer",
            source=SourceConfig(path=str(records), fields=FieldsConfig(id="id", source="from")),
            split=SplitConfig(validation_fraction=0.2),
            **changes,
        )
        return context.out, CorpusStage().run(config, {"tokenizer": tokenizer}, context)

    return go


@pytest.fixture
def questions(tmp_path: Path) -> ContaminationConfig:
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": QUESTION, "answer": "Never."}) + "\n")
    quiz = EvaluationSetConfig(path=str(tmp_path / "quiz.jsonl"), texts=("question", "answer"))
    return ContaminationConfig(sets={"quiz": quiz})


def _ids(corpus: Path, split: str | None = None) -> set[str]:
    index = CorpusIndex.load(corpus)
    shards = [shard for name, record in index.splits.items() if split in (None, name) for shard in record.shards]
    return {name for shard in shards for name in read_batch(corpus / shard.path).column("id").to_pylist()}


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): blake3.blake3(p.read_bytes()).hexdigest() for p in paths}


def test_duplicates_are_dropped_and_counted(run: Run) -> None:
    whole, before = run("whole")
    exact, _ = run("exact", dedup=DedupConfig())
    assert _ids(whole) - _ids(exact) == {"copy3"}
    near, summary = run("near", dedup=DedupConfig(near=NearConfig()))
    dropped = _ids(whole) - _ids(near)
    assert {"copy3", "near5", "near7"} <= dropped
    assert not {f"d{i}" for i in (3, 5, 7)} & dropped
    assert summary["drops"]["exact_duplicate"] == 2
    assert summary["duplicates"]["exact"] == 2
    assert summary["documents"] == before["documents"] - sum(summary["drops"].values())
    assert summary["documents"] == summary["train"]["documents"] + summary["validation"]["documents"]
    assert {"kept", "dropped", "exact"} == set(summary["duplicates"]["examples"][0])
    assert all("jsonl:" in found["kept"] for found in summary["duplicates"]["largest"])


def test_the_bytes_do_not_depend_on_spans_or_tasks(run: Run) -> None:
    one, _ = run("one", dedup=DedupConfig(near=NearConfig()), max_in_flight=1)
    many, _ = run("many", dedup=DedupConfig(near=NearConfig()), span_bytes=4096, max_in_flight=3)
    assert _files(one) == _files(many)


def test_a_run_whose_fingerprints_were_damaged_ends_in_the_same_bytes(
    run: Run,
) -> None:
    settings = {"dedup": DedupConfig(near=NearConfig()), "span_bytes": 4096}
    out, _ = run("damaged", **settings)
    whole = _files(out)
    parts = sorted((out.parent / "work").rglob("*-fingerprints.arrow"))
    assert len(parts) > 4
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    parts[1].unlink()
    kept = parts[2].stat().st_mtime_ns
    again, _ = run("damaged", **settings)
    assert _files(again) == whole
    assert parts[2].stat().st_mtime_ns == kept


def test_training_documents_that_quote_an_evaluation_set_are_dropped_and_the_corpus_says_so(
    run: Run, questions: ContaminationConfig
) -> None:
    before, _ = run("before")
    after, summary = run("after", contamination=questions)
    quiz = {f"quiz{n}" for n in range(8)}
    assert quiz & _ids(before, "train")
    assert not quiz & _ids(after, "train")
    assert quiz & _ids(after, "validation") == quiz & _ids(before, "validation")
    checked = CorpusIndex.load(after).checked["quiz"]
    assert (checked.items, checked.unchecked_items) == (2, 1)
    assert checked.dropped == summary["drops"]["overlap_quiz"] == len(quiz & _ids(before, "train"))
    assert "travels sixty miles" in summary["examples"]["overlap_quiz"][0]["text"]
    assert CorpusIndex.load(before).checked == {}


def test_held_out_pairs_of_a_dataset_artifact_are_an_evaluation_set(
    tokenizer: Artifact, records: Path, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    pair = {"id": "1", "task": "quiz", "prompt": QUESTION, "completion": "Never.", "source": "-"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(pair) + "\n")
    config = CorpusConfig(
        tokenizer="tokenizer",
        source=SourceConfig(path=str(records), fields=FieldsConfig(id="id")),
        split=SplitConfig(validation_fraction=0.2),
        evaluation_data={"pairs": "instructions"},
    )
    assert dict(references(config)) == {"tokenizer": "tokenizer", "evaluation_data.pairs": "instructions"}
    inputs = {"tokenizer": tokenizer, "evaluation_data.pairs": Artifact(tokenizer.manifest, tmp_path)}
    summary = CorpusStage().run(config, inputs, make_context("pairs"))
    assert summary["contamination"]["pairs"]["dropped"] == summary["drops"]["overlap_pairs"] > 0
    (tmp_path / "heldout.jsonl").unlink()
    with pytest.raises(DataError, match=r"evaluation_data\.pairs cannot be registered"):
        CorpusStage().run(config, inputs, make_context("none"))


def test_a_corpus_that_overlaps_is_refused_where_the_recipe_says_so(run: Run, questions: ContaminationConfig) -> None:
    with pytest.raises(DataError, match=r"evaluation set quiz.*travels sixty miles"):
        run("refused", contamination=questions.model_copy(update={"action": "refuse"}))


def test_what_overlaps_is_kept_and_counted_where_the_recipe_says_so(run: Run, questions: ContaminationConfig) -> None:
    before, _ = run("before")
    corpus, summary = run("kept", contamination=questions.model_copy(update={"action": "keep"}))
    assert _ids(corpus, "train") == _ids(before, "train")
    checked = CorpusIndex.load(corpus).checked["quiz"]
    assert checked.kept == len({f"quiz{n}" for n in range(8)} & _ids(before, "train"))
    assert checked.dropped == 0
    assert "overlap_quiz" not in summary["drops"]


def test_another_evaluation_set_is_another_fingerprint(questions: ContaminationConfig, records: Path) -> None:
    config = CorpusConfig(tokenizer="tokenizer", source=SourceConfig(path=str(records)), contamination=questions)
    first = CorpusStage().sources(config)
    path = Path(questions.sets["quiz"].path)
    path.write_text(path.read_text() + json.dumps({"question": "Another?", "answer": ""}) + "\n")
    assert first["contamination.quiz"] != CorpusStage().sources(config)["contamination.quiz"]
    assert first["source"] == CorpusStage().sources(config)["source"]


def test_the_page_shows_the_figures_and_needs_nothing_else(run: Run, questions: ContaminationConfig) -> None:
    corpus, summary = run("page", dedup=DedupConfig(near=NearConfig()), contamination=questions)
    report = json.loads((corpus / "report.json").read_bytes())
    assert {key: summary[key] for key in report} == report
    assert sum(count for _, _, count in report["length_tokens"]) == report["documents"]
    assert set(report["by_source"]) == {"books", "web", "(none)"}
    assert report["by_source"]["(none)"]["drops"] == {"near_duplicate": 2}
    for total, per_source in (("documents", "documents"), ("read_bytes", "read_bytes"), ("empty", "empty")):
        assert report[total] == sum(s[per_source] for s in report["by_source"].values())
    for source in report["by_source"].values():
        assert source["documents_read"] == source["documents"] + source["empty"] + sum(source["drops"].values())
    reasons = {reason for source in report["by_source"].values() for reason in source["drops"]}
    assert {r: sum(s["drops"].get(r, 0) for s in report["by_source"].values()) for r in reasons} == report["drops"]
    assert sum(g["tokens"] for g in report["by_source"].values()) == sum(
        report[s]["tokens"] for s in ("train", "validation")
    )
    page = (corpus / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|url\(|<script|https?://", page)
    body = page[page.index("<body>") : page.index("</html>")]
    root = ElementTree.fromstring(body)  # what is escaped is well-formed
    text = "".join(root.itertext())
    for shown in ("overlap_quiz", "exact_duplicate", "near_duplicate", "books", "bytes a token"):
        assert shown in text
    assert len(list(root.iter("svg"))) >= 4
