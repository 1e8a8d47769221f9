"""Encoder-decoder models: transformers' greedy tokens in any company, forced tokens, windows, ends and errors."""

import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from actors.engine.request import Completion, Request, TokenEvent
from actors.engine.seq2seq import Seq2SeqEngine
from configs.errors import ArtifactError, CorruptArtifactError, EngineError, OverloadedError, RequestError
from configs.schema.generation import Sampling

GREEDY = Sampling(max_new_tokens=24, temperature=0)
MakeSeq2Seq = Callable[..., Path]


@cache
def theirs(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def expected(folder: Path, request: Request) -> list[int]:
    """What `generate` makes of a source alone, without the tokens that the target begins with."""
    model = theirs(folder)
    start = 1 if model.generation_config.forced_bos_token_id is None else 2
    ids = torch.tensor([request.prompt_ids])
    new = request.sampling.max_new_tokens + start - 1
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1, min_length=0
    )
    return out[0, start:].tolist()


def load(folder: Path, **options: Any) -> Seq2SeqEngine:
    return Seq2SeqEngine.load(folder, precision="fp32", device="cpu", **options)


def source(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 512) for _ in range(length))


def requests(count: int, seed: int, sampling: Sampling = GREEDY) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(str(n), source(draw.choice([1, 2, 9, 30, 60, 120]), n), sampling.model_copy(
            update={"max_new_tokens": draw.randrange(1, 40)}))
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart", "bart-forced"])
def test_greedy_tokens_equal_those_of_transformers_in_any_batch(make_seq2seq: MakeSeq2Seq, name: str) -> None:
    folder = make_seq2seq(name)
    asked = requests(10, seed=1)
    wanted = [expected(folder, request) for request in asked]
    assert len({tuple(tokens) for tokens in wanted}) > 7
    for options in ({"max_sequences": 1}, {"max_sequences": 5, "batch_tokens": 1}, {"max_sequences": 10}):
        got = load(folder, **options).generate(asked)
        assert [list(one.token_ids) for one in got] == wanted
        assert [one.prompt_tokens for one in got] == [len(request.prompt_ids) for request in asked]


def test_a_forced_last_token_is_drawn_only_where_the_text_runs_out_of_room(make_seq2seq: MakeSeq2Seq) -> None:
    engine = load(make_seq2seq("bart-forced"))
    request = Request("a", source(9, 1), Sampling(max_new_tokens=6, temperature=0))
    (got,) = engine.generate([request])
    assert got.token_ids[-1] == 4
    assert got.finish_reason == "length"
    (got,) = engine.generate([replace(request, sampling=Sampling(max_new_tokens=6, min_tokens=6, temperature=0))])
    assert 4 not in got.token_ids


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("seed", range(2))
def test_every_request_ends_once_with_what_it_gives_alone(make_seq2seq: MakeSeq2Seq, name: str, seed: int) -> None:
    """Random arrivals and cancellations with caches so small that rows are laid out anew and targets are preempted."""
    folder = make_seq2seq(name)
    draw = random.Random(seed)
    asked = [
        replace(request, sampling=Sampling(
            max_new_tokens=draw.choice([0, 1, 30, 70, 100]), temperature=draw.choice([0.0, 0.9]),
            top_p=draw.choice([1.0, 0.9]), seed=draw.randrange(100), repetition_penalty=draw.choice([1.0, 1.3]),
            stop=draw.choice([(), (), (), ("in", "\n  ")]), stop_token_ids=draw.choice([(), (), (300, 301)])))
        for request in requests(14, seed)
    ]  # fmt: skip
    roomy = load(folder, max_sequences=1)
    alone = {request.id: roomy.generate([request])[0] for request in asked}
    engine = load(folder, max_sequences=6, cache_tokens=256, batch_tokens=draw.choice([1, 40, 500]))
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    waiting, cancelled = asked[::-1], set()
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.7:
            engine.submit(waiting.pop())
        for event in engine.step():
            events[event.request_id].append(event)
        if draw.random() < 0.03:
            name = str(draw.randrange(14 - len(waiting)))
            if not (events[name] and events[name][-1].finish_reason):
                cancelled.add(name)
                seen = len(events[name])
                engine.cancel(name)
                assert len(events[name]) == seen
    assert not engine._flights
    assert engine._source_rows.count == 256 // engine._source_rows.width
    for request in asked:
        mine = events[request.id]
        if request.id in cancelled:
            assert not any(event.finish_reason for event in mine)
        else:
            assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
            assert Completion.of(mine) == alone[request.id]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_preempted_target_goes_on_as_before_and_its_source_is_not_read_again(
    make_seq2seq: MakeSeq2Seq, name: str
) -> None:
    folder = make_seq2seq(name)
    engine = load(folder, max_sequences=6, cache_tokens=256)
    reads: list[int] = []
    engine._encoder.register_forward_pre_hook(
        lambda module, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    # All targets are the same, so that only their sources tell their log-probabilities apart.
    sampling = Sampling(max_new_tokens=90, temperature=0, logit_bias={7: 100}, logprobs=0)
    asked = [Request(str(n), source(20, n), sampling) for n in range(6)]
    got = engine.generate(asked)
    assert engine._scheduler.preemptions > 0
    assert sum(reads) == 6
    for one, alone in zip(got, load(folder).generate(asked), strict=True):
        assert one.token_ids == alone.token_ids
        wanted = [entry.logprob for entry in alone.logprobs]
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(wanted, abs=1e-3)


def test_sources_and_targets_stay_within_the_window(make_seq2seq: MakeSeq2Seq) -> None:
    engine = load(make_seq2seq("bart"))
    assert engine.context_length == 128
    with pytest.raises(RequestError, match="at most 128 tokens") as caught:
        engine.submit(Request("a", source(129, 1), GREEDY))
    assert caught.value.param == "prompt"
    (got,) = engine.generate([Request("a", source(128, 1), Sampling(max_new_tokens=500, temperature=0))])
    assert (len(got.token_ids), got.finish_reason) == (127, "length")
    with pytest.raises(EngineError, match="at most 128"):
        load(make_seq2seq("bart"), context_length=129)
    assert load(make_seq2seq("t5"), context_length=2000, max_sequences=2).context_length == 2000
    assert load(make_seq2seq("t5"), cache_tokens=100).context_length == 100


@pytest.mark.parametrize(
    ("ids", "sampling", "message"),
    [
        ((), GREEDY, "empty"),
        ((5, 512), GREEDY, "received 512"),
        ((5,), Sampling(prompt_logprobs=0), "reads its source as a whole"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(
    make_seq2seq: MakeSeq2Seq, ids: tuple[int, ...], sampling: Sampling, message: str
) -> None:
    engine = load(make_seq2seq("t5"))
    with pytest.raises(RequestError, match=message):
        engine.submit(Request("a", ids, sampling))
    assert not engine.has_work


def test_a_full_queue_refuses_and_keeps_what_it_holds(make_seq2seq: MakeSeq2Seq) -> None:
    engine = load(make_seq2seq("t5"), max_sequences=1, max_queued=2)
    asked = [Request(str(n), source(5, n), Sampling(max_new_tokens=3)) for n in range(5)]
    for request in asked[:3]:
        engine.submit(request)
    with pytest.raises(OverloadedError, match="2 waiting"):
        engine.submit(asked[3])
    with pytest.raises(RequestError, match="in flight"):
        engine.submit(asked[0])
    with pytest.raises(EngineError, match="in flight"):
        engine.generate(asked)
    ended = [event.request_id for _ in range(20) for event in engine.step() if event.finish_reason]
    assert ended == ["0", "1", "2"]
    assert not engine.has_work


def test_unusable_logits_end_their_own_request_only(make_seq2seq: MakeSeq2Seq, tmp_path: Path) -> None:
    folder = make_seq2seq("bart")
    healthy = load(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.shared.weight"][500] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = load(tmp_path, max_sequences=3)
    # Later sources, some shorter and some longer, take the rows of those that were spoiled.
    good = [Request(f"good {n}", tuple(t for t in source(20 + 25 * (n % 2), n) if t != 500), GREEDY) for n in range(6)]
    mixed = [*(Request(f"bad {n}", (*source(40, n), 500), GREEDY) for n in range(3)), *good]
    # The head is tied to the embedding, so that the spoiled token's logit would be no number for any request.
    engine._decoder._head = healthy._decoder._head
    for request, got in zip(mixed, engine.generate(mixed), strict=True):
        if 500 in request.prompt_ids:
            assert (got.finish_reason, got.token_ids) == ("error", ())
            assert "not finite" in str(got.error)
        else:
            assert got == healthy.generate([request])[0]


def test_text_is_encoded_with_what_the_tokenizer_puts_around_it(make_seq2seq: MakeSeq2Seq) -> None:
    engine = load(make_seq2seq("t5"))
    assert engine.encode_source("def f():") == tuple(engine.text.encode("def f():"))


def test_folders_that_are_no_supported_model_are_refused(
    make_seq2seq: MakeSeq2Seq, make_model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"'llama'; allowed: bart, t5"):
        load(make_model())
    for file in make_seq2seq("t5").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.block.1.layer.1.EncDecAttention.q.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptArtifactError, match=r"EncDecAttention\.q\.weight"):
        load(tmp_path)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((make_seq2seq("t5") / name).read_text())
        config.pop("decoder_start_token_id", None)
        config.pop("bos_token_id", None)
        (tmp_path / name).write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((make_seq2seq("t5") / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="decoder_start_token_id"):
        load(tmp_path)
