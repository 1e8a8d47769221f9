"""The adapters that a replica holds: loaded and verified when they are first asked for, a bounded number of them.

What makes room is the one that was asked for least recently. A request keeps the adapter that it was begun with, so
that none is taken from under an answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from actors.store.artifacts import ArtifactStore
from configs.errors import CorruptArtifactError
from serving.calls import AdapterSource

if TYPE_CHECKING:
    from actors.engine.adapters import Adapter

logger = logging.getLogger("ray.serve")


class Shelf:
    """Adapters by their sources.

    Args of the constructor:
        load: the engine's: opens the adapter of an artifact's folder under a key.
        most: that are held.
    """

    def __init__(self, load: Callable[[Path, str], Adapter], most: int) -> None:
        self._load = load
        self._most = most
        self._held: OrderedDict[str, asyncio.Task[Adapter]] = OrderedDict()
        """By key; one that is being loaded is there already, so that it is loaded once."""
        self.loads = 0
        """Times one was loaded, or failed to be."""

    async def get(self, source: AdapterSource) -> Adapter:
        """The adapter. Raises what loading raises, and `CorruptArtifactError` if it is not what was published; the next
        request for it tries again.
        """
        task = self._held.get(source.key)
        if task is None:
            self.loads += 1
            task = self._held[source.key] = asyncio.create_task(asyncio.to_thread(self._open, source))
        self._held.move_to_end(source.key)
        try:
            # A client that goes away takes nothing from the others that wait.
            adapter = await asyncio.shield(task)
        except Exception:
            if self._held.get(source.key) is task:
                del self._held[source.key]
            raise
        while len(self._held) > self._most:
            self._held.popitem(last=False)
        return adapter

    @property
    def held(self) -> tuple[str, ...]:
        """Keys of those that are held, the one that makes room first at the front."""
        return tuple(self._held)

    def _open(self, source: AdapterSource) -> Adapter:
        folder = Path(source.folder)
        artifact = ArtifactStore(folder.parent.parent).get(source.ref)
        if artifact.digest != source.digest:
            raise CorruptArtifactError(
                f"{source.ref} is not the adapter that was deployed",
                received=artifact.digest[:16],
                allowed=source.digest[:16],
                next_step="deploy again",
            )
        logger.info("loading the adapter %s", source.ref)
        return self._load(folder, source.key)
