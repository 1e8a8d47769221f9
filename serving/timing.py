"""Where the time of a request goes, in phases that follow each other and add up to the whole of it.

| phase | from | to |
|---|---|---|
| `proxy` | HAProxy has the headers | the ingress has them |
| `ingress` | | the body is read and checked, the call is handed on |
| `route` | | a replica has the call, and what it gave out first is back: waiting for a replica to start is in it |
| `queue`, `prefill`, `decode` | | the replica's own (`Spent`) |
| `flush` | | what is left: later pieces on their way to the client, at the speed at which it takes them |

No clock of one machine is held against another's but for `proxy`: the replica tells durations, and what they leave of
the ingress's own time is `route` up to the first piece and `flush` after it. Of several answers to a request the one
that the replica had longest counts. If a replica is lost, the time with the next one is added up, and what passed in
between is in `flush`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from serving.calls import Spent

if TYPE_CHECKING:
    from actors.engine.encodings import EncodeEvent
    from actors.engine.request import TokenEvent

_STAMP = re.compile(r"t=([0-9]{16})")
"""`X-Request-Start` as our HAProxy sets it, in microseconds since the epoch."""


class Lap:
    """Divides the time that a replica has with one answer. Made when its call arrives."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._first = True

    def next(self, event: TokenEvent | EncodeEvent) -> Spent:
        """The time since the event before, or since the call arrived."""
        now, last = time.monotonic(), self._last
        self._last = now
        if not self._first:
            return Spent(decode=now - last)
        self._first = False
        began = now if event.began is None else event.began
        return Spent(queue=began - last, prefill=now - began)


class Waterfall:
    """The phases of one request, as the ingress sees them.

    Args of the constructor:
        began: when the ingress had the request, seconds of `time.perf_counter`.
        proxy_seconds: that the request had been in the proxy before; None if nothing tells.
    """

    def __init__(self, began: float, proxy_seconds: float | None) -> None:
        self._began = began
        self._proxy = proxy_seconds
        self._called = time.perf_counter()
        self._spent: dict[int, Spent] = {}
        self._route: float | None = None

    def note(self, spent: Iterable[tuple[int, Spent]]) -> None:
        """Takes down what a replica says now, by the index of the answer."""
        for index, more in spent:
            self._spent[index] = self._spent.get(index, Spent()) + more
        if self._route is None:
            self._route = max(0.0, time.perf_counter() - self._called - self._longest.total)

    @property
    def _longest(self) -> Spent:
        return max(self._spent.values(), key=lambda spent: spent.total, default=Spent())

    @property
    def until_first_token(self) -> dict[str, float]:
        """The phases that are over when the first token is there, in milliseconds."""
        spent = self._longest
        phases = {} if self._proxy is None else {"proxy": self._proxy}
        phases |= {"ingress": self._called - self._began, "route": self._route or 0.0}
        return _milliseconds({**phases, "queue": spent.queue, "prefill": spent.prefill})

    @property
    def whole(self) -> dict[str, float]:
        """All phases up to now, and their `total`, in milliseconds."""
        phases = {**self.until_first_token, "decode": self._longest.decode * 1000}
        total = (time.perf_counter() - self._began + (self._proxy or 0.0)) * 1000
        return {**phases, "flush": max(0.0, total - sum(phases.values())), "total": total}


def proxy_seconds(stamp: str) -> float | None:
    """How long ago the proxy stamped a request; None for what is no stamp of ours. Never below 0: clocks differ."""
    found = _STAMP.fullmatch(stamp)
    return None if found is None else max(0.0, time.time() - int(found[1]) / 1e6)


def server_timing(milliseconds: Mapping[str, float]) -> str:
    """The value of the header `Server-Timing` (W3C)."""
    return ", ".join(f"{name};dur={value:.3f}" for name, value in milliseconds.items())


def _milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: value * 1000 for name, value in seconds.items()}
