"""Structures that a text has to have: JSON schema, regex, grammar, choice.

Guarantees: a text that ends with `stop` has its structure, unless a stop string or stop token of the request's own cut
it; one that ends with `length` is the beginning of such a text. No torch; llguidance is needed from the first structure
on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actors.text import Text
from configs.schema.generation import Structure

if TYPE_CHECKING:
    from actors.engine.grammars import Grammars, Matcher

_KEPT = 64
"""Compiled structures that are kept for the next request with the same one."""


class Structures:
    """Compiles structures for one model; may be shared between threads."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None
        self._compiled: OrderedDict[Structure, Matcher] = OrderedDict()

    def matcher(self, structure: Structure | None) -> Matcher | None:
        """What follows a text through its structure, at the beginning of the text; None if it needs none.

        Raises `RequestError` if the structure is not valid, can never be met, or the tokenizer cannot be held to one.
        """
        if structure is None:
            return None
        with self._lock:
            compiled = self._compiled.get(structure)
            if compiled is None:
                compiled = self._compile(structure)
                self._compiled[structure] = compiled
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(structure)
            return compiled.copy()

    def _compile(self, structure: Structure) -> Matcher:
        if self._grammars is None:
            from actors.engine.grammars import Grammars

            self._grammars = Grammars(self._text)
        return self._grammars.compile(structure)


def masks(matchers: Sequence[Matcher]) -> npt.NDArray[np.int32]:
    """Which tokens may come next in each text, in one pass: bit i % 32 of a row's word i // 32 is token i.

    The texts are of one model; there is at least one.
    """
    return type(matchers[0]).masks(matchers)
