"""What the device has no memory for ends alone, in every runner; what fits in parts is run in parts."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, T5Config, T5ForConditionalGeneration

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import EncodeRequest
from actors.engine.request import Request
from actors.engine.seq2seq import Seq2SeqEngine
from actors.engine.shortage import in_parts
from configs.errors import EngineError
from configs.schema.generation import Sampling

GREEDY = Sampling(max_new_tokens=9, temperature=0)


def test_work_is_halved_until_it_fits_and_other_errors_are_no_shortage() -> None:
    tried: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        tried.append(len(items))
        if sum(items) > 10:
            raise MemoryError
        return list(items)

    assert in_parts(run, [4, 5, 6, 20, 1], lambda item, message: [-item]) == [4, 5, 6, -20, 1]
    assert tried == [5, 2, 3, 1, 2, 1, 1]

    def broken(items: Sequence[int]) -> list[int]:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        in_parts(broken, [1, 2], lambda item, message: [])


def short_for(token: int) -> Any:
    """Stands for a device that has no memory for any input with this token."""

    def check(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if bool((kwargs["input_ids"] == token).any()):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    return check


def test_a_source_that_the_memory_cannot_hold_fails_alone(make_seq2seq) -> None:
    engine = Seq2SeqEngine.load(make_seq2seq("bart"), max_sequences=4, precision="fp32", device="cpu")
    asked = [Request(str(n), (*range(5, 30), 400 + n), GREEDY) for n in range(7)]
    alone = [engine.generate([one])[0] for one in asked]
    hook = engine._encoder.register_forward_pre_hook(short_for(402), with_kwargs=True)
    got = engine.generate(asked)
    assert [got[n] for n in (0, 1, 3, 4, 5, 6)] == [alone[n] for n in (0, 1, 3, 4, 5, 6)]
    assert isinstance(got[2].error, EngineError)
    assert "26 tokens" in str(got[2].error)
    assert got[2].prompt_tokens == 26
    hook.remove()
    assert engine.generate(asked) == alone


def test_a_target_that_the_memory_cannot_hold_fails_alone(make_seq2seq) -> None:
    engine = Seq2SeqEngine.load(make_seq2seq("t5"), max_sequences=4, precision="fp32", device="cpu")
    asked = [Request(str(n), (*range(5, 30), 400 + n), GREEDY) for n in range(6)]
    alone = [engine.generate([one])[0] for one in asked]
    forward = engine._decoder.forward

    def short_of_memory(spans: Any, sources: Any, *caches: Any) -> torch.Tensor:
        if any(402 in source.tokens and span.stop > 4 for span, source in zip(spans, sources, strict=True)):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return forward(spans, sources, *caches)

    engine._decoder.forward = short_of_memory  # stands for the device
    got = engine.generate(asked)
    assert [got[n] for n in (0, 1, 3, 4, 5)] == [alone[n] for n in (0, 1, 3, 4, 5)]
    assert got[2].finish_reason == "error"
    assert got[2].token_ids == alone[2].token_ids[:4]
    assert "2 GiB" in str(got[2].error)
    engine._decoder.forward = forward
    assert engine.generate(asked) == alone


def test_a_text_that_the_memory_cannot_hold_fails_alone(make_encoder) -> None:
    engine = EncoderEngine.load(make_encoder("bert"), precision="fp32", device="cpu")
    asked = [EncodeRequest(str(n), text, "embed") for n, text in enumerate(["it rained", "in paris", "a", "b c d"] * 3)]
    alone = [engine.encode([one])[0] for one in asked]
    poisoned = engine.text.encode_input("paris").token_ids[1]
    engine._model.register_forward_pre_hook(short_for(poisoned), with_kwargs=True)
    for n, (event, expected) in enumerate(zip(engine.encode(asked), alone, strict=True)):
        if n % 4 == 1:
            assert event.finish_reason == "error"
            assert "2 GiB" in str(event.error)
        else:
            assert event.encoding.vector == pytest.approx(expected.encoding.vector, abs=1e-4)
    assert not engine.has_work


_LIMITED = """
import resource, sys
from pathlib import Path
from actors.engine.encodings import EncodeRequest
from actors.engine.loading import load_engine, runner_kind
from actors.engine.request import Request
from configs.schema.generation import Sampling

folder = Path(sys.argv[1])
engine = load_engine(folder, batch_tokens=2000, precision="fp32", device="cpu")
if runner_kind(folder) == "encoder":
    ask = lambda name, length: EncodeRequest(name, "a " * (length - 2), "embed")
    run = engine.encode
else:
    ask = lambda name, length: Request(name, (5,) * length, Sampling(max_new_tokens=3, temperature=0))
    run = engine.generate
run([ask("warm", 20)])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), used + (150 << 20)))
for one in run([ask(str(n), 900 if n == 3 else 200) for n in range(9)]):
    print("error" if one.error is not None else "done")
print(engine.has_work)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
def test_a_process_short_of_memory_runs_what_fits(kind: str, make_encoder, make_seq2seq, tmp_path: Path) -> None:
    """A projection and its activation take 108 MB each for 900 tokens, 24 for 200; 150 MB are given."""
    torch.manual_seed(0)
    if kind == "encoder":
        source, vocab = make_encoder("bert"), 320
        model = AutoModel.from_config(BertConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=30_000, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=1024))  # fmt: skip
    else:
        source = make_seq2seq("t5")
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=512, d_model=32, d_kv=8, d_ff=30_000, num_layers=1, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=None, n_positions=1024))  # fmt: skip
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert ran.stdout.split() == ["done"] * 3 + ["error"] + ["done"] * 5 + ["False"]
