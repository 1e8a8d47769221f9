import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.corpus import _ids, _page
from benchmarks.corpus_data import enlarge, make_jsonl
from benchmarks.corpus_peers import fingerprint
from benchmarks.programs import run_peer

DATA = Path(os.environ.get("GANYMEDE_DATA", Path(__file__).parents[3] / "shared/data"))


def _document(peer: dict[str, Any]) -> dict[str, Any]:
    corpus = {
        "seconds": [3.0, 1.0, 1.1],
        "digest": "d",
        "documents": 2,
        "tokens": 9,
        "ids": "a",
        "encoder": "gigatoken",
    }
    rate = {"batch": 60.0, "packed": 10.0}
    return {
        "date": "today", "command": "python -m benchmarks.corpus", "jsonl_bytes": 92_000_000, "processes": 2, "runs": 3,
        "machine": {"processor": "p", "cores": 2, "memory_gb": 8, "load_before": 0.1, "python": "3"},
        "versions": {"ray": "2"},
        "bare": {"runs": [{"seconds": 0.5, "seconds_cold": 0.9, "ids": "a"}]},
        "ours": {count: {**corpus, "driver_mb": 300, "worker_mb": 400} for count in ("1", "2")},
        "loader": [{"rows": 16, "row_tokens": 256, "restore_ms": 9.0, "million_tokens_per_second": rate}],
        "peers": {"datasets": peer},
    }  # fmt: skip


def test_ids_that_differ_are_shouted_and_ratios_are_against_our_warm_median() -> None:
    run = {"seconds": 21.0, "seconds_map": 20.0, "ids": "a"}
    same = _document({"version": "5.2.0", "runs": [run]})
    assert "| datasets 5.2.0 | 21.00 | 4.4 | 20.00x |" in _page(same)
    assert "Token ids: equal in every document" in _page(same)
    other = _document({"version": "5.2.0", "runs": [{**run, "ids": "b"}]})
    assert "Token ids: DIFFERENT" in _page(other)
    assert _ids(other) == {"a", "b"}


def test_a_peer_that_is_not_installed_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "give --peers" in run_peer("datasets", None, tmp_path, "", tmp_path, 1)["missing"]
    found = run_peer("datatrove", sys.executable, tmp_path, "", tmp_path, 1)
    assert "pip install datatrove==" in found["missing"]
    assert f"- datasets: {found['missing']}" in _page(_document(found))


def test_the_fingerprint_of_documents_knows_their_bounds_but_not_their_order() -> None:
    first, second = np.array([1, 2, 3], np.uint16), np.array([4], np.uint16)
    assert fingerprint([first, second]) == fingerprint([[4], [1, 2, 3]])
    assert fingerprint([first, second])["ids"] != fingerprint([[1, 2], [3, 4]])["ids"]


def test_the_data_are_novels_and_modules_in_turn(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data in {DATA}; set GANYMEDE_DATA")
    size = make_jsonl(DATA, tmp_path / "source", 1_000_000)
    assert 1_000_000 < size < 3_000_000
    text = "".join(p.read_text() for p in (tmp_path / "source").glob("*.jsonl"))
    assert '{"id": "ENG18400_Trollope/' in text
    assert '.py", "text": ' in text
    assert make_jsonl(DATA, tmp_path / "source", 1_000_000) == size


def test_a_larger_source_holds_no_document_twice(tmp_path: Path) -> None:
    (tmp_path / "part-00.jsonl").write_text('{"id": "a", "text": "one two three"}\n{"id": "b", "text": "four five"}\n')
    size = enlarge(tmp_path, tmp_path / "larger", 1000)
    lines = [json.loads(line) for p in (tmp_path / "larger").glob("*.jsonl") for line in p.read_text().splitlines()]
    assert 1000 <= size == sum(p.stat().st_size for p in (tmp_path / "larger").glob("*.jsonl"))
    assert len({line["text"] for line in lines}) == len(lines)
    assert len({line["id"] for line in lines}) == len(lines)
