"""Languages are told, counted by source and kept or dropped as the recipe says."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.store.artifacts import Artifact
from configs.errors import ConfigError
from configs.schema.corpus import CorpusConfig, FieldsConfig, FiltersConfig, LanguageConfig, SourceConfig, SplitConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import read_documents
from pipelines.corpus.language import UNDETERMINED, Languages
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.sources import list_source
from pipelines.stage import StageContext
from pipelines.stages.corpus import CorpusStage

DATA = Path(os.environ.get("GANYMEDE_DATA", Path(__file__).parents[4] / "shared/data"))
ENGLISH = "The weather was fine in the morning, and we walked along the river to the old mill number {}."
FRENCH = "Le temps était beau ce matin, et nous avons marché le long de la rivière jusqu'au moulin numéro {}."
GERMAN = "Am Morgen war das Wetter schön, und wir gingen am Fluss entlang bis zur alten Mühle Nummer {}."


@pytest.mark.parametrize("name", ["multi30k-en-fr/val.{}.gz", "tatoeba-en-fr/fra.txt.gz"])
def test_real_sentences_are_told_apart(name: str) -> None:
    path = DATA / name.format("en")
    if not path.is_file():
        pytest.skip(f"no data at {path}; set GANYMEDE_DATA")
    languages = Languages.load(LanguageConfig())
    for column, code in enumerate(("en", "fr")):
        lines = gzip.decompress((DATA / name.format(code)).read_bytes()).decode().splitlines()[::50]
        found = [languages.identify(line.split("\t")[column % (line.count("\t") + 1)].encode()) for line in lines]
        assert found.count(code) / len(found) > 0.95
        assert 1 - (found.count(code) + found.count(UNDETERMINED)) / len(found) < 0.01


def test_what_is_no_language_is_undetermined() -> None:
    languages = Languages.load(LanguageConfig(min_confidence=0.9))
    assert {languages.identify(text) for text in (b"", b"3.14 2.71", b"\x00\n")} == {UNDETERMINED}
    assert languages.identify(b"x\xc3" + ENGLISH.encode()) == "en"


def test_a_language_that_cannot_be_told_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"source\.filters\.language\.keep.*xx.*allowed: .*en, "):
        Languages.load(LanguageConfig(keep=("en", "xx")))


def _write(folder: Path) -> Path:
    texts = [(ENGLISH, "news"), (FRENCH, "news"), (GERMAN, "books"), (ENGLISH, "books")]
    rows = [{"text": t.format(n), "from": s} for n in range(40) for t, s in texts]
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "", "from": "news"}]))
    return path


def test_documents_in_other_languages_are_dropped_with_their_reason(tmp_path: Path) -> None:
    path = _write(tmp_path)
    summaries = []
    for span_bytes in (2000, 1 << 20):
        filters = FiltersConfig(language=LanguageConfig(keep=("en", "de")), min_bytes=20)
        source = SourceConfig(path=str(path), fields=FieldsConfig(source="from"), filters=filters)
        listing, account, found = list_source(source), Account(), []
        for span in plan_spans(listing, source, span_bytes):
            ledger = Ledger()
            for documents in read_documents(listing, span, source, ledger):
                found += documents.texts
            account.add(Ledger.model_validate_json(ledger.model_dump_json()))
        assert len(found) == 120
        assert not any(b"temps" in text for text in found)
        summaries.append((account.summary(), account.by_source))
    assert summaries[0] == summaries[1]
    assert summaries[0][0]["drops"] == {"language": 40}
    assert summaries[0][0]["languages"] == {"de": 40, "en": 80, "fr": 40}
    assert "temps" in summaries[0][0]["examples"]["language"][0]["text"]
    news = summaries[0][1]["news"]
    assert (news.documents_read, news.empty, news.drops, news.languages) == (
        81, 1, {"language": 40}, {"en": 40, "fr": 40},
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_report_counts_languages_by_source(
    tokenizer: Artifact, tmp_path: Path, make_context: Callable[[str], StageContext]
) -> None:
    def make(name: str, **changes: Any) -> tuple[dict[str, Any], str]:
        context = make_context(name)
        source = SourceConfig(path=str(_write(tmp_path)), **changes)
        config = CorpusConfig(tokenizer="tokenizer", source=source, split=SplitConfig(validation_fraction=0.3))
        CorpusStage().run(config, {"tokenizer": tokenizer}, context)
        return json.loads((context.out / "report.json").read_bytes()), (context.out / "report.html").read_text()

    filters = FiltersConfig(language=LanguageConfig())
    report, page = make("told", fields=FieldsConfig(source="from"), filters=filters)
    assert report["languages"] == {"de": 40, "en": 80, "fr": 40}
    books = report["by_source"]["books"]
    assert books["languages"] == {"de": 40, "en": 40}
    assert (books["documents_read"], books["documents"], books["read_bytes"]) == (80, 80, books["bytes"])
    assert books["bytes_per_token"] == round(books["bytes"] / books["tokens"], 4)
    assert "news" in page[page.index("<h2>Languages</h2>") :]

    report, page = make("untold")
    (name,) = report["by_source"]
    assert (name, report["languages"]) == ("source", {})
    assert report["by_source"]["source"]["documents"] == report["documents"] == 160
    assert "source.filters.language" in page
