"""Refusing at the door: as a replica would, for a moment, and never while there is room."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from serving.calls import Refusal
from serving.door import REMEMBERED_SECONDS, Door

FULL = Refusal(503, "full", "overloaded", retry_after_seconds=1)


def test_a_door_is_open_until_a_replica_had_no_room() -> None:
    door = Door(lambda: 0.0)
    with ExitStack() as inside:
        for _ in range(1000):
            assert door.refusal(100) is None
            inside.enter_context(door.passed(100))


def test_whom_a_replica_would_refuse_is_refused_until_somebody_leaves_or_the_moment_is_over() -> None:
    now = [0.0]
    door = Door(lambda: now[0])
    with door.passed(4):
        with door.passed(2):
            with door.passed(1):
                door.refused(FULL)
            assert door.refusal(1) is FULL
        assert door.refusal(2) is None
        assert door.refusal(3) is FULL
        now[0] = REMEMBERED_SECONDS
        assert door.refusal(3) is None


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=60))
def test_a_replica_with_room_is_never_kept_from_a_call(room: int, calls: list[tuple[int, bool]]) -> None:
    """One replica with so much room, calls that come and go at one moment."""
    door = Door(lambda: 0.0)
    taken: list[tuple[int, ExitStack]] = []
    for sequences, leaves in calls:
        fits = sum(size for size, _ in taken) + sequences <= room
        if door.refusal(sequences) is not None:
            assert not fits
        else:
            visit = ExitStack()
            visit.enter_context(door.passed(sequences))
            if fits:
                taken.append((sequences, visit))
            else:
                door.refused(FULL)
                visit.close()
        if leaves and taken:
            taken.pop(0)[1].close()
