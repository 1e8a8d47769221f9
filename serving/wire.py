"""A replica's answers on their way to an ingress on the same machine: one message a step for all of them.

Ray Serve carries each call and says how it ends; what comes of it takes a Unix socket beside that, which the ingress
listens on and each replica connects to once. All that a replica has to say in one turn of its event loop goes in a
single write. Through Ray Serve each piece of each answer would be a message of its own: measured on 2 cores with 32
streams of a small model, that took as much of them as the model itself.

The socket lies in a folder that only this user can enter. A replica on another machine does not find it, and its
answers come through Ray Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import secrets
import socket
from collections.abc import AsyncIterable, Iterator, Sequence
from pathlib import Path
from typing import Final, cast

from serving.calls import Piece, Refusal

logger = logging.getLogger("ray.serve")

Batch = Sequence[Piece] | Refusal

_LENGTH_BYTES = 4
_END: Final = object()


class WireLostError(Exception):
    """The replica that an answer came from is no longer connected."""


class Inbox:
    """What comes of one call, in order: from the replica that has it, over the wire or through Ray Serve."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._items: asyncio.Queue[object] = asyncio.Queue()
        self._early: list[tuple[str, Batch]] = []
        """Came before it was known which replica has the call: Ray Serve may have asked another one before."""
        self.sender: str | None = None
        """The replica that has the call, once that has said so."""

    def came(self, sender: str, batch: Batch) -> None:
        """Something came over the wire."""
        if self.sender is None:
            self._early.append((sender, batch))
        elif self.sender == sender:
            self._items.put_nowait(batch)

    def lost(self) -> None:
        """The replica went away."""
        self._items.put_nowait(WireLostError())

    async def fill(self, response: AsyncIterable[Batch | str]) -> None:
        """Takes what comes through Ray Serve, until the call has ended there."""
        try:
            async for item in response:
                if isinstance(item, str):
                    self._accept(item)
                else:
                    self._items.put_nowait(item)
        except asyncio.CancelledError:
            self.lost()
            raise
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            self._items.put_nowait(error)
        else:
            if self.sender is None:
                self._items.put_nowait(_END)

    def _accept(self, sender: str) -> None:
        self.sender = sender
        for other, batch in self._early:
            self.came(other, batch)
        self._early.clear()
        if sender in self._wire.gone:
            self.lost()

    async def next(self) -> Batch | None:
        """What came next; None at the end of what Ray Serve has. Raises what ended the call there."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return None if item is _END else cast(Batch, item)


class Wire:
    """The ingress's end, to be used from one event loop.

    Args of the constructor:
        folder: where the socket is made; only this user can enter it.
    """

    def __init__(self, folder: Path) -> None:
        self.gone: set[str] = set()
        """Replicas that were connected."""
        self._folder = folder
        self._inboxes: dict[str, Inbox] = {}
        self._listening: asyncio.Task[str | None] | None = None
        self._server: asyncio.AbstractServer | None = None

    async def address(self) -> str | None:
        """Where replicas connect to, from the first call on; None if no socket can be made there."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        return await asyncio.shield(self._listening)

    async def _listen(self) -> str | None:
        for old in self._folder.glob("wire-*"):
            _remove_unless_used(old)
        path = str(self._folder / f"wire-{secrets.token_hex(8)}")
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Incoming(self), path)
        except OSError as error:
            logger.warning("answers come through Ray Serve alone: no socket at %s: %s", path, error)
            return None
        return path

    @contextlib.contextmanager
    def inbox(self, call_id: str) -> Iterator[Inbox]:
        """Where the answers to a call come in meanwhile."""
        inbox = self._inboxes[call_id] = Inbox(self)
        try:
            yield inbox
        finally:
            del self._inboxes[call_id]

    def came(self, sender: str, items: Sequence[tuple[str, Batch]]) -> None:
        """A message of a replica: what is new of some calls. What nobody waits for any more is dropped."""
        for call_id, batch in items:
            inbox = self._inboxes.get(call_id)
            if inbox is not None:
                inbox.came(sender, batch)

    def left(self, sender: str) -> None:
        """A replica's connection has ended."""
        self.gone.add(sender)
        for inbox in self._inboxes.values():
            if inbox.sender == sender:
                inbox.lost()


class _Incoming(asyncio.Protocol):
    """A replica's connection, at the ingress. Its first message is the replica's name."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._sender: str | None = None
        self._read = bytearray()

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        start = 0
        while len(read) >= (begin := start + _LENGTH_BYTES):
            end = begin + int.from_bytes(read[start:begin])
            if len(read) < end:
                break
            message = pickle.loads(read[begin:end])  # nobody else can enter the socket's folder
            start = end
            if self._sender is None:
                self._sender = message
            else:
                self._wire.came(self._sender, message)
        del read[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sender is not None:
            self._wire.left(self._sender)


class Sender(asyncio.Protocol):
    """A connection to an ingress, at the replica."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(8)
        self._waiting: list[tuple[str, Batch]] = []
        self._transport: asyncio.WriteTransport | None = None

    @property
    def open(self) -> bool:
        """Whether the ingress is there."""
        return self._transport is not None

    def send(self, call_id: str, batch: Batch) -> None:
        """Sends what is new of a call, together with all that is sent in this turn of the event loop."""
        self._waiting.append((call_id, batch))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._write(self._waiting)
        self._waiting = []

    def _write(self, message: object) -> None:
        if self._transport is not None:
            data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            self._transport.write(len(data).to_bytes(_LENGTH_BYTES) + data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says which replica this is."""
        self._transport = cast(asyncio.WriteTransport, transport)
        self._write(self.name)

    def connection_lost(self, exc: Exception | None) -> None:
        """What is sent from now on goes nowhere: the ingress has seen the end too."""
        self._transport = None


def _remove_unless_used(path: Path) -> None:
    """Removes a socket whose ingress has ended."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


class Senders:
    """A replica's connections, one an ingress."""

    def __init__(self) -> None:
        self._by_path: dict[str, Sender] = {}
        self._connecting = asyncio.Lock()

    async def to(self, path: str) -> Sender | None:
        """The connection to a socket; None if there is none on this machine."""
        async with self._connecting:
            sender = self._by_path.get(path)
            if sender is None or not sender.open:
                self._by_path = {each: kept for each, kept in self._by_path.items() if kept.open}
                try:
                    _, sender = await asyncio.get_running_loop().create_unix_connection(Sender, path)
                except OSError:
                    return None
                self._by_path[path] = sender
            return sender
