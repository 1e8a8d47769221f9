import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import EncodeRequest
from benchmarks import engine_models
from benchmarks.engine import _page
from benchmarks.engine_decoding import MEASURES, decoding
from benchmarks.engine_encoders import _sorted_batches
from benchmarks.engine_gguf import write_gguf
from benchmarks.engine_models import model_folder, texts


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(engine_models.MODELS, "tiny", lambda: engine_models._llama(32, 1, 2, 48, engine_models.VOCAB))
    return model_folder("tiny", tmp_path)


@pytest.mark.slow
def test_every_contestant_answers(llama: Path, tmp_path: Path) -> None:
    part = decoding(llama, tmp_path, precision="fp32", concurrency=[1], runs=1, llama_bench=None, measures=MEASURES)
    assert part["rows_equal_to_generate"] == {"1": 1.0}
    assert 0 < part["own_share_of_a_step"] < 1
    assert set(part["prefill_delay_in_steps"]) == {"1"}
    rates = part["output_tokens_per_second"]
    assert all(rates[who]["1"] > 0 for who in ("engine", "generate", "continuous batching"))
    json.dumps(part)


def test_the_page_has_rates_ratios_and_bounds() -> None:
    trace = {"output_tokens_per_second": 70.0, "median_seconds": 1.5, "p95_seconds": 9.0}
    decoder = {
        "parameters": 17_000_000, "dtype": "float32", "rows_equal_to_generate": {"1": 1.0, "32": 0.5},
        "output_tokens_per_second": {"engine": {"1": 250.0, "32": 900.0}, "generate": {"1": 100.0, "32": 1000.0}},
        "prefill_tokens_per_second": {"engine": 80.0, "plain batched forward": 100.0}, "own_share_of_a_step": 0.07,
        "prefill_delay_in_steps": {"1": 1.44, "8": 2.0},
        "trace": {"engine": trace},
        "roofline": {"gigabytes_per_second": 17.0, "gigaflops": 90.0, "tokens_per_second_at_1": 500.0,
                     "tokens_per_second_at_32": 3000.0},
    }  # fmt: skip
    sources = {"output_tokens_per_second": {"engine": 30.0, "generate": 10.0}, "rows_equal_to_generate": 0.5}
    reads = {"texts_per_second": {"engine": 8.0, "length-sorted batches": 10.0}, "texts": 5}
    page = _page({
        "date": "today", "command": "python -m benchmarks.engine", "versions": {"torch": "2"}, "runs": 1,
        "machine": {"processor": "p", "cores": 2, "threads": 2, "memory_gb": 8, "load_before": 0.1, "python": "3"},
        "parts": {"17m": decoder, "t5": sources, "classifier": reads},
    })  # fmt: skip
    assert "| generate (engine's speed against it) | 100 (2.50x) | 1000 (0.90x) |" in page
    assert "50% of 500 tokens/s at 1, 30% of 3000 tokens/s at 32" in page
    assert "0.80 of a plain batched forward pass" in page
    assert "7.0% is not the model's" in page
    assert "delays those that decode: 1.4 beside 1, 2.0 beside 8" in page
    assert "| engine | 70 | 1.5 | 9.0 |" in page
    assert "| generate | 10.0 | 3.00x |" in page
    assert "50% of the rows equal" in page
    assert "| length-sorted batches | 10.0 | 0.80x |" in page


def test_a_gguf_file_holds_the_weights_as_llama_cpp_orders_them(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(llama, path, torch.float32)
    data = path.read_bytes()
    assert data[:4] == b"GGUF"
    _, tensors, _ = struct.unpack_from("<IQQ", data, 4)
    weights = load_file(llama / "model.safetensors")
    assert tensors == len(weights)
    sizes = [-(-tensor.nbytes // 32) * 32 for tensor in weights.values()]
    start = len(data) - sum(sizes)
    assert start % 32 == 0
    names = [n for n, name in enumerate(weights) if name.endswith("self_attn.q_proj.weight")]
    query = torch.frombuffer(bytearray(data[start + sum(sizes[: names[0]]) :]), dtype=torch.float32)[: 32 * 32]
    expected = weights["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(query.view(32, 32)[:4], expected[[0, 8, 1, 9]])


def test_the_loop_and_the_engine_classify_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(vocab_size=engine_models.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=48)  # fmt: skip
    monkeypatch.setitem(engine_models.MODELS, "tiny", lambda: BertForSequenceClassification(config))
    folder = model_folder("tiny", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    lines = texts(6)
    expected = _sorted_batches(model, AutoTokenizer.from_pretrained(folder), lines, "classify")
    engine = EncoderEngine.load(folder, precision="fp32", device="cpu")
    events = engine.encode([EncodeRequest(str(n), line, "classify") for n, line in enumerate(lines)])
    for event, row in zip(events, expected, strict=True):
        assert list(event.encoding.scores.values()) == pytest.approx(row, abs=1e-4)
