"""Which examples stand in a prompt, and how many of them fit.

Guarantees: nothing that is scored is ever shown, by content and not by id; the choice depends on the seed, the pool
and the item alone, so that it is the same in every order and process; of k and k + 1 examples drawn once, all k are
among the k + 1; the item and the room for its answer are never cut, examples are left out whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import bm25s
import numpy as np
import numpy.typing as npt

from actors.text import Text
from configs.errors import ConfigError, DataError, RequestError
from configs.prompts import Example, render_completion, render_messages
from configs.schema.prompting import ExampleSelection, PromptTemplate
from pipelines.evaluation.items import Item, content_key

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Vectors of length 1 [text, dimension] of some texts."""
Rank = Callable[[str], npt.NDArray[np.floating]]
"""How near each example of the pool is to a text; more is nearer."""


@dataclass(frozen=True)
class Pool:
    """What examples are chosen from."""

    items: tuple[Item, ...]
    left_out: int
    """Records of the training split that are scored, or come again."""

    @classmethod
    def of(cls, train: Sequence[Item], scored: Sequence[Item]) -> Pool:
        """The training items without those whose content is scored, whatever its case, width and spaces.

        Raises `DataError` if none is left.
        """
        seen = {content_key(item) for item in scored}
        kept = []
        for item in train:
            key = content_key(item)
            if key not in seen:
                seen.add(key)
                kept.append(item)
        if not kept:
            raise DataError(
                "there is no example that is not scored itself", received=f"{len(train)} training records",
                allowed="records apart from data.evaluation", next_step="give the task another data.train",
            )  # fmt: skip
        return cls(tuple(kept), len(train) - len(kept))


class Chooser:
    """Chooses examples for one item after the other.

    Args:
        selection: how.
        pool: what from.
        embed: an encoder, for strategy `embedding`.

    Raises `ConfigError` if the strategy asks for what is not there.
    """

    def __init__(self, selection: ExampleSelection, pool: Pool, embed: Embed | None = None) -> None:
        self._selection = selection
        self._pool = pool
        self._rank: Rank | None = None
        match selection.strategy:
            case "fixed":
                self._drawn = list(pool.items)
            case "random":
                self._drawn = self._shuffled(pool.items)
            case "balanced":
                self._drawn = self._balanced()
            case "bm25":
                self._rank = _bm25(pool)
            case "embedding":
                if embed is None:
                    raise ConfigError("examples.strategy embedding needs an encoder", allowed="examples.encoder")
                self._rank = _cosine(pool, embed)

    def choose(self, item: Item, count: int) -> tuple[Example, ...]:
        """`count` examples in the order they are shown; fewer if the pool has no more."""
        if self._rank is None:
            chosen = self._drawn[:count]
        else:
            # The nearest stands last, beside the item; of equals the earlier one in the pool is nearer.
            order = np.argsort(-self._rank(item.prompt), kind="stable")[:count]
            chosen = [self._pool.items[index] for index in order[::-1].tolist()]
        return tuple(Example(one.id, one.fields, one.answer) for one in chosen)

    def _balanced(self) -> list[Item]:
        """Rounds of one item of each class, each round in an order of its own."""
        classes: dict[str, list[Item]] = {}
        for item in self._shuffled(self._pool.items):
            classes.setdefault(item.answer, []).append(item)
        if not all(item.choices for item in self._pool.items):
            raise ConfigError(
                "examples.strategy balanced needs classes, and the task has none", allowed="fixed, random or bm25"
            )
        rounds = zip_longest(*(classes[name] for name in sorted(classes)))
        return list(chain.from_iterable(self._shuffled([item for item in one if item is not None]) for one in rounds))

    def _shuffled(self, items: Sequence[Item]) -> list[Item]:
        return sorted(items, key=lambda item: hashlib.sha256(f"{self._selection.seed} {item.id}".encode()).digest())


class TooLongError(RequestError):
    """An item and the room for its answer are longer than the window."""


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that leaves room for its answer."""

    token_ids: tuple[int, ...]
    examples: tuple[Example, ...]
    """Those that fit, in the order they are shown."""
    asked: int
    """How many there were to show."""


def fit_prompt(
    text: Text,
    template: PromptTemplate,
    item: Item,
    examples: Sequence[Example],
    *,
    chat: bool,
    room: int,
) -> FittedPrompt:
    """A prompt of at most `room` tokens; the first examples, which stand farthest from the item, go first.

    Raises:
        TooLongError: the item does not fit without any example.
        DataError: a record lacks a field of the template.
    """
    for left_out in range(len(examples) + 1):
        shown = examples[left_out:]
        if chat:
            ids = text.render_chat(render_messages(template, item.fields, shown))
        else:
            ids = text.encode(render_completion(template, item.fields, shown))
        if len(ids) <= room:
            return FittedPrompt(tuple(ids), tuple(shown), len(examples))
    raise TooLongError(
        f"item {item.id} and its answer do not fit the model's window without any example", param="prompt",
        received=f"{len(ids)} tokens", allowed=f"at most {room}, with the answer's room left",
        next_step="lower answering.max_new_tokens of the task, or take a model with a longer window",
    )  # fmt: skip


def _bm25(pool: Pool) -> Rank:
    """BM25 over lower-case words (Robertson and Zaragoza, 2009; `bm25s`)."""
    index = bm25s.BM25()
    index.index([_words(item.prompt) for item in pool.items], show_progress=False)

    # A text without words is like the empty word, which the index knows and no example has.
    return lambda text: index.get_scores(_words(text) or [""])


def _words(text: str) -> list[str]:
    found: list[str] = bm25s.tokenize([text], stopwords=None, return_ids=False, show_progress=False)[0]
    return found


def _cosine(pool: Pool, embed: Embed) -> Rank:
    vectors = embed([item.prompt for item in pool.items])
    return lambda text: vectors @ embed([text])[0]
