import gzip
import json
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema.corpus import ContaminationConfig, EvaluationSetConfig
from pipelines.corpus.contamination import Gate, register

GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k/train.jsonl.gz"
ITEMS = [
    {"question": "Ann has four red apples and gives one of them to her brother Bob, how many are left?", "answer": "3"},
    {"question": "How far is the moon away from the earth today?", "answer": "Far."},
]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, EvaluationSetConfig]:
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "other.txt").write_text("A sentence that nobody has ever written down anywhere before this very test.")
    return {
        "sums": EvaluationSetConfig(path=str(tmp_path / "sums.jsonl"), texts=("question", "answer")),
        "other": EvaluationSetConfig(path=str(tmp_path / "other.txt")),
    }


@pytest.fixture
def gate(sets: dict[str, EvaluationSetConfig], tmp_path: Path) -> Gate:
    register(sets, ContaminationConfig(), tmp_path / "gate.arrow")
    return Gate.load(tmp_path / "gate.arrow")


def test_a_document_that_quotes_an_item_is_found_whatever_its_case_and_punctuation(gate: Gate) -> None:
    quoted = "Some text. ANN has four -- red apples and (gives one) of them to her brother, and so on."
    found = gate.overlap(quoted.encode())
    assert found is not None
    assert (found.name, found.passage) == ("sums", "ann has four red apples and gives one of them to her brother")
    assert gate.overlap(b"Ann has four red apples and gives one of them to her sister") is None


def test_a_short_item_is_found_only_whole(gate: Gate) -> None:
    found = gate.overlap(b"They asked: how far is the moon away from the earth today?")
    assert found is not None
    assert found.passage == "how far is the moon away from the earth today"
    assert gate.overlap(b"how far is the moon away from the earth") is None
    assert gate.overlap(b"") is gate.overlap(b"Far. 3") is None


def test_what_was_registered_is_told(sets: dict[str, EvaluationSetConfig], tmp_path: Path) -> None:
    checked = register(sets, ContaminationConfig(), tmp_path / "gate.arrow").sets
    assert sorted(checked) == ["other", "sums"]
    assert (checked["sums"].items, checked["sums"].unchecked_items, checked["sums"].words) == (4, 2, 13)
    assert checked["sums"].ngrams == (18 - 13 + 1) + 1
    again = register(sets, ContaminationConfig(), tmp_path / "again.arrow").sets
    assert again == checked
    assert (tmp_path / "again.arrow").read_bytes() == (tmp_path / "gate.arrow").read_bytes()


def test_a_set_that_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("yes")
    with pytest.raises(DataError, match="no item that a document can be checked against"):
        register(
            {"short": EvaluationSetConfig(path=str(tmp_path / "short.txt"))}, ContaminationConfig(), tmp_path / "g"
        )


def test_every_item_of_a_real_set_is_found_and_prose_is_not(tmp_path: Path) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"no data at {GSM8K}")
    config = EvaluationSetConfig(path=str(GSM8K), texts=("question",))
    checked = register({"gsm8k": config}, ContaminationConfig(), tmp_path / "gate.arrow").sets
    gate = Gate.load(tmp_path / "gate.arrow")
    items = [json.loads(line)["question"] for line in gzip.decompress(GSM8K.read_bytes()).splitlines()]
    assert checked["gsm8k"].items == len(items)
    missed = [item for item in items if gate.overlap(f"Question: {item} Answer:".encode()) is None]
    assert len(missed) <= checked["gsm8k"].unchecked_items
    assert gate.overlap(Path(json.__file__).read_bytes()) is None
