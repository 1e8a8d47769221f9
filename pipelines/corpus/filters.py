"""Quality filters with published definitions. Each says by what rule it drops a document.

Gopher: Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher" (2021), A1.1.
C4: Raffel et al., "Exploring the Limits of Transfer Learning" (2020), 2.2, without its list of bad words.
FineWeb: Penedo et al., "The FineWeb Datasets" (2024), 3.6.

What the papers leave open is settled as follows: words are runs without white space, lengths are in characters, shares
of characters leave white space out, and of equal lines or n-grams the first occurrence is no repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow.compute as pc

from configs.schema.corpus import FiltersConfig
from pipelines.corpus.columns import Flags, Ints, Runs, share, split, to_array

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_POLICIES = r"(?i)terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|javascript"
_LINE_END = r"[.!?\"')\x{3002}\x{ff01}\x{ff1f}\x{201d}\x{2019}]\s*$"
_CITATION = r"\[\d*\]|\[edit\]|\[citation needed\]"
_BATCH_BYTES = 1 << 20


class Texts:
    """A batch of documents, cut up once for all rules."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.array = to_array(texts)
        self.words = split(self.array, None)
        self.lines = split(self.array, "\n")


Failures = list[tuple[str, Flags]]
"""Reasons, and the documents each holds for."""


def gopher_quality(texts: Texts) -> Failures:
    """Number and length of words, symbols, bullets, ellipses, words without letters, stop words."""
    words, lines = texts.words, texts.lines
    count = words.counts
    mean = share(words.sums(words.chars), count)
    hashes = pc.count_substring(texts.array, "#").to_numpy()
    ellipses = pc.count_substring_regex(texts.array, r"\.\.\.|…").to_numpy()
    bullets = lines.spread(pc.match_substring_regex(lines.distinct, r"^\s*[•‣▪●◦*\-]"))
    trailing = lines.spread(pc.match_substring_regex(lines.distinct, r"(?:\.\.\.|…)\s*$"))
    letters = words.spread(pc.match_substring_regex(words.distinct, r"\pL"))
    return [
        ("gopher_few_words", count < 50),
        ("gopher_many_words", count > 100_000),
        ("gopher_word_length", (mean < 3) | (mean > 10)),
        ("gopher_hashes", share(hashes, count) > 0.1),
        ("gopher_ellipses", share(ellipses, count) > 0.1),
        ("gopher_bullet_lines", share(lines.sums(bullets), lines.counts) > 0.9),
        ("gopher_ellipsis_lines", share(lines.sums(trailing), lines.counts) > 0.3),
        ("gopher_letterless_words", share(words.sums(letters), count) < 0.8),
        ("gopher_stop_words", _distinct_stop_words(words) < 2),
    ]


def _distinct_stop_words(words: Runs) -> Ints:
    plain = pc.utf8_lower(pc.utf8_trim(words.distinct, ".,;:!?\"'()[]\u201c\u201d\u2018\u2019"))
    present = np.zeros((len(words.counts), len(STOP_WORDS)), dtype=bool)
    for column, word in enumerate(STOP_WORDS):
        present[words.documents[words.spread(pc.equal(plain, word))], column] = True
    result: Ints = present.sum(axis=1)
    return result


def gopher_repetition(texts: Texts) -> Failures:
    """Repeated lines, paragraphs and n-grams."""
    failures: Failures = []
    for name, runs in (("line", texts.lines), ("paragraph", split(texts.array, "\n\n"))):
        again = runs.repeated()
        failures.append((f"gopher_repeated_{name}s", share(runs.sums(again), runs.counts) > 0.3))
        chars = share(runs.sums(again * runs.chars), runs.sums(runs.chars))
        failures.append((f"gopher_repeated_{name}_characters", chars > 0.2))
    words = texts.words
    total = words.sums(words.chars)
    for n, (repeats, top) in enumerate(_ngrams(words, max(_REPEATED_NGRAMS)), 2):
        if n in _TOP_NGRAMS:
            failures.append((f"gopher_top_{n}gram", share(top, total) > _TOP_NGRAMS[n]))
        else:
            covered = words.sums(_cover(repeats, n) * words.chars)
            failures.append((f"gopher_repeated_{n}grams", share(covered, total) > _REPEATED_NGRAMS[n]))
    return failures


def _ngrams(words: Runs, longest: int) -> list[tuple[Flags, Ints]]:
    """For n from 2: where an n-gram begins that its document had before, and by document the characters of the most
    frequent repeated one, all occurrences together.

    An n-gram that is repeated begins with an (n-1)-gram that is, so each n looks at what the last one left.
    """
    count, documents = len(words.ids), words.documents
    before = np.concatenate([[0], np.cumsum(words.chars)])
    keys = _scramble(words.ids.astype(np.uint64) + (documents.astype(np.uint64) << np.uint64(40)))
    word_keys = keys.copy()
    alive = np.arange(count)
    found = []
    for n in range(2, longest + 1):
        alive = alive[alive + n <= count]
        alive = alive[documents[alive] == documents[alive + n - 1]]
        keys[alive] = _scramble(keys[alive] * np.uint64(3) + word_keys[alive + n - 1])
        _, first, groups, sizes = np.unique(keys[alive], return_index=True, return_inverse=True, return_counts=True)
        shared = sizes > 1
        again = np.zeros(count, dtype=bool)
        again[alive] = shared[groups]
        again[alive[first]] = False
        begins = alive[first[shared]]
        found.append((again, _most_frequent(words, begins, sizes[shared], before[begins + n] - before[begins])))
        alive = alive[shared[groups]]
    return found


def _most_frequent(words: Runs, begins: Ints, sizes: Ints, chars: Ints) -> Ints:
    """Of the n-grams that begin at `begins`, by document, the characters of the one that occurs most, times that."""
    result = np.zeros(len(words.counts), dtype=np.int64)
    documents = words.documents[begins]
    order = np.lexsort((chars, sizes, documents))  # the last of a document wins
    result[documents[order]] = (sizes * chars)[order]
    return result


def _scramble(keys: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A 64-bit mix (the finaliser of splitmix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _cover(begins: Flags, n: int) -> Flags:
    """The words that lie in an n-gram that begins at one of `begins`."""
    edges = np.zeros(len(begins) + 1, dtype=np.int64)
    starts = np.flatnonzero(begins)
    np.add.at(edges, starts, 1)
    np.add.at(edges, np.minimum(starts + n, len(begins)), -1)
    return np.cumsum(edges[:-1]) > 0


def fineweb(texts: Texts) -> Failures:
    """Lines without an end, short lines, repeated lines, lists."""
    lines = texts.lines
    ended = lines.spread(pc.match_substring_regex(lines.distinct, _LINE_END))
    short = lines.chars <= 30
    again = share(lines.sums(lines.repeated() * lines.chars), lines.sums(lines.chars))
    feeds = pc.count_substring(texts.array, "\n").to_numpy()
    return [
        ("fineweb_line_ends", share(lines.sums(ended), lines.counts) < 0.12),
        ("fineweb_short_lines", share(lines.sums(short), lines.counts) > 0.67),
        ("fineweb_repeated_lines", again > 0.01),
        ("fineweb_list", feeds > 0.3 * texts.words.counts),
    ]


def c4(texts: Sequence[bytes]) -> tuple[list[bytes], Failures]:
    """Keeps the lines that look like prose; drops pages with code or filler, or of fewer than three sentences."""
    array = pc.replace_substring_regex(to_array(texts), _CITATION, "")
    lines = split(array, "\n")
    plain = pc.utf8_trim_whitespace(lines.values)
    good = pc.match_substring_regex(plain, r"[.!?\"\x{201d}]$")
    good = pc.and_not(good, pc.ends_with(plain, "..."))
    good = pc.and_not(good, pc.match_substring_regex(plain, _POLICIES))
    good = pc.and_(good, pc.greater_equal(pc.count_substring_regex(plain, r"\S+"), 5))
    kept = np.asarray(good, dtype=bool)
    joined: list[bytes] = []
    encoded = plain.cast("large_binary").to_pylist()
    for begin, end in zip(lines.offsets[:-1], lines.offsets[1:], strict=True):
        joined.append(b"\n".join(encoded[n] for n in range(begin, end) if kept[n]))
    after = to_array(joined)
    sentences = pc.count_substring_regex(after, r"[.!?][\"')\x{201d}\x{2019}]*(?:\s|$)").to_numpy()
    return joined, [
        ("c4_lorem_ipsum", np.asarray(pc.match_substring(array, "lorem ipsum", ignore_case=True), dtype=bool)),
        ("c4_curly_bracket", np.asarray(pc.match_substring(array, "{"), dtype=bool)),
        ("c4_few_sentences", sentences < 3),
    ]


_RULES: dict[str, Callable[[Texts], Failures]] = {
    "gopher_quality": gopher_quality,
    "gopher_repetition": gopher_repetition,
    "fineweb": fineweb,
}


class Filters:
    """Applies the rules of a config, in its order; the first that a document breaks is why it is dropped."""

    def __init__(self, config: FiltersConfig) -> None:
        self._rules = config.rules
        self._min_bytes = config.min_bytes

    def apply(self, texts: Sequence[bytes]) -> list[tuple[bytes, str | None]]:
        """Each text (UTF-8) as it is after the filters, and why it is dropped; None for those that are kept."""
        if not self._rules:
            return [(text, self._short(text)) for text in texts]
        result: list[tuple[bytes, str | None]] = []
        pending: list[bytes] = []
        size = 0
        for text in texts:
            pending.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                result.extend(self._judge(pending))
                pending, size = [], 0
        return [*result, *self._judge(pending)] if pending else result

    def _short(self, text: bytes) -> str | None:
        return "too_short" if len(text) < self._min_bytes else None

    def _judge(self, texts: list[bytes]) -> list[tuple[bytes, str | None]]:
        reasons = [self._short(text) for text in texts]
        for rule in self._rules:
            if rule == "c4":
                after, failures = c4(texts)
                texts = [new if reason is None else old for old, new, reason in zip(texts, after, reasons, strict=True)]
            else:
                failures = _RULES[rule](Texts(texts))
            for reason, holds in failures:
                for row in np.flatnonzero(holds):
                    reasons[row] = reasons[row] or reason
        return list(zip(texts, reasons, strict=True))
