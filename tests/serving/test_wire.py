"""Answers on their way from replicas to an ingress, over a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.calls import Piece
from serving.wire import Batch, Inbox, Sender, Senders, Wire, WireLostError


def batch(text: str) -> list[Piece]:
    return [Piece(0, text, 1, len(text))]


async def saying(*items: str | Batch) -> AsyncIterator[str | Batch]:
    """What comes through Ray Serve."""
    for item in items:
        yield item


def on_wire(tmp_path: Path, test: Callable[[Wire, Sender], Coroutine[Any, Any, None]]) -> None:
    """Runs a test with an ingress and a replica that is connected to it."""

    async def run() -> None:
        wire = Wire(tmp_path)
        sender = await Senders().to(await wire.address() or "")
        assert sender is not None
        async with asyncio.timeout(5):
            await test(wire, sender)

    asyncio.run(run())


async def texts(inbox: Inbox, count: int) -> list[str]:
    found = [await inbox.next() for _ in range(count)]
    return [piece.text for each in found if isinstance(each, list) for piece in each]


def test_answers_side_by_side_come_each_in_its_own_order(tmp_path: Path) -> None:
    async def test(wire: Wire, sender: Sender) -> None:
        with wire.inbox("a") as first, wire.inbox("b") as second:
            await asyncio.gather(first.fill(saying(sender.name)), second.fill(saying(sender.name)))
            for turn in "123":
                for call_id in "abc":  # nobody waits for c
                    sender.send(call_id, batch(call_id + turn))
                await asyncio.sleep(0)
            sender.send("a", batch("x" * (1 << 20)))
            assert await texts(first, 3) == ["a1", "a2", "a3"]
            assert await texts(second, 3) == ["b1", "b2", "b3"]
            assert await texts(first, 1) == ["x" * (1 << 20)]

    on_wire(tmp_path, test)


def test_all_of_one_turn_is_one_message(tmp_path: Path) -> None:
    async def test(wire: Wire, sender: Sender) -> None:
        messages: list[int] = []
        came = wire.came

        def counted(name: str, items: Sequence[tuple[str, Batch]]) -> None:
            messages.append(len(items))
            came(name, items)

        wire.came = counted  # type: ignore[method-assign]
        with wire.inbox("31") as last:
            await last.fill(saying(sender.name))
            for number in range(32):
                sender.send(str(number), batch("x"))
            await last.next()
        assert messages == [32]

    on_wire(tmp_path, test)


def test_only_the_replica_that_has_the_call_is_heard_even_if_another_one_spoke_before(tmp_path: Path) -> None:
    async def test(wire: Wire, sender: Sender) -> None:
        other = await Senders().to(await wire.address() or "")
        assert other is not None
        with wire.inbox("a") as inbox:
            other.send("a", batch("not mine"))
            sender.send("a", batch("early"))
            await asyncio.sleep(0.05)
            await inbox.fill(saying(sender.name))
            sender.send("a", batch("late"))
            assert await texts(inbox, 2) == ["early", "late"]

    on_wire(tmp_path, test)


def test_a_replica_that_goes_away_is_noticed_by_those_who_wait_for_it(tmp_path: Path) -> None:
    async def test(wire: Wire, sender: Sender) -> None:
        with wire.inbox("a") as inbox, wire.inbox("later") as later:
            await inbox.fill(saying(sender.name))
            sender.send("a", batch("one"))
            await asyncio.sleep(0)
            assert sender._transport is not None
            sender._transport.close()
            assert await texts(inbox, 1) == ["one"]
            with pytest.raises(WireLostError):
                await inbox.next()
            await later.fill(saying(sender.name))
            with pytest.raises(WireLostError):
                await later.next()

    on_wire(tmp_path, test)


def test_what_comes_through_ray_serve_instead_is_given_on_to_its_end(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[str | Batch]:
        yield batch("one")
        raise KeyError("lost")

    async def test(wire: Wire, sender: Sender) -> None:
        with wire.inbox("a") as inbox, wire.inbox("b") as other:
            await inbox.fill(saying(batch("one"), batch("two")))
            assert await texts(inbox, 2) == ["one", "two"]
            assert await inbox.next() is None
            await other.fill(broken())
            assert await texts(other, 1) == ["one"]
            with pytest.raises(KeyError):
                await other.next()

    on_wire(tmp_path, test)


def test_a_socket_that_is_not_here_is_no_connection_and_sockets_of_the_dead_are_removed(tmp_path: Path) -> None:
    async def run() -> None:
        assert await Senders().to(str(tmp_path / "elsewhere")) is None
        dead, alive = tmp_path / "wire-dead", Wire(tmp_path)
        with socket.socket(socket.AF_UNIX) as ended:
            ended.bind(str(dead))
        first = await alive.address()
        second = await Wire(tmp_path).address()
        assert not dead.exists()
        assert {str(path) for path in tmp_path.iterdir()} == {first, second}
        assert await Wire(tmp_path / "missing").address() is None

    asyncio.run(run())
