"""Decoder-only models: the engine, `transformers` and llama.cpp on the same weights, prompts and cores."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from actors.engine.engine import Engine
from actors.engine.kernels import kernels_kind
from actors.engine.pretrained import Precision, placement
from actors.engine.request import Request
from benchmarks.engine_gguf import write_gguf
from benchmarks.engine_models import prompts
from configs.schema.generation import Sampling

PROMPT, NEW = 72, 64
CONCURRENCY = (1, 8, 32)
REQUESTS = {1: 2, 8: 16, 32: 32}
"""Of a closed loop, by concurrency: a request that ends is followed by the next one."""
MEASURES = ("rates", "steps", "trace")
_PREFILL = (16, 256)
"""Prompts and their length for the speed of prefill."""
_INT8 = "engine, int8 weights"

Run = Callable[[int], Any]


def timed(run: Run, runs: int) -> tuple[float, Any]:
    """Median seconds of runs 1 to `runs`, after run 0, which does not count, and the last one's result."""
    result = run(0)
    seconds = []
    for number in range(1, runs + 1):
        start = time.perf_counter()
        result = run(number)
        seconds.append(time.perf_counter() - start)
    return median(seconds), result


def decoding(
    folder: Path,
    work: Path,
    *,
    precision: Precision,
    concurrency: Sequence[int],
    runs: int,
    llama_bench: str | None,
    measures: Collection[str],
) -> dict[str, Any]:
    """Output tokens/s of everyone at each concurrency with the roofline, what steps are made of, and the trace."""
    dtype, _ = placement(precision, "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    weights = sum(p.numel() for p in model.parameters())
    part: dict[str, Any] = {"parameters": weights, "dtype": str(dtype).removeprefix("torch.")}
    if "rates" in measures:
        part |= _rates(folder, model, precision, concurrency, runs)
        if llama_bench is not None:
            rates = part["output_tokens_per_second"]
            rates["llama.cpp"] = _llama_cpp(llama_bench, folder, work, dtype, concurrency, runs)
            if _INT8 in rates:
                rates["llama.cpp, Q8_0"] = _llama_cpp(llama_bench, folder, work, torch.int8, concurrency, runs)
        part["roofline"] = _roofline(weights, dtype)
    if "steps" in measures:
        part |= {
            "prefill_tokens_per_second": _prefill(folder, model, precision, runs),
            "prefill_delay_in_steps": {
                str(n): _delay(folder, precision, n) for n in concurrency if n < CONCURRENCY[-1]
            },
            "own_share_of_a_step": _own_share(folder, precision, max(concurrency)),
        }
    if "trace" in measures:
        part["trace"] = _trace(folder, model, precision)
    return part


def _rates(
    folder: Path, model: Any, precision: Precision, concurrency: Sequence[int], runs: int
) -> dict[str, dict[str, Any]]:
    rates: dict[str, dict[str, float]] = {"engine": {}, "generate": {}, "continuous batching": {}}
    int8 = model.dtype == torch.float32 and kernels_kind(model.dtype, torch.device("cpu")) == "compiled"
    if int8:
        rates[_INT8] = {}
    same: dict[str, float] = {}
    for count in concurrency:
        # New prompts for each run: the engine would find those of an earlier one in its cache.
        asked = [prompts(REQUESTS[count], PROMPT, seed=100 * count + number) for number in range(runs + 1)]
        engine = Engine.load(folder, max_sequences=count, precision=precision, device="cpu")
        contestants: dict[str, Run] = {
            "engine": lambda n, engine=engine, asked=asked: _engine(engine, asked[n]),
            "generate": lambda n, asked=asked, count=count: _padded(model, asked[n], count),
        }
        tokens: dict[str, list[list[int]]] = {}
        for name, run in contestants.items():
            seconds, tokens[name] = timed(run, runs)
            rates[name][str(count)] = REQUESTS[count] * NEW / seconds
        with _continuous(model, count) as manager:
            seconds, _ = timed(lambda n, manager=manager, asked=asked: _answers(manager, asked[n]), runs)
        rates["continuous batching"][str(count)] = REQUESTS[count] * NEW / seconds
        if int8:
            rounded = Engine.load(folder, max_sequences=count, precision="int8", device="cpu")
            seconds, _ = timed(lambda n, rounded=rounded, asked=asked: _engine(rounded, asked[n]), runs)
            rates[_INT8][str(count)] = REQUESTS[count] * NEW / seconds
        pairs = zip(tokens["engine"], tokens["generate"], strict=True)
        same[str(count)] = sum(mine == theirs for mine, theirs in pairs) / REQUESTS[count]
    return {"output_tokens_per_second": rates, "rows_equal_to_generate": same}


def _greedy(ids: Sequence[int], name: int, new: int = NEW) -> Request:
    return Request(str(name), tuple(ids), Sampling(max_new_tokens=new, temperature=0))


def _engine(engine: Engine, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    done = engine.generate([_greedy(ids, name) for name, ids in enumerate(asked)])
    return [list(one.token_ids) for one in done]


@torch.inference_mode()
def _padded(model: Any, asked: Sequence[Sequence[int]], count: int, new: int = NEW) -> list[list[int]]:
    """Batches of `count`, padded on the left, each run until its last sequence has ended."""
    tokens: list[list[int]] = []
    for first in range(0, len(asked), count):
        part = asked[first : first + count]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in part])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        tokens += out[:, longest:].tolist()
    return tokens


def _continuous(model: Any, count: int) -> Any:
    """`transformers`' continuous batching with the settings that were fastest on a CPU; a context with its manager.

    Its start and its end, seconds in all, are not timed.
    """
    return model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=256, max_requests_per_batch=count
        ),
        timeout=30,
    )


def _answers(manager: Any, asked: Sequence[list[int]]) -> list[list[int]]:
    """What `generate_batch` does with its manager."""
    names = manager.add_requests(inputs=list(asked), max_new_tokens=NEW)
    done: dict[str, list[int]] = {}
    while len(done) < len(names):
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching has ended before its requests")
        if result is not None and result.is_finished():
            done[result.request_id] = result.generated_tokens
    return [done[name] for name in names]


def _llama_cpp(
    binary: str, folder: Path, work: Path, dtype: torch.dtype, concurrency: Sequence[int], runs: int
) -> dict[str, float]:
    """llama.cpp's batched bench: output tokens over the median time of prompts and output together."""
    path = work / f"{folder.name}-{dtype}.gguf"
    write_gguf(folder, path, dtype)
    levels = ",".join(map(str, concurrency))
    size = max(concurrency) * 256
    command = [binary, "-m", path, "-c", size, "-b", 2048, "-ub", 512, "-npp", PROMPT, "-ntg", NEW, "-npl", levels,
               "-t", torch.get_num_threads(), "--output-format", "jsonl"]  # fmt: skip
    seconds: dict[int, list[float]] = {}
    for _ in range(runs):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")):
            seconds.setdefault(row["pl"], []).append(row["t"])
    return {str(count): count * NEW / median(times) for count, times in seconds.items()}


def _prefill(folder: Path, model: Any, precision: Precision, runs: int) -> dict[str, float]:
    count, length = _PREFILL
    asked = [prompts(count, length, seed=100 + number) for number in range(runs + 1)]
    engine = Engine.load(folder, max_sequences=count, precision=precision, device="cpu")
    ours, _ = timed(lambda n: engine.generate([_greedy(ids, name, new=1) for name, ids in enumerate(asked[n])]), runs)
    with torch.inference_mode():
        plain, _ = timed(lambda n: model(torch.tensor(asked[n]), use_cache=False, logits_to_keep=1), runs)
    return {"engine": count * length / ours, "plain batched forward": count * length / plain}


def _delay(folder: Path, precision: Precision, count: int) -> float:
    """By how many steps' time a prompt of 500 tokens makes a step of `count` decoding requests longer."""
    engine = Engine.load(folder, max_sequences=count + 1, precision=precision, device="cpu")
    for name, ids in enumerate(prompts(count, PROMPT, seed=9)):
        engine.submit(_greedy(ids, name, new=300))
    while engine._scheduler.waiting or any(s.completion_tokens < 1 for s in engine._scheduler.running):
        engine.step()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(60):
        if number == 30:
            engine.submit(_greedy(prompts(1, 500, seed=10)[0], count, new=1))
        start, before = time.perf_counter(), engine.tokens_run
        engine.step()
        seconds[engine.tokens_run - before > count].append(time.perf_counter() - start)
    return median(seconds[True]) / median(seconds[False]) - 1


def _own_share(folder: Path, precision: Precision, count: int) -> float:
    """What of the time of decoding steps is not the model's: scheduling, sampling, events."""
    engine = Engine.load(folder, max_sequences=count, precision=precision, device="cpu")
    inner, model_seconds = engine._decoder.run, 0.0

    def run(*args: Any) -> torch.Tensor:
        nonlocal model_seconds
        start = time.perf_counter()
        logits = inner(*args)
        model_seconds += time.perf_counter() - start
        return logits

    engine._decoder.run = run  # type: ignore[method-assign]
    for name, ids in enumerate(prompts(count, PROMPT, seed=8)):
        engine.submit(_greedy(ids, name, new=60))
    while engine._scheduler.waiting or any(s.completion_tokens < 1 for s in engine._scheduler.running):
        engine.step()
    model_seconds = 0.0
    start = time.perf_counter()
    for _ in range(40):
        engine.step()
    return 1 - model_seconds / (time.perf_counter() - start)


def _trace(folder: Path, model: Any, precision: Precision) -> dict[str, dict[str, float]]:
    """Requests of mixed lengths that arrive at random, faster than they can be served.

    Padded `generate` takes whatever waits, 32 at most, and runs it until the longest has ended.
    """
    draw = random.Random(5)
    lengths = [draw.choice([16, 40, 72, 200]) for _ in range(32)]
    asked = [prompts(1, length, seed=n)[0] for n, length in enumerate(lengths)]
    new = [draw.choice([8, 32, 64, 128]) for _ in asked]
    clock, arrivals = 0.0, []
    for _ in asked:
        clock += draw.expovariate(20.0)
        arrivals.append(clock)
    return {
        "engine": _summary(_trace_engine(folder, precision, asked, new, arrivals), new, arrivals),
        "generate": _summary(_trace_padded(model, asked, new, arrivals), new, arrivals),
    }


def _trace_engine(
    folder: Path, precision: Precision, asked: Sequence[list[int]], new: Sequence[int], arrivals: Sequence[float]
) -> list[float]:
    engine = Engine.load(folder, max_sequences=32, precision=precision, device="cpu")
    ended = [0.0] * len(asked)
    start, sent = time.perf_counter(), 0
    while sent < len(asked) or engine.has_work:
        now = time.perf_counter() - start
        while sent < len(asked) and arrivals[sent] <= now:
            engine.submit(_greedy(asked[sent], sent, new[sent]))
            sent += 1
        if not engine.has_work:
            time.sleep(arrivals[sent] - now)
        for event in engine.step():
            if event.finish_reason is not None:
                ended[int(event.request_id)] = time.perf_counter() - start
    return ended


def _trace_padded(model: Any, asked: Sequence[list[int]], new: Sequence[int], arrivals: Sequence[float]) -> list[float]:
    ended: list[float] = []
    start = time.perf_counter()
    while len(ended) < len(asked):
        first = len(ended)
        time.sleep(max(0.0, arrivals[first] - (time.perf_counter() - start)))
        now = time.perf_counter() - start
        last = first + min(32, sum(arrival <= now for arrival in arrivals[first:]))
        _padded(model, asked[first:last], last - first, max(new[first:last]))
        ended += [time.perf_counter() - start] * (last - first)
    return ended


def _summary(ended: Sequence[float], new: Sequence[int], arrivals: Sequence[float]) -> dict[str, float]:
    waits = sorted(end - arrival for end, arrival in zip(ended, arrivals, strict=True))
    return {
        "output_tokens_per_second": sum(new) / max(ended),
        "median_seconds": median(waits),
        "p95_seconds": waits[int(0.95 * len(waits))],
    }


def _roofline(weights: int, dtype: torch.dtype) -> dict[str, float]:
    """Bounds of decoding: the weights are read once for each token at 1, and 2 FLOPs are done for each weight at 32."""
    block = torch.ones(100_000_000)
    read, _ = timed(lambda _: block.sum(), 5)
    bandwidth = block.nbytes / read
    side = 2048
    a, b = torch.rand(side, side).to(dtype), torch.rand(side, side).to(dtype)
    flops = 2 * side**3 / timed(lambda _: a @ b, 5)[0]
    return {
        "gigabytes_per_second": bandwidth / 1e9,
        "gigaflops": flops / 1e9,
        "tokens_per_second_at_1": bandwidth / (weights * dtype.itemsize),
        "tokens_per_second_at_32": flops / (2 * weights),
    }
