import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.store.artifacts import Artifact
from actors.text import make_contract
from configs.errors import ContractError, DataError
from configs.schema.corpus import CorpusConfig, FieldsConfig, SourceConfig, SplitConfig
from pipelines.corpus.documents import sample_texts
from pipelines.corpus.encode import PROBES
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.loader import Loader
from pipelines.corpus.shards import CorpusIndex
from pipelines.corpus.sources import hash_fraction, is_validation, list_source
from pipelines.corpus.spans import Commit, is_checked
from pipelines.corpus.tokenizer import save_tokenizer
from pipelines.stage import Progress, StageContext
from pipelines.stages.corpus import CorpusStage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Run = Callable[..., tuple[StageContext, dict[str, Any]]]


def _config(source: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(
        tokenizer="tokenizer",
        source=SourceConfig(
            path=str(source),
            max_bad_fraction=changes.pop("max_bad_fraction", 0.05),
            fields=changes.pop("fields", FieldsConfig()),
        ),
        split=SplitConfig(validation_fraction=0.2),
        shard_tokens=50_000,
        **{"span_bytes": 100_000, **changes},
    )


@pytest.fixture
def run(tokenizer: Artifact, make_context: Callable[[str], StageContext]) -> Run:
    def go(name: str, source: Path, **changes: Any) -> tuple[StageContext, dict[str, Any]]:
        context = make_context(name)
        return context, CorpusStage().run(_config(source, **changes), {"tokenizer": tokenizer}, context)

    return go


@pytest.fixture
def broken_source(source_folder: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(source_folder, tmp_path / "broken")
    (copy / "latin.py").write_bytes(b"# caf\xe9\n")
    return copy


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): blake3.blake3(p.read_bytes()).hexdigest() for p in paths}


def _texts(folder: Path, tokenizer: Path, split: str) -> Iterator[str]:
    """The documents of a corpus, decoded from what the loader gives."""
    loader = Loader.open(folder, split=split, row_tokens=1, batch_rows=1, seed=0)
    ids = [*loader.rows(loader.rows_per_epoch)[:, 0].tolist(), 0]
    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    begin = 0
    for end, token in enumerate(ids):
        if token == 0:
            yield decoder.decode(ids[begin:end], skip_special_tokens=False)
            begin = end + 1


def test_every_document_is_in_its_split_once_and_comes_back(run: Run, source_folder: Path, tokenizer: Artifact) -> None:
    context, summary = run("corpus", source_folder)
    listing = list_source(SourceConfig(path=str(source_folder)))
    for split in ("train", "validation"):
        config = SplitConfig(validation_fraction=0.2)
        files = [f for f in listing.files if is_validation(f.blake3, config) == (split != "train")]
        expected = [text for f in files if (text := listing.read(f).decode())]
        assert list(_texts(context.out, tokenizer.path, split)) == expected
        assert summary[split]["documents"] == len(expected)
    assert summary["empty"] >= 1
    assert summary["encoder"] == "gigatoken"
    assert CorpusIndex.load(context.out).contract == make_contract(tokenizer.path).hash
    tracked = "".join(path.read_text() for path in (context.home / "tracked").rglob("*.jsonl"))
    assert all(f'"corpus/{name}"' in tracked for name in ("train/tokens", "megabytes_per_second", "seconds/encode"))


def test_shards_are_the_same_bytes_for_any_number_of_tasks_at_a_time(run: Run, broken_source: Path) -> None:
    one, _ = run("one", broken_source, max_in_flight=1)
    three, _ = run("three", broken_source, max_in_flight=3)
    assert _files(one.out) == _files(three.out)
    assert len(CorpusIndex.load(one.out).splits["train"].shards) > 1


def test_a_killed_run_goes_on_from_its_commits_to_the_same_bytes(run: Run, broken_source: Path) -> None:
    context, _ = run("killed", broken_source)
    whole = _files(context.out)
    parts = context.work / "parts-gigatoken"
    commits = sorted(parts.glob("*.json"))
    assert len(commits) > 3
    commits[0].unlink()
    commits[1].write_text(commits[1].read_text()[:-20])
    damaged = parts / commits[2].name.replace(".json", "-train.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (parts / ".000000-train.arrow.123.tmp").write_bytes(b"half")
    kept = {p: p.stat().st_mtime_ns for p in commits[3:]}

    again, _ = run("killed", broken_source)
    assert _files(again.out) == whole
    assert {p: p.stat().st_mtime_ns for p in commits[3:]} == kept


def test_unusable_files_are_quarantined_with_path_offset_and_reason(run: Run, broken_source: Path) -> None:
    context, summary = run("quarantine", broken_source)
    assert summary["quarantined"] == 1
    assert [json.loads(line) for line in (context.out / "quarantine.jsonl").read_text().splitlines()] == [
        {"path": "latin.py", "offset": 5, "reason": "not UTF-8: invalid continuation byte"}
    ]


def test_one_big_file_is_spread_over_spans_and_gives_the_same_bytes_for_any_size_of_them(
    run: Run, source_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    texts = [p.read_text() for p in sorted(source_folder.rglob("*.py"))]
    lines = [json.dumps({"text": t, "from": f"file {n % 3}"}) for n, t in enumerate(texts)]
    (folder / "all.jsonl").write_text("\n".join([*lines, '{"text": "cut off']))
    fields = FieldsConfig(source="from")
    runs = [run(f"span{n}", folder, span_bytes=n, fields=fields) for n in (20_000, 1 << 22)]
    assert _files(runs[0][0].out) == _files(runs[1][0].out)
    assert len(list((runs[0][0].work / "parts-gigatoken").glob("*.json"))) > 10
    report = json.loads((runs[0][0].out / "report.json").read_bytes())
    assert (report["records"], report["documents"], report["quarantined"]) == (len(lines) + 1, sum(map(bool, texts)), 1)
    shard = pa.ipc.open_file(runs[0][0].out / "shards/train-00000.arrow").read_all()
    assert set(shard["source"].to_pylist()) == {"file 0", "file 1", "file 2"}
    assert all(name.startswith("all.jsonl:") for name in shard["name"].to_pylist())


def test_a_source_that_changes_meanwhile_is_an_error(
    tokenizer: Artifact, source_folder: Path, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    source = shutil.copytree(source_folder, tmp_path / "moving")

    def add_a_file(progress: Progress) -> None:
        (source / "late.py").write_text("x = 1")

    context = replace(make_context("changed"), progress=add_a_file)
    with pytest.raises(DataError, match="changed while"):
        CorpusStage().run(_config(source), {"tokenizer": tokenizer}, context)


def test_too_many_unusable_files_fail_the_stage(run: Run, broken_source: Path) -> None:
    with pytest.raises(DataError, match=r"latin\.py at byte 5.*max_bad_fraction 0\.001"):
        run("bad", broken_source, max_bad_fraction=0.001)


def test_an_empty_split_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/only.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="no document of the source is in split"):
        run("lonely", tmp_path / "data")


def test_a_tokenizer_without_contract_is_refused(
    tokenizer: Artifact, source_folder: Path, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    copy = shutil.copytree(tokenizer.path, tmp_path / "copy")
    (copy / "contract.json").unlink()
    with pytest.raises(ContractError, match="text contract"):
        CorpusStage().run(
            _config(source_folder), {"tokenizer": Artifact(tokenizer.manifest, copy)}, make_context("refused")
        )


def test_a_difference_found_on_the_way_makes_everything_anew_with_tokenizers(
    tokenizer: Artifact, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    """The tokenizer merges `q` with a space, which gigatoken never does; one document that is checked shows it."""
    folder = tmp_path / "crossing"
    _save_crossing_tokenizer(folder)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        (source / f"{number:02}.py").write_text(f"text {number} " * 500)
    (source / "99.py").write_text(next(t for t in (f"Iraq is {n}" for n in range(10**6)) if _checked_late(t)))

    context = make_context("fallback")
    for _ in range(2):
        summary = CorpusStage().run(_config(source), {"tokenizer": Artifact(tokenizer.manifest, folder)}, context)
        assert (summary["encoder"], "99.py" in summary["encoder_reason"]) == ("tokenizers", True)
    texts = [t for split in ("train", "validation") for t in _texts(context.out, folder, split)]
    assert sorted(texts) == sorted(p.read_text() for p in source.iterdir())
    merged = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("qĠ")
    loader = Loader.open(context.out, split="train", row_tokens=1, batch_rows=1, seed=0)
    assert merged in loader.rows(loader.rows_per_epoch)
    records = [Commit.model_validate_json(p.read_bytes()) for p in (context.work / "parts-gigatoken").glob("*.json")]
    assert [c.differing for c in records if c.differing] == [("99.py",)]


def test_a_sample_that_the_encoders_differ_on_is_enough_to_fall_back(
    tokenizer: Artifact, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    folder = tmp_path / "crossing"
    _save_crossing_tokenizer(folder)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number:02}.py").write_text(f"Iraq is {number}")
    inputs = {"tokenizer": Artifact(tokenizer.manifest, folder)}
    summary = CorpusStage().run(_config(source), inputs, make_context("sample"))
    assert summary["encoder"] == "tokenizers"
    assert summary["encoder_reason"].startswith("gigatoken encoded 'Iraq is ")


def test_the_summary_counts_the_documents_that_both_encoders_saw(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number:02}.py").write_text(f"text {number} " * 500)
    checked = sum(is_checked(blake3.blake3(p.read_bytes()).hexdigest()) for p in source.iterdir())
    (source / "99.py").write_text(next(t for t in (f"Page {n}" for n in range(10**6)) if _checked_late(t)))
    config = _config(source).source
    sample = list(sample_texts(list_source(config), config, "probe", 100_000, Ledger()))
    before = len(PROBES) + len(sample)
    for _ in range(2):  # encoded, and read from the commits
        _, summary = run("checked", source)
        assert summary["encoder_reason"] == f"ids equal to those of tokenizers on {before + checked + 1} texts"


def _checked_late(text: str) -> bool:
    """In the training split, checked on the way, and not among the documents that are looked at before."""
    digest = blake3.blake3(text.encode()).hexdigest()
    return is_checked(digest) and hash_fraction("probe", digest) > 0.9 and hash_fraction("split-1", digest) > 0.2


def _save_crossing_tokenizer(folder: Path) -> None:
    specials = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "qĠ"]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [("q", "Ġ")]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    save_tokenizer(tokenizer, folder)
    (folder / "contract.json").write_text(make_contract(folder).model_dump_json())
