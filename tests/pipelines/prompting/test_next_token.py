"""What is shown of the next token is what the engine does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.engine.engine import Engine
from actors.engine.request import Request
from actors.engine.sampling import Row, sample
from configs.errors import EngineError, RequestError
from configs.schema.generation import Sampling
from pipelines.prompting.next_token import NextToken, next_token, prompt_logits, token_text
from pipelines.prompting.pictures import next_token_picture
from tests.actors.conftest import MakeModel

PROMPT = "def loads(s, *, cls=None"
VIEWS = {
    "the model": Sampling(),
    "hot": Sampling(temperature=2.0),
    "together": Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
    "greedy": Sampling(temperature=0),
}


@pytest.fixture(scope="module")
def engine(make_model: MakeModel) -> Engine:
    return Engine.load(make_model(), max_sequences=8)


@pytest.fixture(scope="module")
def shown(make_model: MakeModel, engine: Engine) -> NextToken:
    ids = engine.text.encode(PROMPT)
    return next_token(prompt_logits(make_model(), ids), ids, engine.text, VIEWS, shown=512)


@pytest.mark.parametrize("view", VIEWS)
def test_the_seeds_draw_what_the_engine_generates_with_them(engine: Engine, shown: NextToken, view: str) -> None:
    ids = tuple(engine.text.encode(PROMPT))
    requests = [
        Request(str(seed), ids, VIEWS[view].model_copy(update={"seed": seed, "max_new_tokens": 1})) for seed in range(5)
    ]
    generated = [token_text(engine.text, done.token_ids[0]) for done in engine.generate(requests)]
    assert list(shown.views[view].drawn) == generated


def test_the_models_own_column_is_the_engines_log_probability(engine: Engine, shown: NextToken) -> None:
    request = Request("p", tuple(engine.text.encode(PROMPT)), Sampling(temperature=0, max_new_tokens=1, logprobs=20))
    (done,) = engine.generate([request])
    for token, logprob in done.logprobs[0].top:
        (candidate,) = [c for c in shown.candidates if c.id == token]
        assert math.log(candidate.probabilities["the model"]) == pytest.approx(logprob, abs=1e-4)


def test_tokens_are_drawn_as_often_as_is_shown_and_no_others(make_model: MakeModel, shown: NextToken, engine: Engine):
    ids = engine.text.encode(PROMPT)
    logits, draws = prompt_logits(make_model(), ids), 8000
    rows = [Row(VIEWS["together"].model_copy(update={"seed": seed}), ids, len(ids)) for seed in range(draws)]
    drawn = torch.bincount(torch.tensor(sample(logits.repeat(draws, 1), rows)), minlength=512) / draws
    expected = torch.zeros(512)
    for candidate in shown.candidates:
        expected[candidate.id] = candidate.probabilities["together"]
    assert (drawn[expected == 0] == 0).all()
    # Four standard deviations of a share of 8000 draws.
    assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_controls_narrow_and_temperature_flattens(shown: NextToken) -> None:
    views = shown.views
    assert views["greedy"].tokens_kept == 1
    assert views["greedy"].entropy_bits == 0
    assert 1 < views["together"].tokens_kept <= 20
    assert views["hot"].entropy_bits > views["the model"].entropy_bits > views["together"].entropy_bits
    for name in views:
        assert sum(c.probabilities[name] for c in shown.candidates) == pytest.approx(1)


def test_the_picture_is_a_png_and_the_same_every_time(shown: NextToken) -> None:
    few = shown.model_copy(update={"candidates": shown.candidates[:5]})
    drawn = next_token_picture(few)
    assert drawn.startswith(b"\x89PNG")
    assert drawn == next_token_picture(few)


def test_a_prompt_that_does_not_fit_is_refused(make_model: MakeModel) -> None:
    for ids in ([], [5] * 96):
        with pytest.raises(RequestError, match="no room"):
            prompt_logits(make_model(), ids)


def test_logits_that_are_no_numbers_are_an_error(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not finite"):
        next_token(torch.full((512,), math.nan), [1], engine.text, VIEWS, shown=3)
