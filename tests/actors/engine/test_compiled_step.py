"""The lean decoder's step as one compiled call: the same logits to the last bit, whatever a token shares it with."""

import shutil
from itertools import pairwise

import pytest
import torch

from actors.engine import kernels
from actors.engine.decoder import LeanDecoder
from actors.engine.scheduler import Span

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)
CPU = torch.device("cpu")
TOKENS = [(11 * n + n * n) % 300 for n in range(70)]
SHAPES = {
    "llama": {},
    "grouped heads": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "hidden_size": 60},
    "untied": {"tie_word_embeddings": False, "intermediate_size": 130},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
}


def run(decoder: LeanDecoder, cuts: tuple[int, ...], *, others: int = 0) -> torch.Tensor:
    """Logits of all tokens, run in pieces, beside single tokens of other sequences in the rows before."""
    cache = decoder.new_cache(8 * 80)
    cache.arrange(rows=8, width=80)
    found = []
    for step, (start, stop) in enumerate(pairwise(cuts)):
        beside = [Span(row, step, [7 + row + step]) for row in range(others)]
        spans = [*beside, Span(others, start, TOKENS[start:stop])]
        found.append(decoder.run(spans, cache, range(others, others + stop - start)))
    return torch.cat(found)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_same_to_the_last_bit_however_a_sequence_is_run(make_model, name: str, int8: bool) -> None:
    decoder = LeanDecoder.load(make_model(**SHAPES[name]), dtype=torch.float32, device=CPU, int8=int8)
    whole = run(decoder, (0, len(TOKENS)))
    assert torch.equal(run(decoder, tuple(range(len(TOKENS) + 1))), whole)
    assert torch.equal(run(decoder, (0, 1, 18, 19, 37, 70), others=5), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(decoder, (0, 40, 70), others=2), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_torch(make_model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(**SHAPES[name])
    cuts = (0, 33, 34, 70)
    found = run(LeanDecoder.load(folder, dtype=torch.float32, device=CPU), cuts, others=3)
    monkeypatch.setenv("CC", "/nowhere/cc")
    kernels._compiled.cache_clear()
    try:
        expected = run(LeanDecoder.load(folder, dtype=torch.float32, device=CPU), cuts, others=3)
    finally:
        kernels._compiled.cache_clear()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_only_the_logits_that_are_wanted_are_computed_in_their_order(make_model) -> None:
    decoder = LeanDecoder.load(make_model(), dtype=torch.float32, device=CPU)
    cache = decoder.new_cache(80)
    whole = decoder.run([Span(0, 0, TOKENS)], cache, range(70))
    assert torch.equal(decoder.run([Span(0, 0, TOKENS)], cache, [69, 3, 12]), whole[[69, 3, 12]])
    assert decoder.run([Span(0, 0, TOKENS)], cache, []).shape == (0, whole.shape[1])
