"""Small corpora, written as the corpus stage writes them, from token arrays or texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipelines.corpus.shards import (
    BLOCK_BYTES,
    INDEX,
    CorpusIndex,
    SplitRecord,
    cut_shards,
    document_schema,
    document_tokens,
    shard_name,
    token_column,
    write_shard,
)

END_OF_TEXT = "<|endoftext|>"


def document_batch(
    documents: Sequence[Any], texts: Sequence[bytes] | None = None, ids: Sequence[str] = ()
) -> pa.RecordBatch:
    """Documents of uint16 tokens, named `0.txt`, `1.txt` and so on, two bytes a token unless `texts` say."""
    known = {
        "name": [f"{i}.txt" for i in range(len(documents))],
        "size_bytes": [len(t) for t in texts] if texts else [2 * len(d) for d in documents],
        "blake3": [blake3.blake3(t).hexdigest() for t in texts] if texts else ["00"] * len(documents),
        "id": list(ids),
    }
    schema = document_schema("uint16", ["id"] if ids else [])
    columns = [
        token_column(list(documents), "uint16") if field.name == "tokens" else pa.array(known[field.name], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def write_split(folder: Path, split: str, batches: Sequence[pa.RecordBatch], shard_tokens: int) -> SplitRecord:
    """Shards of `batches`, in this order, below `folder`."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shards = []
    for number, runs in enumerate(cut_shards(map(document_tokens, batches), shard_tokens)):
        name = shard_name(split, number)
        documents = [batches[run.part].slice(run.begin, run.end - run.begin) for run in runs]
        shards.append(write_shard(folder / name, name, pa.concat_batches(documents)))
    return SplitRecord.of(shards, sum(size for batch in batches for size in batch.column("size_bytes").to_pylist()))


def write_corpus(
    folder: Path, splits: Mapping[str, pa.RecordBatch], *, shard_tokens: int = 200, vocab_size: int = 1 << 16,
    contract: str = "c",
) -> Path:  # fmt: skip
    """Shards and index of `splits` below `folder`."""
    records = {split: write_split(folder, split, [batch], shard_tokens) for split, batch in splits.items()}
    index = CorpusIndex(
        dtype="uint16", vocab_size=vocab_size, end_of_text_id=0, contract=contract, block_bytes=BLOCK_BYTES,
        splits=records,
    )  # fmt: skip
    (folder / INDEX).write_text(index.model_dump_json())
    return folder


def write_byte_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer of 257 entries: end of text, then the bytes."""
    entries = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    return tokenizer


def write_text_corpus(folder: Path, splits: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> Path:
    """A corpus of `splits`' texts."""
    batches = {}
    for split, texts in splits.items():
        ids = [np.array([*tokenizer.encode(text).ids, 0], dtype=np.uint16) for text in texts]
        batches[split] = document_batch(ids, [text.encode() for text in texts])
    return write_corpus(folder, batches, vocab_size=tokenizer.get_vocab_size())
