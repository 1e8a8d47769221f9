"""Datasets by their hub names, from a hub that speaks the real one's protocol on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem

from configs.errors import DataError
from configs.schema.corpus import SourceConfig
from configs.schema.tasks import Task
from pipelines.corpus.documents import read_documents
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.sources import list_source
from pipelines.evaluation.items import load_items
from tests.pipelines.corpus.source_files import jsonl, parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/reviews"
FILES = {
    "README.md": b"# Reviews\n",
    "data/train.jsonl": jsonl(["a fine film", "a dull film"]),
    "data/test.parquet": parquet(["one to be asked about"]),
}


class Hub(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks about one dataset."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Facts of the dataset, a listing of a folder, or a file."""
        path = unquote(urlsplit(self.path).path)
        tree, files = f"/api/datasets/{NAME}/tree/", f"/datasets/{NAME}/resolve/"
        if path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/main"):
            self._json({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif path.startswith(tree):
            self._json(_tree(path.removeprefix(tree).partition("/")[2], deep="recursive=true" in self.path.lower()))
        elif path.startswith(files):
            self._file(path.removeprefix(files).partition("/")[2])
        else:
            self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        """Facts of some paths."""
        length = int(self.headers["Content-Length"])
        asked = self.rfile.read(length).decode()
        paths = json.loads(asked)["paths"] if asked.startswith("{") else [p.split("=", 1)[1] for p in asked.split("&")]
        self._json([entry for path in map(unquote, paths) for entry in _entries() if entry["path"] == path])

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _file(self, name: str) -> None:
        content = FILES[name]
        start, end = 0, len(content) - 1
        if wanted := self.headers.get("Range"):
            low, high = wanted.removeprefix("bytes=").split("-")
            start, end = int(low), min(int(high), end) if high else end
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(content[start : end + 1], 206 if wanted else 200, headers)

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entries() -> list[dict[str, Any]]:
    folders = {str(parent) for name in FILES for parent in Path(name).parents} - {"."}
    listed = [{"type": "directory", "path": name, "oid": _oid(name.encode()), "size": 0} for name in sorted(folders)]
    files = [{"type": "file", "path": n, "oid": _oid(c), "size": len(c)} for n, c in FILES.items()]
    return [*listed, *files]


def _tree(folder: str, *, deep: bool) -> list[dict[str, Any]]:
    below = [entry for entry in _entries() if not folder or entry["path"].startswith(f"{folder}/")]
    return below if deep else [entry for entry in below if "/" not in entry["path"].removeprefix(f"{folder}/")]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    HfFileSystem.clear_instance_cache()
    yield
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_corpus_reads_a_dataset_by_its_hub_name(hub: None) -> None:
    source = SourceConfig(path=f"hf://datasets/{NAME}/data")
    listing = list_source(source)
    assert [file.name for file in listing.files] == ["test.parquet", "train.jsonl"]
    spans = plan_spans(listing, source, 1 << 20)
    found = [d for span in spans for d in read_documents(listing, span, source, Ledger())]
    texts = sorted(text.decode() for documents in found for text in documents.texts)
    assert texts == ["a dull film", "a fine film", "one to be asked about"]


def test_a_task_asks_about_items_of_a_hub_dataset(hub: None) -> None:
    data = {"format": "parquet", "evaluation": f"hf://datasets/{NAME}/data/test.parquet", "get": NAME}
    task = Task(description="Say.", kind="generation", data=data, answer="{text}", metrics=("exact_match",))
    assert [item.prompt for item in load_items(task)] == ["one to be asked about"]


def test_a_dataset_that_the_hub_has_not_is_a_clear_error(hub: None) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_source(SourceConfig(path="hf://datasets/owner/nothing"))
