"""Sources in object stores: servers on loopback (moto for S3, an emulator of Google's), read through `pyarrow.fs`."""

import gzip
import json
import logging
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import document_batch, write_corpus
from pyarrow import fs

from actors.store.artifacts import Artifact
from configs.errors import DataError, StorageError
from configs.schema.corpus import CorpusConfig, SourceConfig, SplitConfig
from pipelines.corpus.account import Account
from pipelines.corpus.documents import read_documents
from pipelines.corpus.known_hashes import kept_in
from pipelines.corpus.ledger import Ledger
from pipelines.corpus.loader import Loader
from pipelines.corpus.pieces import plan_spans
from pipelines.corpus.shard_cache import ShardCache
from pipelines.corpus.sources import Listing, check_unchanged, list_source
from pipelines.stage import StageContext
from pipelines.stages.corpus import CorpusStage

moto_server = pytest.importorskip("moto.server", reason="the S3 server of the tests is not installed")


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield patch


class Server:
    """A server with one bucket."""

    def __init__(self) -> None:
        self._server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.address = f"{host}:{port}"
        self._files, _ = fs.FileSystem.from_uri(self.uri("bucket", "&allow_bucket_creation=true"))
        self._files.create_dir("bucket")

    def uri(self, path: str, more: str = "") -> str:
        return f"s3://{path}?endpoint_override={self.address}&scheme=http&region=us-east-1{more}"

    def put(self, path: str, content: bytes) -> None:
        with self._files.open_output_stream(f"bucket/{path}", compression=None) as sink:
            sink.write(content)

    def delete(self, path: str) -> None:
        self._files.delete_file(f"bucket/{path}")

    def allow_requests(self, count: int) -> None:
        """Requests from now on that need no valid credentials."""
        address, plain = f"http://{self.address}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, str(count).encode(), plain)).close()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def server(environment: pytest.MonkeyPatch) -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


TEXTS = [f"document number {n}, ä 日本語" for n in range(60)]


def _parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def data() -> dict[str, bytes]:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    return {
        "a.jsonl": lines, "sub/b.jsonl.gz": gzip.compress(lines), "sub/c.parquet": _parquet(TEXTS), "d.txt": b"text d",
    }  # fmt: skip


@pytest.fixture(scope="module")
def stored(server: Server, data: dict[str, bytes]) -> str:
    """Address of the data in the store."""
    for name, content in data.items():
        server.put(f"data/{name}", content)
    return server.uri("bucket/data")


@pytest.fixture
def local(data: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in data.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "local"


def _read(config: SourceConfig, span_bytes: int = 500) -> tuple[Listing, list[tuple[str, bytes]], Ledger]:
    listing, ledger = list_source(config), Ledger()
    found = [
        pair
        for span in plan_spans(listing, config, span_bytes)
        for documents in read_documents(listing, span, config, ledger)
        for pair in zip(documents.names, documents.texts, strict=True)
    ]
    return listing, found, ledger


def test_a_source_in_the_store_is_the_source_on_the_disk(stored: str, local: Path) -> None:
    there, here = _read(SourceConfig(path=stored)), _read(SourceConfig(path=str(local)))
    assert there[0].digest == here[0].digest
    assert there[1:] == here[1:]
    assert len(there[1]) == 3 * len(TEXTS) + 1


def test_a_glob_and_patterns_choose_objects(server: Server, stored: str) -> None:
    def names(path: str, **patterns: Any) -> list[str]:
        return [f.name for f in list_source(SourceConfig(path=server.uri(path), **patterns)).files]

    assert names("bucket/data/*.jsonl*") == ["a.jsonl", "sub/b.jsonl.gz"]
    assert names("bucket/data/sub/*") == ["b.jsonl.gz", "c.parquet"]
    assert names("bucket/data", exclude=("sub/*",)) == ["a.jsonl", "d.txt"]
    assert names("bucket/data/d.txt") == ["d.txt"]


def test_an_object_is_read_again_only_if_its_tag_changed(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("x.txt", "y.txt"):
        server.put(f"tags/{name}", b"text of " + name.encode())
    source = SourceConfig(path=server.uri("bucket/tags"))

    def list_and_count() -> tuple[str, list[str]]:
        """Digest, and the objects that were fetched."""
        caplog.clear()
        with caplog.at_level(logging.INFO, "werkzeug"), kept_in(tmp_path / "hashes"):
            digest = list_source(source).digest
        requests = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        return digest, [name for name in ("x.txt", "y.txt") if any(f"GET /bucket/tags/{name} " in r for r in requests)]

    first, fetched = list_and_count()
    assert fetched == ["x.txt", "y.txt"]
    assert list_and_count() == (first, [])
    server.put("tags/y.txt", b"TEXT of y.txt")
    second, fetched = list_and_count()
    assert second != first
    assert fetched == ["y.txt"]


def test_an_object_that_vanishes_or_changes_while_a_stage_reads_is_an_error(server: Server) -> None:
    for name in ("stays.txt", "goes.txt"):
        server.put(f"moving/{name}", b"content")
    source = SourceConfig(path=server.uri("bucket/moving"))
    listing = list_source(source)
    check_unchanged(listing, source)
    server.delete("moving/goes.txt")
    spans = plan_spans(listing, source, 1 << 20)
    with pytest.raises(DataError, match=r"goes\.txt changed while"):
        list(read_documents(listing, spans[0], source, Ledger()))
    server.put("moving/goes.txt", b"CONTENT")
    with pytest.raises(DataError, match=r"goes\.txt changed while"):
        list(read_documents(listing, spans[0], source, Ledger()))
    with pytest.raises(DataError, match="changed while"):
        check_unchanged(listing, source)


@pytest.mark.parametrize("path", ["bucket/nothing-here", "no-such-bucket", "bucket/data/*.nothing"])
def test_a_path_that_is_not_there_is_an_error_that_names_it(server: Server, stored: str, path: str) -> None:
    with pytest.raises(DataError, match="source") as raised:
        list_source(SourceConfig(path=server.uri(path)))
    assert path.split("/*")[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_credentials_are_one_clear_line(server: Server, stored: str) -> None:
    server.allow_requests(0)
    try:
        for path in ("bucket/data", "bucket/data/d.txt"):
            with pytest.raises(StorageError, match="check the address and the credentials") as raised:
                list_source(SourceConfig(path=server.uri(path)))
            assert "\n" not in str(raised.value)
    finally:
        server.allow_requests(1 << 40)


def test_objects_that_may_be_listed_but_not_read_fail_the_stage_with_the_stores_answer(
    server: Server, stored: str
) -> None:
    source = SourceConfig(path=server.uri("bucket/data"), include=("*.txt",))
    server.allow_requests(3)  # to find the object; those that open it are refused
    try:
        listing = list_source(source)
    finally:
        server.allow_requests(1 << 40)
    assert [r.reason for r in listing.unreadable] == ["AWS Error ACCESS_DENIED"]
    account = Account()
    account.reject(listing.unreadable)
    with pytest.raises(DataError, match=r"d\.txt at byte 0: AWS Error ACCESS_DENIED"):
        account.check(1, source)


def test_a_secret_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(DataError, match=r"AWS_ACCESS_KEY_ID") as raised:
        list_source(SourceConfig(path="s3://AKIAKEY:topsecret@bucket/data"))
    assert "topsecret" not in str(raised.value)


def test_a_source_in_googles_store_is_the_source_on_the_disk(local: Path, data: dict[str, bytes]) -> None:
    pytest.importorskip("gcp_storage_emulator", reason="Google's store has no emulator here")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"
    options = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"]
    emulator = subprocess.Popen([sys.executable, "-c", program, *options], stderr=subprocess.DEVNULL)
    address = f"scheme=http&endpoint_override=127.0.0.1%3A{port}&retry_limit_seconds=20"
    try:
        files, _ = fs.FileSystem.from_uri(f"gs://anonymous@bucket?{address}")
        for name, content in data.items():
            with files.open_output_stream(f"bucket/data/{name}", compression=None) as sink:
                sink.write(content)
        there = _read(SourceConfig(path=f"gs://anonymous@bucket/data?{address}"))
    finally:
        emulator.kill()
        emulator.wait()
    here = _read(SourceConfig(path=str(local)))
    assert there[0].digest == here[0].digest
    assert there[1:] == here[1:]
    assert len(there[1]) == 3 * len(TEXTS) + 1


@pytest.mark.slow  # the client tries for six seconds
def test_a_store_that_goes_away_is_no_broken_file(environment: pytest.MonkeyPatch, data: dict[str, bytes]) -> None:
    server = Server()
    server.put("data/a.jsonl", data["a.jsonl"])
    source = SourceConfig(path=server.uri("bucket/data"))
    listing = list_source(source)
    server.stop()
    ledger = Ledger()
    (span,) = plan_spans(listing, source, 1 << 20)
    with pytest.raises(StorageError, match=r"did not answer while a\.jsonl was read"):
        list(read_documents(listing, span, source, ledger))
    assert ledger.rejected == []


@pytest.mark.ray
def test_a_corpus_from_the_store_is_the_corpus_from_the_disk(
    stored: str, local: Path, ray_cluster: None, tokenizer: Artifact, make_context: Callable[[str], StageContext]
) -> None:
    made = []
    for name, path in (("there", stored), ("here", str(local))):
        config = CorpusConfig(
            tokenizer="tokenizer", source=SourceConfig(path=path), split=SplitConfig(validation_fraction=0.3),
            span_bytes=4096,
        )  # fmt: skip
        context = make_context(name)
        CorpusStage().run(config, {"tokenizer": tokenizer}, context)
        made.append({p.relative_to(context.out): p.read_bytes() for p in context.out.rglob("*") if p.is_file()})
    assert made[0] == made[1]


def test_shards_in_the_store_are_read_through_a_bounded_cache(server: Server, tmp_path: Path) -> None:
    documents = list(np.arange(10_000, dtype=np.uint16).reshape(10, 1000))
    here = write_corpus(tmp_path / "here", {"train": document_batch(documents)}, shard_tokens=1000)
    files = [path for path in here.rglob("*") if path.is_file()]
    for path in files:
        server.put(f"corpus/{path.relative_to(here).as_posix()}", path.read_bytes())
    bound = 3 * max(path.stat().st_size for path in files)
    cache = ShardCache.open(server.uri("bucket/corpus"), tmp_path / "cache", bound)
    there, local = (Loader.open(c, split="train", row_tokens=64, batch_rows=4, seed=3) for c in (cache, here))
    for step in range(20):
        assert np.array_equal(there.batch(step), local.batch(step))
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= bound
