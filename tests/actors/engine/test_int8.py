"""Weights rounded to int8: what it costs in quality, and who can have them."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine.engine import Engine
from actors.engine.linear import Linear
from actors.engine.loading import load_engine
from actors.engine.request import Request
from configs.errors import ArtifactError
from configs.schema.generation import Sampling

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)
FP32 = {"dtype": torch.float32, "device": torch.device("cpu")}
VOCAB = 200


def sentences(count: int, seed: int) -> torch.Tensor:
    """Walks over a random graph in which each token has four followers, of unlike likelihood."""
    followers = torch.randint(VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, 33, dtype=torch.long)
    rows[:, 0] = torch.randint(VOCAB, (count,), generator=draw)
    steps = torch.multinomial(torch.tensor([0.6, 0.2, 0.15, 0.05]), count * 32, True, generator=draw).view(count, 32)
    for position in range(32):
        rows[:, position + 1] = followers[rows[:, position], steps[:, position]]
    return rows


@pytest.fixture(scope="module")
def trained(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned what follows what."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(make_model(), folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(200):
        rows = sentences(32, seed=1 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_products_are_those_of_the_rounded_weights_and_rows_are_independent() -> None:
    weight, bias, x = torch.randn(100, 300), torch.randn(100), torch.randn(130, 300)
    weight[7] = 0
    layer = Linear.of([(weight, bias)], int8=True, **FP32)
    rounded = layer.rows(torch.arange(100))
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= steps * 0.5001).all()
    torch.testing.assert_close(layer(x), x @ rounded.t() + bias, atol=1e-4, rtol=1e-4)
    total = torch.ones(130, 100)
    layer.add_to(total, x)
    torch.testing.assert_close(total, 1 + x @ rounded.t() + bias, atol=1e-4, rtol=1e-4)
    alone = torch.cat([layer(row[None]) for row in x])
    for size in (2, 3, 17, 130):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), alone)


def test_a_trained_model_loses_less_than_half_a_percent_of_perplexity(trained: Path) -> None:
    rows = sentences(64, seed=999)
    exact, rounded = (
        Engine.load(trained, precision=precision, device="cpu").score(rows).double().mean()
        for precision in ("fp32", "int8")
    )
    assert exact < 0.5 * math.log(VOCAB)
    assert exact != rounded
    assert abs(math.expm1(rounded - exact)) < 0.005


def test_tokens_do_not_depend_on_what_a_request_is_batched_with(trained: Path) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=0.8, seed=5)
    asked = [Request(str(n), tuple(range(3 + n, 9 + 3 * n)), sampling) for n in range(6)]
    together = Engine.load(trained, precision="int8", device="cpu").generate(asked)
    for request, expected in zip(asked, together, strict=True):
        assert Engine.load(trained, precision="int8", device="cpu").generate([request]) == [expected]


def test_models_that_cannot_have_int8_weights_are_refused(make_model, make_seq2seq, make_encoder) -> None:
    for folder, reason in ((make_seq2seq("t5"), "an encoder-decoder"), (make_encoder("bert"), "an encoder")):
        with pytest.raises(ArtifactError, match=f"int8 weights; received .{reason}"):
            load_engine(folder, precision="int8", device="cpu")
    with pytest.raises(ArtifactError, match="its own modules: asked for"):
        Engine.load(make_model(), precision="int8", decoder="modules", device="cpu")
