"""Encoder-decoders against `generate`, encoders against a `pipeline` and a length-sorted batch loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import EncodeRequest, Task
from actors.engine.pretrained import Precision, placement
from actors.engine.request import Request
from actors.engine.seq2seq import Seq2SeqEngine
from benchmarks.engine_decoding import NEW, PROMPT, timed
from benchmarks.engine_models import prompts, texts
from configs.schema.generation import Sampling

SOURCES = 16
_BATCH = 32
_TASKS: dict[str, tuple[Task, str, Any]] = {
    "classifier": ("classify", "text-classification", AutoModelForSequenceClassification),
    "embedder": ("embed", "feature-extraction", AutoModel),
}


def seq2seq(folder: Path, *, precision: Precision, runs: int) -> dict[str, Any]:
    """Output tokens/s for 16 sources at once, and whether the tokens are those of `generate`."""
    dtype, _ = placement(precision, "cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    engine = Seq2SeqEngine.load(folder, max_sequences=SOURCES, precision=precision, device="cpu")
    sources = prompts(SOURCES, PROMPT, seed=3)
    sampling = Sampling(max_new_tokens=NEW, temperature=0)
    asked = [Request(str(n), tuple(ids), sampling) for n, ids in enumerate(sources)]
    ids = torch.tensor(sources)

    def theirs(_: int) -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, num_beams=1
            )
        return out[:, 1:].tolist()

    ours_seconds, ours = timed(lambda _: [list(one.token_ids) for one in engine.generate(asked)], runs)
    their_seconds, expected = timed(theirs, runs)
    tokens = SOURCES * NEW
    return {
        "output_tokens_per_second": {"engine": tokens / ours_seconds, "generate": tokens / their_seconds},
        "rows_equal_to_generate": sum(a == b for a, b in zip(ours, expected, strict=True)) / SOURCES,
    }


def encoder(name: str, folder: Path, *, precision: Precision, runs: int, count: int) -> dict[str, Any]:
    """Texts/s of the engine, a pipeline that gets one text after the other, and batches sorted by length."""
    task, pipeline_task, auto_class = _TASKS[name]
    dtype, _ = placement(precision, "cpu")
    model = auto_class.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = texts(count, seed=4)
    engine = EncoderEngine.load(folder, precision=precision, device="cpu")
    asked = [EncodeRequest(str(n), line, task, truncate=True) for n, line in enumerate(lines)]
    one_by_one = pipeline(pipeline_task, model=model, tokenizer=tokenizer, device="cpu", truncation=True)
    rates = {
        "engine": lambda _: engine.encode(asked),
        "pipeline, one text after the other": lambda _: [one_by_one(line) for line in lines],
        "length-sorted batches": lambda _: _sorted_batches(model, tokenizer, lines, task),
    }
    return {"texts_per_second": {who: count / timed(run, runs)[0] for who, run in rates.items()}, "texts": count}


@torch.inference_mode()
def _sorted_batches(model: Any, tokenizer: Any, lines: Sequence[str], task: Task) -> list[list[float]]:
    """What a careful user writes: tokenize, sort by length, pad batches of 32, put the results back in order."""
    order = sorted(range(len(lines)), key=lambda n: len(lines[n]))
    results: list[list[float]] = [[] for _ in lines]
    for first in range(0, len(order), _BATCH):
        part = order[first : first + _BATCH]
        batch = tokenizer(
            [lines[n] for n in part], padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False
        )
        output = model(**batch)
        if task == "classify":
            rows = output.logits.softmax(-1)
        else:
            mask = batch["attention_mask"][..., None]
            rows = torch.nn.functional.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
        for n, row in zip(part, rows.tolist(), strict=True):
            results[n] = row
    return results
