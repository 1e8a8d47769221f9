"""The compiled kernels against torch, whatever the shape, and independent of what stands beside a row."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from actors.engine import kernels
from actors.engine.engine import Engine
from actors.engine.kernels import Kernels, kernels_for
from actors.engine.linear import Activation, LayerNorm, Linear, RmsNorm
from actors.engine.loading import load_engine
from actors.engine.request import Request
from configs.schema.generation import Sampling

CPU = torch.device("cpu")
FP32 = {"dtype": torch.float32, "device": CPU}

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler on this machine"
)


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = kernels_for(torch.float32, CPU)
    assert found is not None
    return found


def linear(outputs: int, inputs: int, *, bias: bool) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    weight = torch.randn(outputs, inputs)
    offset = torch.randn(outputs) if bias else torch.zeros(outputs)
    return Linear.of([(weight, offset if bias else None)], **FP32), weight, offset


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 210), inputs=st.integers(1, 80), outputs=st.integers(1, 150), bias=st.booleans())
def test_products_are_those_of_torch_for_any_shape(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    layer, weight, offset = linear(outputs, inputs, bias=bias)
    x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
    expected = x @ weight.t() + offset
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    total = residual.clone()
    layer.add_to(total, x)
    torch.testing.assert_close(total, residual + expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.rows(torch.arange(outputs).flip(0)), weight.flip(0))


@needs_compiler
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_the_threads() -> None:
    layer, _, _ = linear(1000, 700, bias=True)
    x = torch.randn(130, 700)
    threads = torch.get_num_threads()
    try:
        alone = torch.cat([layer(row[None]) for row in x])
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for size in (2, 3, 17, 130):
                together = torch.cat([layer(part) for part in x.split(size)])
                assert torch.equal(together, alone)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9), kv_heads=st.integers(1, 4), group=st.integers(1, 4), size=st.integers(1, 100),
    width=st.integers(1, 70), biased=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_attention_is_that_of_torch_and_reads_no_more_than_it_is_told(
    count: int, kv_heads: int, group: int, size: int, width: int, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    kernel = kernels_for(torch.float32, CPU)
    assert kernel is not None
    cache = torch.randn(2, 12, kv_heads, width, size)
    lengths, rows = torch.randint(1, width + 1, (count,)), torch.randperm(12)[:count]
    queries = torch.randn(count, kv_heads * group + 3, size)[:, : kv_heads * group]
    bias = torch.randn(kv_heads * group, width) if biased else None
    expected = []
    for query, row, length in zip(queries, rows.tolist(), lengths.tolist(), strict=True):
        keys, values = cache[:, row, :, :length].repeat_interleave(group, dim=1)
        scores = 0.3 * (query[:, None] @ keys.transpose(1, 2))
        if bias is not None:
            scores += bias[:, None, :length].flip(-1)
        expected.append((scores.softmax(-1) @ values).flatten())
        cache[:, row, :, length:] = torch.nan
    longest = int(lengths.max())
    got = kernel.attend(queries, *cache[..., :longest, :], rows, lengths, longest, scale=0.3, bias_HL=bias)
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-4)


@needs_compiler
def test_a_key_that_is_no_number_shows_in_what_attends_to_it(compiled: Kernels) -> None:
    cache = torch.randn(2, 2, 1, 8, 16)
    cache[0, 0, 0, 3] = torch.nan
    got = compiled.attend(torch.randn(2, 1, 16), *cache, torch.tensor([0, 1]), torch.tensor([8, 8]), 8)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@needs_compiler
def test_norms_are_those_of_torch() -> None:
    for size in (1, 7, 8, 100):
        x, weight, bias = torch.randn(5, size), torch.randn(size), torch.randn(size)
        expected = torch.nn.functional.rms_norm(x, (size,), weight, 1e-5)
        torch.testing.assert_close(RmsNorm(weight, 1e-5)(x), expected)
        expected = torch.nn.functional.layer_norm(3 + x, (size,), weight, bias, 1e-5)
        torch.testing.assert_close(LayerNorm(weight, bias, 1e-5)(3 + x), expected, atol=1e-5, rtol=1e-5)
    x[1, 50] = torch.nan
    normed = LayerNorm(weight, bias, 1e-5)(x)
    assert normed[1].isnan().all()
    assert normed[[0, 2, 3, 4]].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "relu"])
def test_activations_are_those_of_transformers_for_numbers_of_any_size(name: str, gated: bool) -> None:
    activation = Activation(name, gated=gated, **FP32)
    sizes = torch.logspace(-8, 38, 2000)
    for size in (1, 8, 13, 4000):
        x = torch.cat([sizes, -sizes])[torch.randperm(4000)][:size].repeat(3, 1)
        up = torch.rand(3, size)
        expected = ACT2FN[name](x) * (up if gated else 1)
        found = activation(torch.cat([x, up], dim=1) if gated else x)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-6)
    unusable = torch.tensor([[torch.nan, 1.0], [2.0, 3.0]])
    assert activation(unusable).isnan().tolist()[1] == [False] * (1 if gated else 2)
    assert activation(unusable)[0, 0].isnan()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_torch_computes_the_same_and_a_log_line_says_so(
    make_model, make_seq2seq, compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folders = (make_model(), make_seq2seq("t5"), make_seq2seq("bart"))
    asked = [Request(str(n), tuple(range(5, 9 + 5 * n)), Sampling(max_new_tokens=20, temperature=0)) for n in range(4)]
    expected = [load_engine(folder, precision="fp32", device="cpu").generate(asked) for folder in folders]
    monkeypatch.setenv("CC", compiler)
    kernels._compiled.cache_clear()
    try:
        for folder, wanted in zip(folders, expected, strict=True):
            engine = load_engine(folder, precision="fp32", device="cpu")
            assert engine.kernels == "torch"
            assert engine.generate(asked) == wanted
    finally:
        kernels._compiled.cache_clear()
    (line,) = [message for message in caplog.messages if "run on torch alone" in message]
    assert line.startswith(compiler)


@pytest.fixture
def counted_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Says how often libraries were linked since; they are kept below `tmp_path`."""
    calls, script = tmp_path / "calls", tmp_path / "cc"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("cc") or shutil.which("gcc")} "$@"\n')
    script.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(kernels, "_KEPT", tmp_path / "kept")
    kernels._compiled.cache_clear()
    yield lambda: sum("-shared" in line for line in calls.read_text().splitlines())
    kernels._compiled.cache_clear()


def compiled_anew() -> bool:
    kernels._compiled.cache_clear()
    return kernels._compiled() is not None


@needs_compiler
def test_a_compiled_library_is_kept_for_later_processes_and_made_again_if_damaged(
    tmp_path: Path, counted_compiler: Callable[[], int]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    damaged = kept / f"kernels-{kernels._identity(str(tmp_path / 'cc'))}.so"
    damaged.write_bytes(b"no library")
    assert compiled_anew()
    assert counted_compiler() == 1
    assert compiled_anew()
    assert counted_compiler() == 1
    assert list(kept.iterdir()) == [damaged]


@needs_compiler
def test_where_nothing_can_be_kept_each_process_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted_compiler: Callable[[], int]
) -> None:
    monkeypatch.setattr(kernels, "_KEPT", Path("/proc/kept"))
    assert compiled_anew()
    assert compiled_anew()
    assert counted_compiler() == 2


@needs_compiler
def test_an_engine_says_what_its_products_run_on(make_model) -> None:
    assert Engine.load(make_model(), precision="fp32", device="cpu").kernels == "compiled"
    assert Engine.load(make_model(), precision="bf16", device="cpu").kernels == "torch"
