"""What a corpus's report says: figures counted while the shards are written, and a page that shows them.

`report.json` holds the figures; `report.html` shows them with plots and needs nothing from elsewhere: no scripts, no
fonts, no network. Both are functions of the corpus alone; speeds and times are in the stage's summary, not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.ledger import NO_SOURCE, ONE_SOURCE, SourceCounts
from pipelines.corpus.shards import SplitRecord

_BINS = 41
"""Powers of two up to a terabyte."""
_SHOWN = 20
"""Bars of a plot over names."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#1d2733;background:#fff}
h1{font-size:1.6em;margin-bottom:.2em}h2{font-size:1.15em;margin:2em 0 .5em;border-bottom:1px solid #d5dce4}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr+tr td{border-top:1px solid #edf0f3}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f7f9;padding:.6em;margin:.3em 0;font-size:.85em}
.quiet{color:#66717d}svg text{font:12px system-ui,sans-serif;fill:#1d2733}svg rect{fill:#3b6ea8}
""".strip()


class Tally:
    """Counts the documents of shards; what was counted of each shard is merged into one."""

    def __init__(self) -> None:
        self._bytes = np.zeros(_BINS, dtype=np.int64)
        self._tokens = np.zeros(_BINS, dtype=np.int64)
        self._named: dict[str, dict[str, Counter[str]]] = {"source": {}, "label": {}}
        """By column and name, documents, bytes and tokens."""

    def merge(self, other: Tally) -> None:
        """Adds what `other` has counted."""
        self._bytes += other._bytes
        self._tokens += other._tokens
        for column, groups in other._named.items():
            for name, counts in groups.items():
                self._named[column].setdefault(name, Counter()).update(counts)

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts the documents of `batch`."""
        sizes = batch.column("size_bytes").to_numpy()
        lengths = np.diff(batch.column("tokens").offsets.to_numpy())
        self._bytes += _log2_counts(sizes)
        self._tokens += _log2_counts(lengths)
        for column, groups in self._named.items():
            if not batch.num_rows:
                continue
            if column not in batch.schema.names:
                if column == "source":
                    total = groups.setdefault(ONE_SOURCE, Counter())
                    total.update(documents=len(sizes), bytes=int(sizes.sum()), tokens=int(lengths.sum()))
            else:
                names = pc.replace_with_mask(
                    batch.column(column), pc.equal(pc.fill_null(batch.column(column), ""), ""), NO_SOURCE
                )
                table = pa.table({"name": names, "documents": np.ones(len(names), np.int64), "bytes": sizes})
                table = table.append_column("tokens", pa.array(lengths))
                sums = table.group_by("name").aggregate([(key, "sum") for key in ("documents", "bytes", "tokens")])
                for row in sums.to_pylist():
                    total = groups.setdefault(row["name"], Counter())
                    total.update({key: row[f"{key}_sum"] for key in ("documents", "bytes", "tokens")})

    def figures(self, read: Mapping[str, SourceCounts]) -> dict[str, Any]:
        """Histograms of document lengths, [at least, below, documents] a bin; what was `read` of each source and what
        of it is in the shards; counts by label, where the corpus knows labels."""
        sources = {name: {**_read_figures(read[name]), **self._kept("source", name)} for name in sorted(read)}
        labels = {name: self._kept("label", name) for name in sorted(self._named["label"])}
        return {
            "length_bytes": _bins(self._bytes),
            "length_tokens": _bins(self._tokens),
            "by_source": sources,
            **({"by_label": labels} if labels else {}),
        }

    def _kept(self, column: str, name: str) -> dict[str, Any]:
        total = self._named[column].get(name, Counter())
        share = round(total["bytes"] / total["tokens"], 4) if total["tokens"] else 0.0
        return {**{key: total[key] for key in ("documents", "bytes", "tokens")}, "bytes_per_token": share}


def _read_figures(counts: SourceCounts) -> dict[str, Any]:
    return {
        "documents_read": counts.documents_read,
        "read_bytes": counts.read_bytes,
        "empty": counts.empty,
        "drops": dict(sorted(counts.drops.items())),
        "languages": dict(sorted(counts.languages.items())),
    }


def _log2_counts(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    exponents = np.frexp(np.maximum(values, 1).astype(np.float64))[1] - 1
    return np.bincount(np.minimum(exponents, _BINS - 1), minlength=_BINS)


def _bins(counts: npt.NDArray[np.int64]) -> list[list[int]]:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    return [[1 << i, 1 << (i + 1), int(counts[i])] for i in range(int(filled[0]), int(filled[-1]) + 1)]


def split_figures(splits: Mapping[str, SplitRecord]) -> dict[str, Any]:
    """What a report says about each split."""
    return {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "text_bytes": split.text_bytes,
            "bytes_per_token": round(split.text_bytes / split.tokens, 4),
            "shards": len(split.shards),
        }
        for name, split in splits.items()
    }


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are worth a curve over versions of a corpus, for the tracker."""
    found = {f"corpus/{name}": float(report[name]) for name in ("records", "documents", "quarantined", "empty")}
    for split in ("train", "validation"):
        for name in ("documents", "tokens", "text_bytes", "bytes_per_token"):
            found[f"corpus/{split}/{name}"] = float(report[split][name])
    for reason, count in report["drops"].items():
        found[f"corpus/dropped/{reason}"] = float(count)
    if report["duplicates"] is not None:
        found |= {f"corpus/duplicates/{kind}": float(report["duplicates"][kind]) for kind in ("exact", "near", "rate")}
    return found


def render(report: Mapping[str, Any]) -> str:
    """The page for a report."""
    title = f"Corpus of {report['train']['tokens'] + report['validation']['tokens']:,} tokens"
    sections = [
        ("Documents", _flow(report)),
        ("Splits", _splits(report)),
        ("Document length", _lengths(report)),
        ("Dropped, by reason", _most(report["drops"])),
        ("Duplicates", _duplicates(report["duplicates"])),
        ("Evaluation sets", _contamination(report["contamination"])),
        ("Changed by cleaning", _bars(report["changes"])),
        ("By source", _sources(report["by_source"])),
        ("Languages", _languages(report)),
        ("By label", _labels(report.get("by_label"))),
        ("Examples of what was dropped", _examples(report["examples"])),
    ]
    body = "".join(f"<h2>{escape(name)}</h2>\n{content}\n" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="quiet">source {escape(str(report["source_digest"])[:16])}, {report["files"]:,} files</p>\n'
        f"{body}</body></html>\n"
    )


def _flow(report: Mapping[str, Any]) -> str:
    """From records read to documents in the shards."""
    written = sum(report[split]["documents"] for split in ("train", "validation"))
    found = report["duplicates"] or {"exact": 0, "near": 0}
    steps = {
        "records read": report["records"],
        "left by reading": report["records"] - report["quarantined"] - report["empty"],
        "left by filters and gate": report["documents"] + found["exact"] + found["near"],
        "in the shards": written,
    }
    rows = [
        ["read", f"{report['records']:,}", _size(report["read_bytes"])],
        ["quarantined", f"{report['quarantined']:,}", ""],
        ["empty", f"{report['empty']:,}", ""],
        ["dropped", f"{sum(report['drops'].values()):,}", ""],
        ["in the shards", f"{written:,}", _size(sum(report[s]["text_bytes"] for s in ("train", "validation")))],
    ]
    return _bars(steps) + _table(["", "documents", "text"], rows)


def _splits(report: Mapping[str, Any]) -> str:
    rows = []
    for split in ("train", "validation"):
        s = report[split]
        rows.append(
            [split, f"{s['documents']:,}", _size(s["text_bytes"]), f"{s['tokens']:,}", f"{s['bytes_per_token']:.3f}"]
        )
    return _table(["split", "documents", "text", "tokens", "bytes a token"], rows)


def _lengths(report: Mapping[str, Any]) -> str:
    plots = []
    for key, unit in (("length_bytes", "bytes"), ("length_tokens", "tokens")):
        counts = {f"{low:,} to {high - 1:,} {unit}": count for low, high, count in report[key]}
        plots.append(_bars(counts, limit=_BINS))
    return "\n".join(plots)


def _most(counts: Mapping[str, int]) -> str:
    """A plot of the largest counts."""
    return _bars(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def _duplicates(duplicates: Mapping[str, Any] | None) -> str:
    if duplicates is None:
        return '<p class="quiet">not looked for</p>'
    text = (
        f"<p>{duplicates['exact']:,} with the text of an earlier document, {duplicates['near']:,} almost the same; "
        f"{duplicates['rate']:.2%} of all.</p>"
    )
    rows = [[str(c["kept"]), f"{c['documents']:,}"] for c in duplicates["largest"]]
    pairs = [[e["dropped"], f"{'same as' if e['exact'] else 'like'} {e['kept']}"] for e in duplicates["examples"]]
    return (
        text
        + (_table(["largest sets: the document that stays", "documents"], rows) if rows else "")
        + (_table(["the first that were dropped", ""], pairs) if pairs else "")
    )


def _contamination(checked: Mapping[str, Any]) -> str:
    if not checked:
        return '<p class="quiet">none was registered: nothing is known about overlaps</p>'
    rows = [
        [name, f"{s['items']:,}", f"{s['unchecked_items']:,}", str(s["words"]), f"{s['dropped']:,}", f"{s['kept']:,}"]
        for name, s in sorted(checked.items())
    ]
    return _table(["set", "items", "too short to check", "words in a row", "documents dropped", "kept"], rows)


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What went in and what came out of the largest sources, and why the rest did not."""
    largest = sorted(sources.items(), key=lambda item: (-item[1]["read_bytes"], item[0]))[:_SHOWN]
    rows = [
        [name, f"{s['documents_read']:,}", _size(s["read_bytes"]), f"{sum(s['drops'].values()):,}", *_kept_cells(s)]
        for name, s in largest
    ]
    reasons = [
        [f"{name}: {reason}", f"{count:,}"]
        for name, s in largest
        for reason, count in sorted(s["drops"].items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    ]
    heads = ["", "documents read", "text read", "dropped", *_KEPT_HEADS]
    return _table(heads, rows) + (_table(["dropped", "documents"], reasons) if reasons else "")


_KEPT_HEADS = ("in the shards", "text", "tokens", "bytes a token")


def _kept_cells(group: Mapping[str, Any]) -> list[str]:
    rate = f"{group['bytes_per_token']:.3f}"
    return [f"{group['documents']:,}", _size(group["bytes"]), f"{group['tokens']:,}", rate]


def _labels(labels: Mapping[str, Mapping[str, Any]] | None) -> str:
    if not labels:
        return ""
    largest = sorted(labels.items(), key=lambda item: (-item[1]["tokens"], item[0]))[:_SHOWN]
    return _table(["", *_KEPT_HEADS], [[name, *_kept_cells(group)] for name, group in largest])


def _languages(report: Mapping[str, Any]) -> str:
    """Of all sources together, and of each if there are several."""
    if not report["languages"]:
        return '<p class="quiet">not told (source.filters.language)</p>'
    plots = [_most(report["languages"])]
    if len(report["by_source"]) > 1:
        largest = sorted(report["by_source"].items(), key=lambda item: (-item[1]["read_bytes"], item[0]))[:_SHOWN]
        plots += [f"<p><b>{escape(_visible(name))}</b></p>{_most(s['languages'])}" for name, s in largest]
    return "\n".join(plots)


def _examples(examples: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    return "\n".join(
        f"<p><b>{escape(reason)}</b> {escape(example['name'])}</p><pre>{escape(_visible(example['text']))}</pre>"
        for reason, shown in sorted(examples.items())
        for example in shown
    )


def _visible(text: str) -> str:
    """`text` without what HTML does not allow."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is a name, the others are numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = ["", *[' class="n"'] * (len(values) - 1)]
        return "".join(
            f"<{tag}{kind}>{escape(_visible(value))}</{tag}>" for kind, value in zip(kinds, values, strict=True)
        )

    lines = [f"<tr>{cells('th', heads)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _bars(counts: Mapping[str, int], *, limit: int = _SHOWN) -> str:
    """A plot of horizontal bars, in the order given."""
    shown = list(counts.items())[:limit]
    if not shown:
        return ""
    most = max(max(count for _, count in shown), 1)
    parts = []
    for number, (name, count) in enumerate(shown):
        y = 22 * number
        width = 420 * count / most
        label = name if len(name) <= 40 else name[:39] + "…"
        parts.append(
            f'<text x="292" y="{y + 15}" text-anchor="end">{escape(_visible(label))}</text>'
            f'<rect x="300" y="{y + 3}" width="{width:.1f}" height="16"/>'
            f'<text x="{306 + width:.1f}" y="{y + 15}">{count:,}</text>'
        )
    height = 22 * len(shown)
    return f'<svg viewBox="0 0 840 {height}" width="100%" role="img">\n' + "\n".join(parts) + "\n</svg>"
