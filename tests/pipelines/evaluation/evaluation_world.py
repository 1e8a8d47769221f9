"""A tiny tokenizer, corpus and dataset, and two tiny models: one random, one that learnt the held-out answers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pyarrow as pa
import torch
import yaml

from actors.store.artifacts import Artifact, ArtifactStore
from actors.store.tracker import NoTracker, Run
from actors.text import CONTRACT, Text, make_contract
from configs.artifacts import Identity, Ref
from configs.schema.evaluation import EvaluateConfig
from configs.schema.model import ModelConfig
from pipelines.corpus.instructions import Pair
from pipelines.corpus.shards import (
    BLOCK_BYTES,
    INDEX,
    CorpusIndex,
    SplitRecord,
    document_schema,
    token_column,
)
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
from pipelines.stage import Progress, StageContext
from pipelines.training.models import build_model, save_model
from tests.pipelines.corpus.corpus_files import write_split

TEXTS = [f"def add_{n}(a, b):\n    return a + b + {n}\n\n\nclass Thing{n}:\n    value = {n}\n" for n in range(40)]
PAIRS = [
    Pair(id="s0", task="summary", prompt="def add(a, b): return a + b", completion="Return the sum.", source="m:add"),
    Pair(id="s1", task="summary", prompt="def neg(a): return -a", completion="Return the negative.", source="m:neg"),
    Pair(id="g0", task="signature", prompt="Sum of a, b: add", completion="def add(a, b):", source="m:add"),
    Pair(id="g1", task="signature", prompt="Negative of a: neg", completion="def neg(a):", source="m:neg"),
    Pair(id="g2", task="signature", prompt="word " * 200, completion="def too_long():", source="m:too_long"),
]
TRAINED_ON = [f"def trained_on_{n}(): ..." for n in range(8)]
_SPLITS = {"train": TRAINED_ON, "validation": TEXTS}
CONFIG = EvaluateConfig(
    models={"pretrained": "pretrain", "finetuned": "finetune"},
    corpus="corpus",
    data="instructions",
    rows=4,
    pairs=8,
    max_new_tokens=16,
    max_sequences=4,
)


@dataclass(frozen=True)
class World:
    """Published inputs of an evaluation, by role."""

    store: ArtifactStore
    inputs: Mapping[str, Artifact]

    def publish(self, kind: str, name: str, folder: Path, inputs: Mapping[str, Artifact], run: str | None = None):
        return publish(self.store, kind, name, folder, inputs, run)


def classes_task(folder: Path, prompt: str, **rest: Any) -> str:
    """A task of two classes, YAML, over `dev.tsv` and `train.tsv` of a folder: a text and the number of its class."""
    data = {"format": "tsv", "columns": ["text", "label"], "get": "written by the test"}
    data |= {"evaluation": str(folder / "dev.tsv"), "train": str(folder / "train.tsv")}
    task = {"description": "Which?", "kind": "classification", "data": data, "prompt": prompt, "label": "label"}
    return yaml.safe_dump({**task, "choices": ["no", "yes"], **rest})


def publish(store, kind, name, folder, inputs, run=None) -> Artifact:
    return store.publish(
        folder,
        ref=Ref(kind, name, 1),
        identity=Identity(kind, 1, {}, {}, {}),
        config={},
        inputs=inputs,
        summary={},
        tracking_run=run,
        fence=lambda: None,
    )


def stage_context(
    folder: Path, store: ArtifactStore, run: Run | None = None, progress: Callable[[Progress], None] | None = None
) -> StageContext:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    return StageContext(
        name="evaluate",
        work=folder / "work",
        out=folder / "out",
        run=run or NoTracker().run("key", "evaluate"),
        progress=progress or (lambda _: None),
        check_lease=lambda: None,
        store=store,
        home=folder,
    )


def make_world(root: Path) -> World:
    """Publishes all of it below `root`."""
    store = ArtifactStore(root / "store")

    folder = _new(root, "tokenizer")
    pair_texts = [p.prompt + p.completion for p in PAIRS]
    save_tokenizer(train_tokenizer([*TEXTS, *pair_texts], 400), folder)
    contract = make_contract(folder)
    (folder / CONTRACT).write_text(contract.model_dump_json())
    tokenizer = publish(store, "tokenizer", "demo-tokenizer", folder, {}, "run-tokenizer")
    text = Text.load(tokenizer.path)

    folder = _new(root, "corpus")
    splits = {split: _write_split(folder, split, texts, text) for split, texts in _SPLITS.items()}
    index = CorpusIndex(
        dtype="uint16",
        vocab_size=text.vocab_size,
        end_of_text_id=0,
        contract=contract.hash,
        block_bytes=BLOCK_BYTES,
        splits=splits,
    )
    (folder / INDEX).write_text(index.model_dump_json())
    corpus = publish(store, "corpus", "demo-corpus", folder, {"tokenizer": tokenizer}, "run-corpus")

    folder = _new(root, "data")
    (folder / "heldout.jsonl").write_text("".join(p.model_dump_json() + "\n" for p in PAIRS))
    data = publish(store, "dataset", "demo-instructions", folder, {})

    size = ModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=64)
    model = build_model(size, vocab_size=text.vocab_size, eos_token_id=0, seed=1)
    pretrained = publish(
        store, "model", "demo-pretrain", _model_folder(root, "pretrained", model, tokenizer), {"corpus": corpus}
    )
    _learn(model, text)
    made_from = {"model": pretrained, "data": data}
    finetuned = publish(store, "model", "demo-finetune", _model_folder(root, "finetuned", model, tokenizer), made_from)
    models = {"models.pretrained": pretrained, "models.finetuned": finetuned}
    return World(store, {**models, "corpus": corpus, "data": data})


def _write_split(folder: Path, split: str, texts: list[str], text: Text) -> SplitRecord:
    documents = [np.array([*text.encode(t), 0], dtype=np.uint16) for t in texts]
    columns = [
        pa.array([f"{n}.py" for n in range(len(texts))]),
        pa.array([len(t) for t in texts], pa.uint64()),
        pa.array([blake3.blake3(t.encode()).hexdigest() for t in texts]),
        token_column(documents, "uint16"),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=document_schema("uint16"))
    return write_split(folder, split, [batch], shard_tokens=10_000)


def _new(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    return folder


def _model_folder(root: Path, name: str, model, tokenizer: Artifact) -> Path:
    folder = _new(root, name)
    for record in tokenizer.manifest.files:
        shutil.copyfile(tokenizer.path / record.path, folder / record.path)
    save_model(model, folder, eos_token_ids=[0, 4], pad_token_id=0)
    return folder


def _learn(model, text: Text) -> None:
    """Learns the answers by heart."""
    rows = [
        [*text.render_chat([{"role": "user", "content": p.prompt}]), *text.encode(p.completion), 4] for p in PAIRS[:4]
    ]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def read_answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@contextmanager
def endpoint(name: str, answer: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Iterator[str]:
    """A server on loopback that has one model; `answer` gives status and body for what is posted, `later`
    with the word when to come back. `URL#name`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.say(200, json.dumps({"data": [{"id": name, "object": "model"}]}).encode())

        def do_POST(self) -> None:
            self.say(*answer(json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def say(self, status: int, content: bytes) -> None:
            self.send_response(status)
            if content == b"later":
                self.send_header("retry-after", "1")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1#{name}"
    finally:
        server.shutdown()
        server.server_close()
