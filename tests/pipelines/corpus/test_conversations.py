"""Records of chat messages: read from every format, encoded by the chat template, never taken for special tokens."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from actors.store.artifacts import Artifact
from actors.text import CONTRACT, make_contract
from configs.errors import ContractError
from configs.schema.corpus import CorpusConfig, FieldsConfig, FiltersConfig, SourceConfig, SplitConfig
from pipelines.corpus.blocks import Message
from pipelines.corpus.chat import ChatEncoder
from pipelines.corpus.documents import Documents, read_documents, sample_texts
from pipelines.corpus.encode import Encoder
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.shards import CorpusIndex, read_batch
from pipelines.corpus.sources import list_source
from pipelines.corpus.tokenizer import SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.stages.corpus import CorpusStage

FIELDS = FieldsConfig(messages="turns")
CHATS = [
    [{"role": "user", "content": "What is json?"}, {"role": "assistant", "content": "A format."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve 🦉"}],
    [
        {"role": "user", "content": "End with <|end|><|assistant|>"},
        {"role": "assistant", "content": "No <|endoftext|>"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "e\u0301\r\nx"}],
]


def _records(chats: list[Any]) -> bytes:
    return b"".join(json.dumps({"turns": chat, "n": n}).encode() + b"\n" for n, chat in enumerate(chats))


def _write(path: Path, chats: list[Any]) -> Path:
    if path.name.endswith("parquet"):
        pq.write_table(pa.table({"n": list(range(len(chats))), "turns": chats}), path, row_group_size=3)
    elif path.name.endswith("arrow"):
        table = pa.table({"n": list(range(len(chats))), "turns": chats})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.slice(1), max_chunksize=2)
            writer.write_table(table.slice(0, 1))
    else:
        path.write_bytes(gzip.compress(_records(chats)) if path.suffix == ".gz" else _records(chats))
    return path


def _read(path: Path, span_bytes: int = 1 << 20) -> tuple[list[Documents], Ledger]:
    source = SourceConfig(path=str(path), fields=FIELDS)
    listing, ledger = list_source(source), Ledger()
    spans = plan_spans(listing, source, span_bytes)
    return [d for span in spans for d in read_documents(listing, span, source, ledger)], ledger


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_every_format_that_can_hold_messages_gives_them(tmp_path: Path, name: str) -> None:
    found, ledger = _read(_write(tmp_path / name, CHATS), 100)
    chats = [[m._asdict() for m in chat] for documents in found for chat in documents.conversations]
    cleaned = [*CHATS[:3], [CHATS[3][0], {"role": "assistant", "content": "é\nx"}]]
    assert sorted(chats, key=str) == sorted(cleaned, key=str)
    texts = {text.decode() for documents in found for text in documents.texts}
    assert texts >= {"What is json?\n\nA format.", "é\nx"}
    assert (ledger.documents, ledger.rejected, ledger.changes) == (4, [], {"controls": 1, "nfc": 1})


def test_what_is_no_conversation_is_rejected_with_the_reason(tmp_path: Path) -> None:
    good = {"role": "user", "content": "hello"}
    rows: list[Any] = [
        [good], None, "text", [], ["text"], [good, {"role": "tool", "content": None}], [{"content": "x"}],
        [{"role": "<|end|>", "content": "x"}],
        [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": ""}],
    ]  # fmt: skip
    _write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("no record")
    found, ledger = _read(tmp_path)
    assert [d.texts for d in found] == [[b"hello"]]
    assert (ledger.documents, ledger.empty) == (1, 1)
    shape = "is not an object whose role and content are text"
    said = {r.reason for r in ledger.rejected}
    assert said >= {
        "field 'turns' is null", "field 'turns' holds str, not a list of messages", "field 'turns': no messages",
        f"field 'turns': message 0 {shape}", f"field 'turns': message 1 {shape}",
        "field 'turns': message 0 has the role '<|end|>', not a word",
        "format text has no field 'turns' of messages",
    }  # fmt: skip
    assert len(ledger.rejected) == 9


def test_a_tokenizer_learns_from_the_contents(tmp_path: Path) -> None:
    source = SourceConfig(path=str(_write(tmp_path / "a.jsonl", CHATS)), fields=FIELDS)
    texts = list(sample_texts(list_source(source), source, "s", 1 << 20, Ledger()))
    assert b"What is json?\n\nA format." in texts
    assert not any(b"turns" in text or b"role" in text for text in texts)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"fields": {"messages": "turns", "text": "t"}}, "text or messages"),
        ({"fields": {"messages": "turns"}, "format": "csv"}, "csv has no field of messages"),
        ({"fields": {"messages": "turns"}, "filters": FiltersConfig(rules=("c4",))}, "filter c4"),
    ],
)
def test_what_messages_cannot_be_combined_with_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SourceConfig(path=".", **config)


@pytest.fixture(scope="module")
def encoder(tokenizer: Artifact) -> ChatEncoder:
    return ChatEncoder.load(tokenizer.path, Encoder.load(tokenizer.path, "gigatoken"), "gigatoken")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
content = st.lists(text | st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "end"]), max_size=4).map("".join)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), content), min_size=1, max_size=4)


@given(turns)
@settings(max_examples=150, deadline=None)
def test_no_content_becomes_a_special_token_and_both_ways_to_encode_agree(
    encoder: ChatEncoder, tokenizer: Artifact, chat: list[tuple[str, str]]
) -> None:
    conversation = tuple(Message(*turn) for turn in chat)
    ids = encoder.encode(conversation)
    assert encoder.agrees(conversation)
    role_ids = {"system": 1, "user": 2, "assistant": 3}
    assert [i for i in ids.tolist() if i < len(SPECIAL_TOKENS)] == [i for r, _ in chat for i in (role_ids[r], 4)]


def test_a_tokenizer_whose_template_ends_with_end_of_text_gets_no_second_one(
    tokenizer: Artifact, tmp_path: Path
) -> None:
    copy = shutil.copytree(tokenizer.path, tmp_path / "copy")
    (copy / "contract.json").unlink()
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    chat = ChatEncoder.load(copy, Encoder.load(copy, "gigatoken"), "gigatoken")
    assert 0 not in chat.encode((Message("user", "hello"),))


@pytest.mark.parametrize(("golden", "conversation"), [("d", "bad for"), ("q", "Iraq is")])
def test_ids_that_gigatoken_gets_wrong_are_not_used_or_found(
    tokenizer: Artifact, tmp_path: Path, golden: str, conversation: str
) -> None:
    """Merges across spaces, which gigatoken never makes: one that the golden chats hold, and one that they do not."""
    copy = shutil.copytree(tokenizer.path, tmp_path / "copy")
    description = json.loads((copy / "tokenizer.json").read_bytes())
    description["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                    "use_regex": False}  # fmt: skip
    description["model"]["merges"] = [[golden, "Ġ"]]
    description["model"]["vocab"] = {
        token: i for token, i in description["model"]["vocab"].items() if i < len(SPECIAL_TOKENS) + 256
    }
    description["model"]["vocab"][f"{golden}Ġ"] = len(SPECIAL_TOKENS) + 256
    (copy / "tokenizer.json").write_text(json.dumps(description))
    (copy / CONTRACT).write_text(make_contract(copy).model_dump_json())
    chat = ChatEncoder.load(copy, Encoder.load(copy, "gigatoken"), "gigatoken")
    messages = (Message("user", f"{conversation} to me"),)
    assert chat.agrees(messages) == (golden == "d")
    merged = len(SPECIAL_TOKENS) + 256
    assert (merged in chat.encode(messages)) == (golden == "d")


Run = Callable[..., tuple[StageContext, dict[str, Any]]]


@pytest.fixture
def run(tokenizer: Artifact, make_context: Callable[[str], StageContext]) -> Run:
    def go(name: str, path: Path, made_by: Artifact = tokenizer, **changes: Any) -> tuple[StageContext, dict[str, Any]]:
        context = make_context(name)
        source = SourceConfig(path=str(path), fields=FIELDS, max_bad_fraction=0.1)
        config = CorpusConfig(tokenizer="t", source=source, split=SplitConfig(validation_fraction=0.3), **changes)
        return context, CorpusStage().run(config, {"tokenizer": made_by}, context)

    return go


def _tokens(corpus: Path) -> dict[str, list[int]]:
    index = CorpusIndex.load(corpus)
    batches = [read_batch(corpus / shard.path) for split in index.splits.values() for shard in split.shards]
    names = [name for batch in batches for name in batch.column("name").to_pylist()]
    return dict(zip(names, (ids for batch in batches for ids in batch.column("tokens").to_pylist()), strict=True))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_holds_what_transformers_makes_of_the_conversations(
    run: Run, tokenizer: Artifact, tmp_path: Path
) -> None:
    chats = [[*chat, {"role": "user", "content": f"question {n}"}] for n in range(20) for chat in CHATS[:2]]
    path = _write(tmp_path / "a.jsonl", [*chats, [{"role": "tool", "content": "refused"}]])
    context, summary = run("chats", path, span_bytes=4096)
    opened = AutoTokenizer.from_pretrained(tokenizer.path)
    expected = [opened.apply_chat_template(chat, return_dict=False) for chat in chats]
    assert sorted(_tokens(context.out).values()) == sorted([*ids, 0] for ids in expected)
    assert (summary["records"], summary["documents"], summary["quarantined"]) == (41, 40, 1)
    (refused,) = [json.loads(line) for line in (context.out / "quarantine.jsonl").read_text().splitlines()]
    assert refused["offset"] == len(_records(chats))
    assert "role must be system, user or assistant, got tool" in refused["reason"]
    whole, _ = run("whole", path, span_bytes=1 << 20)
    assert _tokens(whole.out) == _tokens(context.out)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_tokenizer_without_a_template_is_an_error_that_names_the_key(
    run: Run, tokenizer: Artifact, tmp_path: Path
) -> None:
    copy = shutil.copytree(tokenizer.path, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    (copy / "contract.json").write_text(make_contract(copy).model_dump_json())
    with pytest.raises(ContractError, match=r"source\.fields\.messages needs a chat template"):
        run("none", _write(tmp_path / "a.jsonl", CHATS), Artifact(tokenizer.manifest, copy))
