"""What requests are told of their tokens: log-probabilities, controls over whole requests, and where they end."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request, TokenLogprob
from configs.errors import RequestError
from configs.schema.generation import Sampling

CONTEXT = 96


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(5, 512) for _ in range(length))


@pytest.fixture(scope="module")
def folder(make_model) -> Path:
    return make_model(end=False)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, max_sequences=4, prefill_tokens=16, precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def naive(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprobs(naive: torch.nn.Module, ids: tuple[int, ...]) -> torch.Tensor:
    """`log_softmax` of the whole sequence, run at once: row n is what follows token n."""
    with torch.no_grad():
        return naive(torch.tensor([ids])).logits[0].log_softmax(-1)


def assert_equal(entries: tuple[TokenLogprob, ...], ids: tuple[int, ...], expected: torch.Tensor, top: int) -> None:
    assert tuple(entry.token_id for entry in entries) == ids
    for entry, token, row in zip(entries, ids, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, _ = row.topk(top)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_are_those_of_the_naive_forward_pass(engine: Engine, naive: torch.nn.Module) -> None:
    """Whatever the request's own controls do to the distribution, for prompts in one chunk and in several."""
    asked = [
        Request(
            str(n),
            prompt(length, n),
            Sampling(
                max_new_tokens=new, temperature=heat, top_k=7, repetition_penalty=1.5, seed=n, logprobs=top,
                prompt_logprobs=3,
            ),
        )
        for n, (length, new, heat, top) in enumerate(
            [
                (1, 5, 0.0, 2), (9, 8, 1.0, 0), (40, 6, 0.7, 5), (90, 6, 0.0, 1), (95, 1, 1.0, 20), (33, 0, 1.0, 4),
                (96, 0, 0.0, 0),
            ]
        )
    ]  # fmt: skip
    engine.generate([Request("before", prompt(90, 3), Sampling(max_new_tokens=2))])
    for request, done in zip(asked, engine.generate(asked), strict=True):
        ids = request.prompt_ids + done.token_ids
        rows = logprobs(naive, ids)
        assert len(done.token_ids) == request.sampling.max_new_tokens
        assert done.prompt_logprobs is not None
        assert_equal(done.prompt_logprobs, request.prompt_ids[1:], rows[: len(request.prompt_ids) - 1], 3)
        assert request.sampling.logprobs is not None
        assert_equal(done.logprobs, done.token_ids, rows[len(request.prompt_ids) - 1 : -1], request.sampling.logprobs)


def test_prompts_are_scored_while_others_decode(engine: Engine, naive: torch.nn.Module) -> None:
    shared = prompt(60, 5)
    engine.submit(Request("decoding", shared[:20], Sampling(max_new_tokens=30, temperature=0)))
    engine.step()
    for name in ("a", "b"):
        engine.submit(Request(name, shared, Sampling(max_new_tokens=2, prompt_logprobs=0, temperature=0)))
    events = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    rows = logprobs(naive, shared)
    for name in ("a", "b"):
        assert [event.prompt_logprobs is None for event in events[name]] == [False, True]
        assert_equal(events[name][0].prompt_logprobs, shared[1:], rows[:-1], 0)
    assert all(event.prompt_logprobs is None and event.logprobs == () for event in events["decoding"])


def test_asking_for_logprobs_changes_no_token(engine: Engine) -> None:
    for heat in (0.0, 1.0):
        plain = Sampling(max_new_tokens=12, temperature=heat, seed=3, frequency_penalty=0.5)
        asked = plain.model_copy(update={"logprobs": 5, "prompt_logprobs": 2})
        first, second = (engine.generate([Request("r", prompt(30, 8), s)])[0] for s in (plain, asked))
        assert first.token_ids == second.token_ids
        assert (first.logprobs, first.prompt_logprobs) == ((), None)


def greedy(engine: Engine, **fields: object) -> Completion:
    sampling = Sampling.model_validate({"max_new_tokens": 20, "temperature": 0, **fields})
    return engine.generate([Request("r", prompt(12, 4), sampling)])[0]


def test_a_greedy_repetition_penalty_is_that_of_transformers(engine: Engine, naive: torch.nn.Module) -> None:
    ids = torch.tensor([prompt(12, 4)])
    for penalty in (1.3, 0.8):
        expected = naive.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, repetition_penalty=penalty
        )
        assert list(greedy(engine, repetition_penalty=penalty).token_ids) == expected[0, 12:].tolist()


def test_penalties_and_bias_hold_over_a_whole_request(engine: Engine) -> None:
    assert len(set(greedy(engine, presence_penalty=2, frequency_penalty=2, repetition_penalty=100).token_ids)) == 20
    assert set(greedy(engine, logit_bias={300: 100}).token_ids) == {300}
    free = greedy(engine).token_ids
    assert free[0] not in greedy(engine, logit_bias={free[0]: -100}).token_ids


def test_no_stop_ends_a_request_before_its_least_tokens(engine: Engine) -> None:
    free = greedy(engine)
    stop = free.token_ids[3]
    early = greedy(engine, stop_token_ids=(stop,))
    assert early.finish_reason == "stop"
    late = greedy(engine, stop_token_ids=(stop,), min_tokens=10)
    assert stop not in late.token_ids[:10]
    assert len(late.token_ids) >= 10
    string = free.text[:2]
    assert greedy(engine, stop=(string,)).text == ""
    late = greedy(engine, stop=(string,), min_tokens=15)
    assert late.token_ids[:15] == free.token_ids[:15]
    assert late.text.startswith(string)


@pytest.mark.parametrize("param", ["logit_bias", "stop_token_ids"])
def test_token_ids_the_model_does_not_know_are_refused_by_name(engine: Engine, param: str) -> None:
    value = {512: 1} if param == "logit_bias" else (512,)
    with pytest.raises(RequestError, match="0 to 511") as caught:
        greedy(engine, **{param: value})
    assert caught.value.param == param


def test_a_prompt_may_fill_the_window_if_no_token_is_to_follow(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=0, prompt_logprobs=0)
    (done,) = engine.generate([Request("r", prompt(CONTEXT, 1), sampling)])
    assert (done.token_ids, done.text, done.finish_reason) == ((), "", "length")
    with pytest.raises(RequestError, match=f"at most {CONTEXT}"):
        engine.generate([Request("r", prompt(CONTEXT + 1, 1), sampling)])
