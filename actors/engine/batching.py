"""Which of the waiting inputs run together: those of like length, so that little of a batch is padding. No torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

_MAX_PADDING = 0.1
"""Share of a batch's tokens that may be padding: what it costs at most, against what larger batches gain."""


class LengthQueue:
    """Waiting inputs by length. The longest-waiting one is in every batch, so that none waits for ever."""

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._waiting: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """Length and number of arrival by key, in order of arrival."""
        self._by_length: list[tuple[int, int, str]] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: str, length: int) -> None:
        """Queues an input of `length` tokens."""
        self._arrivals += 1
        self._waiting[key] = (length, self._arrivals)
        insort(self._by_length, (length, self._arrivals, key))

    def remove(self, key: str) -> None:
        """Forgets an input, if it waits."""
        entry = self._waiting.pop(key, None)
        if entry is not None:
            del self._by_length[bisect_left(self._by_length, (*entry, key))]

    def take(self) -> list[str]:
        """Removes and returns the next batch, shortest first; empty if nothing waits.

        It holds the input that came first and its neighbours in length, nearest first, as long as the longest one's
        length times their number is within `batch_tokens` and at most a tenth of that is padding. One input alone
        may be longer than that.
        """
        if not self._waiting:
            return []
        key, (length, arrival) = next(iter(self._waiting.items()))
        first = bisect_left(self._by_length, (length, arrival, key))
        low, high, tokens = first, first + 1, length
        while True:
            added = self._nearest(low, high, tokens)
            if added is None:
                break
            low, high = min(low, added), max(high, added + 1)
            tokens += self._by_length[added][0]
        batch = [key for _, _, key in self._by_length[low:high]]
        del self._by_length[low:high]
        for key in batch:
            del self._waiting[key]
        return batch

    def _nearest(self, low: int, high: int, tokens: int) -> int | None:
        """The neighbour of entries `low` to `high` that adds the least padding; None if none of them fits."""
        count = high - low + 1
        found: list[tuple[int, int]] = []
        for index in (low - 1, high):
            if 0 <= index < len(self._by_length):
                area = self._by_length[max(high - 1, index)][0] * count
                padding = area - tokens - self._by_length[index][0]
                if area <= self._batch_tokens and padding <= _MAX_PADDING * area:
                    found.append((padding, index))
        return min(found)[1] if found else None
