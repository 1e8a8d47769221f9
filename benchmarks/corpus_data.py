"""JSONL made from real text: novels by chapter and Python's standard library by file, about 92 MB of it.

Texts are NFC with plain line ends and without control characters or mojibake (nine of them hold some), so that cleaning
leaves them alone and every tool has to come to the same tokens.
"""

from __future__ import annotations

import gzip
import json
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from pipelines.corpus.clean import repair_mojibake

FILES = 8
_TEI = "{http://www.tei-c.org/ns/1.0}"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


def make_jsonl(data: Path, folder: Path, limit_bytes: int) -> int:
    """Writes up to `limit_bytes` of text to `FILES` files below `folder`, unless that was done; returns their bytes."""
    done = folder / "whole"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        size = 0
        files = [(folder / f"part-{i:02}.jsonl").open("w", encoding="utf-8") for i in range(FILES)]
        for number, (name, text) in enumerate(_documents(data)):
            if size >= limit_bytes:
                break
            size += len(text.encode())
            files[number % FILES].write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
        for file in files:
            file.close()
        done.touch()
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def enlarge(source: Path, folder: Path, size_bytes: int) -> int:
    """Writes copies of the JSONL in `source` to `folder` until they make `size_bytes`; returns their bytes.

    In every copy other words bear a number, so that no document comes twice.
    """
    folder.mkdir(parents=True)
    files = [(folder / f"part-{i:02}.jsonl").open("w", encoding="utf-8") for i in range(FILES)]
    size = copy = number = 0
    while size < size_bytes:
        for path in sorted(source.glob("*.jsonl")):
            for line in path.open(encoding="utf-8"):
                record = json.loads(line)
                words = record["text"].split(" ")
                changed = slice(copy % min(20, len(words)), None, 20)
                words[changed] = [f"{word}{copy}" for word in words[changed]]
                again = {"id": f"{copy}/{record['id']}", "text": " ".join(words)}
                written = json.dumps(again, ensure_ascii=False) + "\n"
                files[number % FILES].write(written)
                number += 1
                size += len(written.encode())
                if size >= size_bytes:
                    break
            if size >= size_bytes:
                break
        copy += 1
    for file in files:
        file.close()
    return size


def _documents(data: Path) -> Iterator[tuple[str, str]]:
    """Novels and modules in turn, so that a part of them is mixed as the whole is."""
    sources = [_chapters(data / "eltec-eng"), _modules()]
    while sources:
        for source in list(sources):
            try:
                name, text = next(source)
            except StopIteration:
                sources.remove(source)
                continue
            text = repair_mojibake(text.replace("\r\n", "\n"))
            text = _CONTROLS.sub("", unicodedata.normalize("NFC", text)).strip()
            if text:
                yield name, text


def _chapters(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.xml.gz")):
        root = ElementTree.fromstring(gzip.decompress(path.read_bytes()))
        for number, chapter in enumerate(root.iter(f"{_TEI}div")):
            paragraphs = [" ".join("".join(p.itertext()).split()) for p in chapter.iterfind(f"{_TEI}p")]
            if paragraphs:
                yield f"{path.name.split('.')[0]}/{number}", "\n\n".join(paragraphs)


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith("site-packages/"):
            try:
                yield name, path.read_bytes().decode()
            except UnicodeDecodeError:  # the library's tests hold a few files in other encodings
                continue
