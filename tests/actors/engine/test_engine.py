"""Parity with transformers, independence of the batch, ends of requests, and errors."""

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request, TokenEvent
from configs.errors import (
    ArtifactError,
    ContractError,
    CorruptArtifactError,
    EngineError,
    OverloadedError,
    RequestError,
)
from configs.schema.generation import Sampling


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 512) for _ in range(length))


def requests(sampling: Sampling, lengths: tuple[int, ...] = (1, 2, 9, 30, 70, 5)) -> list[Request]:
    return [Request(str(n), prompt(length, n), sampling) for n, length in enumerate(lengths)]


def mixed(count: int, seed: int) -> list[Request]:
    """Requests of every kind, for tests of independence."""
    draw = random.Random(seed)
    return [
        Request(
            str(n),
            prompt(draw.randrange(1, 60), draw.randrange(10**6)),
            Sampling(
                max_new_tokens=draw.randrange(0, 25),
                temperature=draw.choice([0.0, 0.7, 1.3]),
                top_k=draw.choice([0, 0, 5]),
                top_p=draw.choice([1.0, 0.9]),
                seed=draw.randrange(100),
                stop=draw.choice([(), ("e",), ("in", "\n  ")]),
                stop_token_ids=draw.choice([(), (300, 301, 302)]),
            ),
        )
        for n in range(count)
    ]


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


@pytest.fixture(scope="module")
def engine(make_model) -> Engine:
    return Engine.load(make_model(), max_sequences=4, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def roomy(make_model) -> Engine:
    return Engine.load(make_model(end=False), max_sequences=1, precision="fp32", device="cpu")


@pytest.mark.parametrize(
    "config",
    [
        {"kv_heads": 4, "tied": True},
        {"kv_heads": 2, "tied": False},
        {"kv_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 24},
        {"rope_parameters": (("rope_type", "linear"), ("factor", 2.0), ("rope_theta", 500.0))},
        {
            "rope_parameters": (
                ("rope_type", "llama3"), ("factor", 8.0), ("rope_theta", 1000.0), ("low_freq_factor", 1.0),
                ("high_freq_factor", 4.0), ("original_max_position_embeddings", 32),
            )
        },
    ],
    ids=["mha-tied", "gqa-untied", "biases", "wide-heads", "rope-linear", "rope-llama3"],
)  # fmt: skip
def test_greedy_tokens_equal_those_of_transformers(make_model, config: dict) -> None:
    if "rope_parameters" in config:
        config = {"rope_parameters": FrozenRope(config["rope_parameters"])}
    folder = make_model(**config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine.load(folder, max_sequences=4, precision="fp32", device="cpu")
    asked = requests(Sampling(max_new_tokens=20, temperature=0))
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        ids = torch.tensor([request.prompt_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()


class FrozenRope(dict):
    """A hashable dict, as made models are cached by their config."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


@pytest.mark.parametrize("config", [{"kv_heads": 4, "tied": True}, {"kv_heads": 1, "tied": False}])
def test_scores_equal_the_naive_forward_pass(make_model, config: dict) -> None:
    folder = make_model(**config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine.load(folder, precision="fp32", device="cpu")
    rows = torch.tensor([prompt(81, seed) for seed in range(60)])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(engine.score(rows), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(engine.score(rows[:1, :2]), expected[:1, :1], atol=1e-4, rtol=0)


def test_bf16_scores_are_near_those_in_fp32(make_model) -> None:
    rows = torch.tensor([prompt(41, seed) for seed in range(4)])
    exact, rounded = (
        Engine.load(make_model(initializer_range=0.02), precision=p).score(rows) for p in ("fp32", "bf16")
    )
    assert 0 < float((exact - rounded).abs().max()) < 0.02


def test_rows_that_do_not_fit_the_model_are_not_scored(engine: Engine) -> None:
    with pytest.raises(RequestError, match="0 to 511"):
        engine.score(torch.full((1, 9), 512))
    with pytest.raises(RequestError, match="2 to 97 tokens"):
        engine.score(torch.zeros(1, 98, dtype=torch.long))


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_once_with_what_it_gives_alone(make_model, seed: int) -> None:
    """Random arrivals during the run, on few slots, with prompts cut into small chunks."""
    engine = Engine.load(make_model(), max_sequences=3, prefill_tokens=16, precision="fp32", device="cpu")
    asked = mixed(16, seed)
    alone = {request.id: engine.generate([request])[0] for request in asked}
    draw = random.Random(seed)
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    waiting = asked[::-1]
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.4:
            engine.submit(waiting.pop())
        for event in engine.step():
            events[event.request_id].append(event)
    for request in asked:
        mine = events[request.id]
        assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        assert Completion.of(mine) == alone[request.id]
        assert mine[-1].completion_tokens == len(alone[request.id].token_ids)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    cache_tokens=st.integers(20, 300),
    max_sequences=st.integers(1, 6),
    prefill_tokens=st.integers(1, 64),
)
def test_tight_caches_and_shared_beginnings_change_no_token(
    make_model, roomy: Engine, seed: int, cache_tokens: int, max_sequences: int, prefill_tokens: int
) -> None:
    """Random arrivals and cancellations over caches that hold from a fifth of the window to three of it."""
    draw = random.Random(seed)
    engine = Engine.load(
        make_model(end=False), max_sequences=max_sequences, cache_tokens=cache_tokens, prefill_tokens=prefill_tokens,
        precision="fp32", device="cpu",
    )  # fmt: skip
    asked = []
    for n in range(10):
        ids = prompt(60, draw.randrange(2))[: draw.randrange(0, 60)] + prompt(draw.randrange(1, 20), n)
        room = engine.context_length - 1
        sampling = Sampling(temperature=draw.choice([0.0, 0.9]), seed=n, max_new_tokens=draw.randrange(1, 40))
        asked.append(Request(str(n), ids[:room], sampling))
    cancelled = {request.id for request in asked if draw.random() < 0.2}
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    waiting = asked[::-1]
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.4:
            engine.submit(waiting.pop())
        for event in engine.step():
            events[event.request_id].append(event)
        for name in cancelled:
            if draw.random() < 0.05:
                engine.cancel(name)
    for request in asked:
        mine = events[request.id]
        alone = roomy.generate([request])[0].token_ids
        got = tuple(token for event in mine for token in event.token_ids)
        if request.id in cancelled:
            assert got == alone[: len(got)]
        else:
            assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
            room = engine.context_length - len(request.prompt_ids)
            assert got == alone[:room]


def test_cancelled_requests_fall_silent_and_change_nothing_for_the_others(engine: Engine) -> None:
    asked = mixed(12, seed=77)
    alone = {request.id: engine.generate([request])[0] for request in asked}
    for request in asked:
        engine.submit(request)
    engine.submit(Request("empty", prompt(3, 1), Sampling(max_new_tokens=0)))
    engine.cancel("empty")
    cancelled = {"0", "3", "7", "11"}
    events = defaultdict(list)
    for name in ("never submitted", "11", "3"):
        engine.cancel(name)
    for step in range(1000):
        for event in engine.step():
            events[event.request_id].append(event)
        if step == 2:
            seen = {name: len(events[name]) for name in cancelled}
            for name in cancelled:
                engine.cancel(name)
    assert not engine.has_work
    assert "empty" not in events
    for name in cancelled:
        assert len(events[name]) == seen[name]
    for request in asked:
        if request.id not in cancelled:
            assert Completion.of(events[request.id]) == alone[request.id]


def test_shown_text_never_holds_part_of_a_stop_string_or_of_a_character(engine: Engine) -> None:
    free = engine.generate(requests(Sampling(max_new_tokens=40, temperature=0.9, seed=5)))
    for completion in free:
        assert completion.text == engine.text.decode(completion.token_ids)
        if len(completion.text) < 12:
            continue
        stop = completion.text[6:9]
        expected = completion.text[: completion.text.index(stop)]
        request = Request("r", prompt_of(free, completion), Sampling(
            max_new_tokens=40, temperature=0.9, seed=5, stop=(stop, "never to be seen")))  # fmt: skip
        engine.submit(request)
        shown = ""
        for event in drain(engine)["r"]:
            shown += event.text
            assert expected.startswith(shown)
        assert shown == expected
        assert event.finish_reason == "stop"


def prompt_of(completions: list[Completion], one: Completion) -> tuple[int, ...]:
    return requests(Sampling())[completions.index(one)].prompt_ids


def test_a_stop_token_ends_the_request_and_is_not_shown(engine: Engine) -> None:
    free = engine.generate([Request("a", prompt(9, 3), Sampling(max_new_tokens=12, temperature=0))])[0]
    assert free.finish_reason == "length"
    stop = free.token_ids[5]
    cut = free.token_ids.index(stop)
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_token_ids=(stop,))
    got = engine.generate([Request("a", prompt(9, 3), sampling)])[0]
    assert got.token_ids == free.token_ids[: cut + 1]
    assert got.text == engine.text.decode(free.token_ids[:cut])
    assert got.finish_reason == "stop"


def test_generation_ends_at_the_end_of_the_context_window(engine: Engine) -> None:
    got = engine.generate([Request("a", prompt(90, 1), Sampling(max_new_tokens=50, temperature=0))])[0]
    assert len(got.token_ids) == 6
    assert got.finish_reason == "length"


def test_no_new_tokens_asked_gives_none(engine: Engine) -> None:
    got = engine.generate([Request("a", prompt(9, 1), Sampling(max_new_tokens=0))])[0]
    assert (got.token_ids, got.text, got.finish_reason, got.prompt_tokens) == ((), "", "length", 9)


@pytest.mark.parametrize(
    ("ids", "message"),
    [((), "empty"), (prompt(96, 1), "allowed: at most 95 tokens"), ((5, 512), "received 512"), ((-1,), "0 to 511")],
)
def test_a_prompt_that_cannot_be_run_is_refused(engine: Engine, ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(Request("a", ids, Sampling()))
    assert caught.value.param == "prompt"
    assert not engine.has_work


def test_a_full_queue_refuses_and_keeps_what_it_holds(make_model) -> None:
    engine = Engine.load(make_model(), max_sequences=1, max_queued=2)
    asked = requests(Sampling(max_new_tokens=3))
    for request in asked[:3]:
        engine.submit(request)
    with pytest.raises(OverloadedError):
        engine.submit(asked[3])
    with pytest.raises(RequestError, match="in flight"):
        engine.submit(asked[0])
    with pytest.raises(EngineError, match="in flight"):
        engine.generate(asked)
    assert set(drain(engine)) == {"0", "1", "2"}
    engine.submit(asked[3])


def spoiled(folder: Path, broken: Path) -> Path:
    """A copy of a model that yields NaN after token 500."""
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][500] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


def test_unusable_logits_end_their_own_request_only(make_model, tmp_path: Path) -> None:
    folder = make_model(tied=False)
    healthy = Engine.load(folder, max_sequences=3, precision="fp32", device="cpu")
    broken = spoiled(folder, tmp_path / "model")
    engine = Engine.load(broken, max_sequences=3, precision="fp32", device="cpu")
    sampling = Sampling(max_new_tokens=10, temperature=0)
    good = [Request(f"good {n}", tuple(i for i in prompt(20, n) if i != 500), sampling) for n in range(6)]
    bad = [Request(f"bad {n}", (*prompt(4 * n, n), 500, 7), sampling) for n in range(6)]
    mixed_order = [request for pair in zip(bad, good, strict=True) for request in pair]
    got = {completion.request_id: completion for completion in engine.generate(mixed_order)}
    for request, expected in zip(good, healthy.generate(good), strict=True):
        assert got[request.id] == expected
    for request in bad:
        assert got[request.id].finish_reason == "error"
        assert isinstance(got[request.id].error, EngineError)


@pytest.mark.parametrize("where", [3, 40])
def test_what_spoiled_a_row_never_reaches_another_request(make_model, tmp_path: Path, where: int) -> None:
    """Through beginnings that are shared, rows that are moved or left behind, and prompts in several chunks."""
    folder = make_model(tied=False, end=False)
    healthy = Engine.load(folder, precision="fp32", device="cpu")
    broken = spoiled(folder, tmp_path / "model")
    engine = Engine.load(broken, max_sequences=4, prefill_tokens=16, cache_tokens=200, precision="fp32", device="cpu")
    draw = random.Random(where)
    shared = tuple(i for i in prompt(60, 1) if i != 500)[:50]
    greedy = Sampling(max_new_tokens=12, temperature=0, logit_bias={500: -100})
    asked = []
    for n in range(40):
        ids = shared[: draw.randrange(1, 50)] + tuple(i for i in prompt(20, 100 + n) if i != 500)
        bad = n % 3 == 0
        asked.append(
            Request(f"{'bad' if bad else 'good'} {n}", (*ids[:where], 500, *ids[where:]) if bad else ids, greedy)
        )
    got = engine.generate(asked)
    expected = iter(healthy.generate([request for request in asked if request.id.startswith("good")]))
    for request, completion in zip(asked, got, strict=True):
        if request.id.startswith("good"):
            assert completion == next(expected)
        else:
            assert isinstance(completion.error, EngineError)
            assert not completion.token_ids


def test_a_spoiled_prompt_that_is_moved_before_its_end_leaves_nothing_behind(make_model, tmp_path: Path) -> None:
    folder = make_model(tied=False, end=False, max_position_embeddings=1024)
    broken = spoiled(folder, tmp_path / "model")
    engine = Engine.load(broken, max_sequences=3, prefill_tokens=32, precision="fp32", device="cpu")
    clean = tuple(i for i in prompt(40, 9) if i != 500)
    asked = {
        "ends first": Request("ends first", clean[:5], Sampling(max_new_tokens=4, temperature=0)),
        "stays": Request("stays", clean[5:25], Sampling(max_new_tokens=40, temperature=0)),
        "spoiled": Request("spoiled", (500, *prompt(900, 3)), Sampling(max_new_tokens=4, temperature=0)),
        "comes last": Request("comes last", clean[25:28], Sampling(max_new_tokens=9, temperature=0)),
    }
    for name in ("ends first", "stays", "spoiled"):
        engine.submit(asked[name])
    events = defaultdict(list)
    ended: set[str] = set()
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
            if event.finish_reason is not None:
                ended.add(event.request_id)
        if "ends first" in ended and "comes last" not in events:
            engine.step()
            engine.submit(asked["comes last"])
            events["comes last"] = []
    healthy = Engine.load(folder, precision="fp32", device="cpu")
    for name in ("ends first", "comes last"):
        assert Completion.of(events[name]) == healthy.generate([asked[name]])[0]


def test_a_request_that_the_memory_cannot_hold_fails_alone(make_model) -> None:
    engine = Engine.load(make_model(end=False), max_sequences=4, precision="fp32", device="cpu")
    asked = [Request(str(n), (*prompt(20, n), 400 + n), Sampling(max_new_tokens=9, temperature=0)) for n in range(4)]
    alone = [engine.generate([one])[0] for one in asked]
    run = engine._decoder.run

    def short_of_memory(spans, cache, wanted):
        if any(402 in span.tokens for span in spans):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return run(spans, cache, wanted)

    engine._decoder.run = short_of_memory  # stands for the device
    got = engine.generate(asked)
    assert [got[n] for n in (0, 1, 3)] == [alone[n] for n in (0, 1, 3)]
    assert isinstance(got[2].error, EngineError)
    assert "2 GiB" in str(got[2].error)
    engine._decoder.run = run
    assert engine.generate([asked[2]]) == [alone[2]]


_SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from actors.engine.engine import Engine
from actors.engine.request import Request
from configs.schema.generation import Sampling

engine = Engine.load(Path(sys.argv[1]), max_sequences=2, prefill_tokens=1500, precision="fp32", device="cpu")
asked = Request("long", tuple(5 + n % 500 for n in range(1500)), Sampling(max_new_tokens=3, temperature=0))
engine.generate([Request("warm", (5,) * 20, Sampling(max_new_tokens=3))])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), used + (150 << 20)))
completion = engine.generate([asked])[0]
print(completion.finish_reason, len(completion.token_ids), engine.tokens_run)
"""


@pytest.mark.slow
def test_a_step_that_the_memory_cannot_hold_is_run_in_parts(make_model) -> None:
    """1,500 tokens at once need 240 MB for one layer's gate and up projection; the process is given 150."""
    folder = make_model(end=False, intermediate_size=20_000, max_position_embeddings=2048)
    ran = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_MEMORY, str(folder)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert ran.stdout.split() == ["length", "3", str(20 + 2 + 1500 + 2)]


def test_a_small_cache_gives_the_same_tokens_one_after_the_other(make_model) -> None:
    """The cache holds one sequence of the full window, or three short ones."""
    roomy = Engine.load(make_model(end=False), max_sequences=4, precision="fp32", device="cpu")
    tight = Engine.load(make_model(end=False), max_sequences=4, cache_tokens=100, precision="fp32", device="cpu")
    assert tight.context_length == roomy.context_length == 96
    asked = requests(Sampling(max_new_tokens=60, temperature=0.8, seed=3), lengths=(3, 20, 9, 30, 35, 5))
    assert tight.generate(asked) == roomy.generate(asked)
    assert tight.preemptions > 0
    assert roomy.preemptions == 0


def test_a_prompt_that_the_cache_can_never_hold_is_refused_alone(make_model) -> None:
    engine = Engine.load(make_model(), max_sequences=4, cache_tokens=50)
    assert engine.context_length == 50
    engine.submit(Request("fits", prompt(49, 1), Sampling(max_new_tokens=5)))
    with pytest.raises(RequestError, match="at most 49"):
        engine.submit(Request("a", prompt(50, 1), Sampling()))
    assert len(Completion.of(drain(engine)["fits"]).token_ids) == 1


def test_few_shot_prompts_compute_what_they_share_once(make_model) -> None:
    engine = Engine.load(make_model(end=False), max_sequences=8, precision="fp32", device="cpu")
    greedy = Sampling(max_new_tokens=6, temperature=0)
    shots = prompt(60, 1)
    asked = [Request(str(n), (*shots, *prompt(8, 100 + n)), greedy) for n in range(20)]
    alone = [Engine.load(make_model(end=False), precision="fp32", device="cpu").generate([one])[0] for one in asked]
    before = engine.tokens_run
    together = engine.generate(asked)
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
    assert engine.tokens_run - before == 60 + 20 * (8 + 5)
    assert sorted(completion.cached_tokens for completion in together) == [0] + [60] * 19


def test_a_conversation_continues_on_what_its_last_turn_left(make_model) -> None:
    engine = Engine.load(make_model(end=False), precision="fp32", device="cpu")
    greedy = Sampling(max_new_tokens=10, temperature=0)
    first = engine.generate([Request("1", prompt(30, 1), greedy)])[0]
    second = Request("2", (*prompt(30, 1), *first.token_ids, *prompt(5, 2)), greedy)
    engine.generate([Request(str(n), prompt(30, 50 + n), greedy) for n in range(6)])
    continued = engine.generate([second])[0]
    assert continued.cached_tokens == 39
    fresh = Engine.load(make_model(end=False), precision="fp32", device="cpu").generate([second])[0]
    assert continued.token_ids == fresh.token_ids


def test_a_cache_beyond_the_memory_is_refused_with_its_size(make_model) -> None:
    with pytest.raises(EngineError, match=r"GB.*max_sequences"):
        Engine.load(make_model(), cache_tokens=10**14, precision="fp32", device="cpu")


def test_folders_that_are_no_supported_model_are_refused(make_model, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        Engine.load(tokenizer_folder)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in make_model().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 512}))
    with pytest.raises(CorruptArtifactError, match="the weights hold no"):
        Engine.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ArtifactError, match=r"lean decoder .* received 'hidden_act is gelu'"):
        Engine.load(folder, decoder="lean")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CorruptArtifactError, match=r"no model\.layers\.2"):
        Engine.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ContractError, match="more tokens than the model"):
        Engine.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        Engine.load(folder)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors"):
        Engine.load(folder)
