"""Order, bounds and rows of the cache, over random schedules, without a model.

The cache of these tests holds in each position a digest of all tokens up to there, as keys and values depend on all of
them; the model's next token is a function of the digest.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.request import Request, StopStrings
from actors.engine.rows import Copy, Layout, Scrub
from actors.engine.scheduler import Scheduler, Turn
from actors.engine.sequence import Sequence
from configs.errors import OverloadedError
from configs.schema.generation import Sampling


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(name: str, prompt: tuple[int, ...], new: int = 3, longest: int = 10**9) -> Sequence:
    request = Request(name, prompt, Sampling(max_new_tokens=new))
    return Sequence(request, NoText(), StopStrings(()), frozenset(), max_tokens=min(len(prompt) + new, longest))


def scheduler(**limits: int) -> Scheduler:
    return Scheduler(
        **{
            "cache_tokens": 4096, "longest": 1024, "max_sequences": 4, "max_queued": 10**6, "prefill_tokens": 100,
            "mixed_prefill_tokens": 100,
        }
        | limits
    )  # fmt: skip


def digests(tokens: list[int] | tuple[int, ...]) -> list[int]:
    chain, state = [], 0
    for token in tokens:
        state = hash((state, token))
        chain.append(state)
    return chain


@dataclass
class World:
    """A scheduler, the cache it commands, and a model."""

    scheduler: Scheduler
    capacity: int
    cache: list[list[int]] = field(default_factory=list)
    tokens_run: int = 0

    def __post_init__(self) -> None:
        rows = self.scheduler.rows
        self.cache = [[0] * rows.width for _ in range(rows.count)]

    def step(self) -> list[Turn]:
        """One step; returns the turns that gave a token."""
        step = self.scheduler.schedule()
        for command in step.commands:
            self.obey(command)
        for turn in step.turns:
            row = self.cache[turn.span.row]
            expected = digests(turn.sequence.tokens)
            assert row[: turn.span.start] == expected[: turn.span.start], "a row holds what its sequence computed"
            row[turn.span.start : turn.span.stop] = expected[turn.span.start : turn.span.stop]
            assert len(row) == self.scheduler.rows.width, "no span leaves its row"
            turn.sequence.cached = turn.span.stop
            self.tokens_run += len(turn.span.tokens)
        completed = [turn for turn in step.turns if turn.completes]
        for turn in completed:
            turn.sequence.tokens.append(self.cache[turn.span.row][turn.span.stop - 1] % 7)
        self.check_books(step.turns)
        return completed

    def obey(self, command: Copy | Layout | Scrub) -> None:
        if isinstance(command, Copy):
            self.cache[command.target][: command.length] = self.cache[command.source][: command.length]
        elif isinstance(command, Scrub):
            for row, length in enumerate((*command.lengths, *[0] * (len(self.cache) - len(command.lengths)))):
                self.cache[row][length:] = [0] * (command_width(self.cache) - length)
        else:
            old, self.cache = self.cache, [[0] * command.width for _ in range(command.rows)]
            for row, (source, length) in enumerate(command.kept):
                self.cache[row][:length] = old[source][:length]

    def check_books(self, turns: list[Turn]) -> None:
        rows, running = self.scheduler.rows, self.scheduler.running
        assert rows.width * rows.count <= self.capacity, "the cache is no larger than was asked"
        assert [s.row for s in running] == list(range(len(running))), "the running ones have the first rows"
        assert not set(rows.left) & set(range(len(running))), "no row has two owners"
        assert all(row < rows.count for row in rows.left)
        for row, tokens in rows.left.items():
            assert self.cache[row][: len(tokens)] == digests(tokens), "what is left in a row is what the books say"
        waiting = self.scheduler.waiting
        assert all(s.row == -1 and s.cached == 0 for s in waiting)
        arrivals = [s.arrival for s in waiting]
        assert arrivals == sorted(arrivals)
        if waiting and running:
            assert max(s.arrival for s in running) < waiting[0].arrival, "nobody is overtaken"
        if running:
            oldest = min(running, key=lambda s: s.arrival)
            assert any(turn.sequence is oldest for turn in turns) or oldest.cached == 0, "the oldest one goes on"


def command_width(cache: list[list[int]]) -> int:
    return len(cache[0])


def alone(one: Sequence) -> list[int]:
    tokens = list(one.request.prompt_ids)
    while len(tokens) < one.max_tokens:
        tokens.append(digests(tokens)[-1] % 7)
    return tokens


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Prompts that share beginnings."""
    base = draw(st.sampled_from([(), (1,) * 40, (1,) * 90, (2, 3) * 30]))
    own = draw(st.lists(st.integers(0, 6), min_size=0 if base else 1, max_size=60))
    return (*base, *own)


SCHEDULES = given(
    asked=st.lists(st.tuples(prompts(), st.integers(1, 90), st.booleans(), st.floats(0, 1)), min_size=1, max_size=12),
    capacity=st.integers(20, 700),
    limits=st.tuples(st.integers(1, 6), st.integers(1, 120), st.integers(1, 60)),
    seed=st.integers(0, 1000),
)


@settings(max_examples=200, deadline=None)
@SCHEDULES
def test_every_sequence_ends_once_with_the_tokens_it_would_have_alone(
    asked: list[tuple[tuple[int, ...], int, bool, float]], capacity: int, limits: tuple[int, int, int], seed: int
) -> None:
    draw = random.Random(seed)
    longest = min(256, capacity)
    world = World(
        scheduler(
            cache_tokens=capacity, longest=longest, max_sequences=limits[0], prefill_tokens=limits[1],
            mixed_prefill_tokens=min(limits[1], limits[2]),
        ),
        capacity,
    )  # fmt: skip
    sequences = [
        (sequence(str(n), prompt[: longest - 1], new, longest), cancelled)
        for n, (prompt, new, cancelled, _) in enumerate(asked)
    ]
    arriving = list(zip(sequences, (wait for *_, wait in asked), strict=True))[::-1]
    ended: dict[Sequence, list[int]] = {}
    gone: set[Sequence] = set()
    # Each step, the oldest one runs a token at least; preempted tokens are run again by the youngest alone.
    for _ in range(20_000):
        while arriving and draw.random() >= arriving[-1][1]:
            world.scheduler.add(arriving.pop()[0][0])
        if arriving and not world.scheduler.has_work:
            world.scheduler.add(arriving.pop()[0][0])
        if not world.scheduler.has_work:
            break
        finished = []
        for turn in world.step():
            one = turn.sequence
            assert one not in gone
            assert one not in ended
            if len(one.tokens) == one.max_tokens:
                ended[one] = one.tokens
                finished.append(one)
        world.scheduler.remove(finished)
        in_flight = [*world.scheduler.running, *world.scheduler.waiting]
        for one, cancelled in sequences:
            if cancelled and one in in_flight and draw.random() < 0.1:
                gone.add(one)
                if one.row >= 0 and draw.random() < 0.5:
                    world.scheduler.discard(one)
                else:
                    world.scheduler.remove([one])
    assert not world.scheduler.has_work, "something starves"
    assert set(ended) | gone == {one for one, _ in sequences}
    for one, tokens in ended.items():
        assert tokens == alone(one)
        assert one.reused < one.prompt_tokens


@pytest.mark.slow
def test_the_same_holds_over_thousands_of_schedules() -> None:
    one = test_every_sequence_ends_once_with_the_tokens_it_would_have_alone.hypothesis.inner_test
    settings(max_examples=5000, deadline=None, database=None)(SCHEDULES(one))()


def test_a_full_cache_drives_out_the_youngest_which_goes_on_later() -> None:
    world = World(scheduler(cache_tokens=256, longest=256, max_sequences=4), 256)
    asked = [sequence(str(n), (n,) * 10, new=150) for n in range(4)]
    for one in asked:
        world.scheduler.add(one)
    order = []
    while world.scheduler.has_work:
        finished = [turn.sequence for turn in world.step() if len(turn.sequence.tokens) == 160]
        world.scheduler.remove(finished)
        order += finished
    assert order == asked
    assert world.scheduler.preemptions == 4
    assert all(one.tokens == alone(one) for one in asked)


def test_rows_narrow_again_once_that_lets_waiting_sequences_in() -> None:
    world = World(scheduler(cache_tokens=512, longest=512, max_sequences=8), 512)
    world.scheduler.add(sequence("long", tuple(range(300)), new=1))
    for n in range(6):
        world.scheduler.add(sequence(str(n), (n,) * 10))
    while not (turns := world.step()):
        assert world.scheduler.rows.count == 1
    world.scheduler.remove([turn.sequence for turn in turns])
    world.step()
    assert len(world.scheduler.running) == 6


def finish(world: World) -> None:
    while world.scheduler.has_work:
        world.scheduler.remove([t.sequence for t in world.step() if len(t.sequence.tokens) == t.sequence.max_tokens])


@pytest.mark.parametrize("together", [True, False])
def test_a_beginning_that_prompts_share_is_run_once(together: bool) -> None:
    world = World(scheduler(max_sequences=8, prefill_tokens=50), 4096)
    shots = tuple(range(200))
    asked = [sequence(str(n), (*shots, *[1000 + n] * 10), new=2) for n in range(8)]
    for one in asked:
        world.scheduler.add(one)
        if not together:
            finish(world)
    finish(world)
    assert world.tokens_run == 200 + 8 * (10 + 1)
    assert [one.reused for one in asked] == [0] + [200] * 7


def test_a_conversation_goes_on_from_its_row_after_others_have_run() -> None:
    world = World(scheduler(max_sequences=2), 4096)
    first = sequence("first turn", tuple(range(60)), new=20)
    world.scheduler.add(first)
    finish(world)
    for n in range(30):
        world.scheduler.add(sequence(str(n), (1000 + n,) * 50))
        finish(world)
    second = sequence("second turn", (*first.tokens, 7, 8, 9))
    world.scheduler.add(second)
    finish(world)
    assert second.reused == 79


def test_requests_start_in_the_order_they_came() -> None:
    one = scheduler(max_sequences=2)
    for name in "abc":
        one.add(sequence(name, (1, 2, 3)))
    assert [turn.sequence.request.id for turn in one.schedule().turns] == ["a", "b"]


def test_prompts_share_a_step_and_short_ones_do_not_wait_for_long_ones() -> None:
    world = World(scheduler(prefill_tokens=64, mixed_prefill_tokens=32), 4096)
    for name, tokens in {"decodes": 4, "long": 500, "longer": 600, "short": 12}.items():
        world.scheduler.add(sequence(name, (len(name),) * tokens, new=50))
    sizes: list[dict[str, int]] = []
    for _ in range(3):
        turns = world.scheduler.schedule().turns
        sizes.append({turn.sequence.request.id: len(turn.span.tokens) for turn in turns})
        for turn in turns:
            turn.sequence.cached = turn.span.stop
            if turn.completes:
                turn.sequence.tokens.append(0)
    assert sizes == [
        {"decodes": 4, "short": 12, "long": 48},
        {"decodes": 1, "short": 1, "long": 18, "longer": 17},
        {"decodes": 1, "short": 1, "long": 18, "longer": 17},
    ]


@pytest.mark.parametrize("decoding", [1, 8, 32])
def test_a_long_prompt_delays_those_that_decode_by_less_than_two_steps(decoding: int) -> None:
    """In a machine on which a step costs what 7 tokens do, plus those it runs; and it gets through in the end."""
    world = World(scheduler(max_sequences=40, cache_tokens=2**16, prefill_tokens=256, mixed_prefill_tokens=10), 2**16)
    for n in range(decoding):
        world.scheduler.add(sequence(str(n), (n,) * 3, new=500))
    while len(world.step()) < decoding:
        continue
    long = sequence("long", (99,) * 500, new=1)
    world.scheduler.add(long)
    steps = 0
    while len(long.tokens) == 500:
        before = world.tokens_run
        world.step()
        steps += 1
        assert 7 + world.tokens_run - before <= 3 * (7 + decoding)
    assert steps <= 500 / 10


def test_a_full_queue_refuses_and_room_admits_again() -> None:
    one = scheduler(max_sequences=1, max_queued=2)
    for name in "abc":
        one.add(sequence(name, (1, 2)))
    with pytest.raises(OverloadedError, match="2 waiting"):
        one.add(sequence("d", (1, 2)))
    one.schedule()
    with pytest.raises(OverloadedError):
        one.add(sequence("d", (1, 2)))
    one.remove([one.running[0]])
    one.add(sequence("d", (1, 2)))
