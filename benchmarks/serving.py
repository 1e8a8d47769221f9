"""The endpoint against the bare engine and against `transformers serve`, on the same weights, prompts and cores.

    python -m benchmarks.serving [--quick] [--json] [--runs N]

A Llama of 17 million random parameters in fp32, prompts of 72 tokens, 64 new ones, greedy, through HTTP with one
replica: output tokens/s and time to first token, streamed, at 1, 8 and 32 requests at once; our whole answers at 32;
what is added to the engine's own time to first token; what a thousand open streams that wait cost in memory. All get
the same prompts; every token has a text, so that the first one can be seen. A full run takes five minutes and keeps its
results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer

from actors.engine.engine import Engine
from actors.engine.request import Request
from benchmarks.engine_models import VOCAB, model_folder, prompts
from benchmarks.measuring import command, keep, machine, versions
from benchmarks.serving_load import ask, closed_loop, rates
from benchmarks.serving_servers import NAME, ours, serving_memory_bytes, transformers_serve
from configs.schema.generation import Sampling

ROOT = Path(__file__).parents[1]
PROMPT, NEW = 72, 64
CONCURRENCY = (1, 8, 32)
REQUESTS = {1: 6, 8: 24, 32: 64}
"""Of a closed loop, by concurrency."""
IDLE_STREAMS = 1000
IDLE_TOKENS = 300
MOST_AT_ONCE = 32


def main() -> int:
    """Prints a page (or JSON)."""
    options = _options()
    runs = 1 if options.quick else options.runs
    levels = CONCURRENCY[:2] if options.quick else CONCURRENCY
    options.work.mkdir(parents=True, exist_ok=True)
    folder = _readable(model_folder("17m", options.work), options.work / "17m-readable")
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("torch", "transformers", "ray"),
        "runs": runs,
        "streamed": {},
    }
    _say("engine ...")
    document["streamed"]["engine, no HTTP"] = {str(n): _engine(folder, n, runs) for n in levels}
    _say("ours ...")
    with ours(folder, options.work, max_sequences=MOST_AT_ONCE, max_queued=2 * IDLE_STREAMS) as port:
        document["streamed"]["ours"] = {str(n): _load(folder, port, NAME, n, runs) for n in levels}
        document["whole"] = {"ours": _load(folder, port, NAME, levels[-1], runs, stream=False)}
        if not options.quick:
            document["idle_streams"] = asyncio.run(_idle(folder, port))
    _say("transformers serve ...")
    with transformers_serve(folder, options.work) as port:
        peer = "transformers serve, continuous batching"
        document["streamed"][peer] = {str(n): _load(folder, port, str(folder), n, runs) for n in levels}
    page = _page(document)
    if not options.quick:
        _say(f"kept as {keep('serving', document, page).relative_to(ROOT)}")
    print(json.dumps(document, indent=2) if options.json else page)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run, at 1 and 8 at once, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks/serving", help="scratch folder")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _readable(folder: Path, into: Path) -> Path:
    """The model with a text for every token it can write: those that its small tokenizer lacks are named."""
    if not into.exists():
        shutil.copytree(folder, into)
        path = into / "tokenizer.json"
        document = json.loads(path.read_text())
        vocab = document["model"]["vocab"]
        vocab |= {f"Ġnew{token}": token for token in range(len(vocab), VOCAB)}
        path.write_text(json.dumps(document))
    return into


def _asked(count: int, run: int) -> list[list[int]]:
    """New prompts for each run, as an earlier one's would be found in the cache; run 0 warms up, with a few of them."""
    return prompts(REQUESTS[count] if run else count, PROMPT, seed=1000 * count + run)


def _engine(folder: Path, count: int, runs: int) -> dict[str, float]:
    """The same closed loop without a server."""
    engine = Engine.load(folder, max_sequences=count, max_queued=MOST_AT_ONCE, precision="fp32", device="cpu")
    found = [_engine_run(engine, count, run) for run in range(runs + 1)]
    return _medians(found[1:])


def _engine_run(engine: Engine, count: int, run: int) -> dict[str, float]:
    sampling = Sampling(temperature=0, max_new_tokens=NEW)
    waiting = [Request(f"{run}-{n}", tuple(ids), sampling) for n, ids in enumerate(_asked(count, run))]
    total = len(waiting)
    began = time.perf_counter()
    submitted: dict[str, float] = {}
    firsts: list[float] = []
    flying = 0
    while waiting or flying:
        while waiting and flying < count:
            request = waiting.pop()
            submitted[request.id] = time.perf_counter()
            engine.submit(request)
            flying += 1
        for event in engine.step():
            if event.text and event.request_id in submitted:
                firsts.append(time.perf_counter() - submitted.pop(event.request_id))
            flying -= event.finish_reason is not None
    seconds = time.perf_counter() - began
    return {
        "output_tokens_per_second": total * NEW / seconds,
        "median_first_token_seconds": median(firsts),
        "p99_first_token_seconds": max(firsts),
    }


def _load(folder: Path, port: int, model: str, count: int, runs: int, *, stream: bool = True) -> dict[str, float]:
    """A server's closed loop. Prompts go as texts, which every server takes."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for run in range(runs + 1):
        texts = [tokenizer.decode(ids) for ids in _asked(count, run)]
        seconds, replies = asyncio.run(closed_loop(port, model, texts, NEW, concurrency=count, stream=stream))
        found.append(rates(seconds, replies, NEW))
    return _medians(found[1:])


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(run[name] for run in found) for name in found[0]}


async def _idle(folder: Path, port: int) -> dict[str, float]:
    """Streams that are open and wait for their turn, behind those that the engine writes, whose keys and values have
    taken their room before.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [tokenizer.decode(ids) for ids in prompts(IDLE_STREAMS, PROMPT, seed=9)]
    await asyncio.gather(*(ask(port, NAME, text, IDLE_TOKENS, stream=True) for text in texts[:MOST_AT_ONCE]))
    before = serving_memory_bytes()
    streams = [asyncio.create_task(ask(port, NAME, text, IDLE_TOKENS, stream=True)) for text in texts]
    await asyncio.sleep(15)
    after = serving_memory_bytes()
    answered = sum(stream.done() for stream in streams)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    grown = {f"{name}_mb": (after[name] - before[name]) / 1e6 for name in after}
    return {"streams": IDLE_STREAMS - answered, "all_mb": sum(grown.values()), **grown}


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts, streamed = document["machine"], document["streamed"]
    levels = list(streamed["ours"])
    lines = [
        "# Serving",
        "",
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; load before "
        f"{facts['load_before']}; Python {facts['python']}, "
        + ", ".join(f"{name} {number}" for name, number in document["versions"].items())
        + f"; Llama of 17 M parameters, fp32; prompts of {PROMPT} tokens, {NEW} new ones; medians of "
        f"{document['runs']} runs.",
        "",
        f"    {document['command']}",
        "",
    ]
    for title, key, scale, form in (
        ("output tokens/s, streamed", "output_tokens_per_second", 1, ".0f"),
        ("median ms to the first token", "median_first_token_seconds", 1000, ".1f"),
    ):
        lines += [f"| {title} | " + " | ".join(f"{n} at once" for n in levels) + " |", "|---|" + "---:|" * len(levels)]
        lines += [
            f"| {who} | " + " | ".join(format(found[n][key] * scale, form) for n in levels) + " |"
            for who, found in streamed.items()
        ]
        lines.append("")
    own, engine = streamed["ours"], streamed["engine, no HTTP"]
    peer = next(found for who, found in streamed.items() if who.startswith("transformers"))
    rate, first = "output_tokens_per_second", "median_first_token_seconds"
    last = levels[-1]
    lines += [
        f"- Through HTTP: {own[last][rate] / engine[last][rate]:.0%} of the engine's own tokens/s at {last}; "
        f"{1000 * (own['1'][first] - engine['1'][first]):.1f} ms added to the time to first token at 1.",
        f"- Against `transformers serve`: {own[last][rate] / peer[last][rate]:.1f} times the tokens/s at {last}; "
        + ", ".join(f"{peer[n][first] / own[n][first]:.1f} times as fast to the first token at {n}" for n in levels)
        + ".",
        f"- Whole answers, tokens/s at {last}: "
        + ", ".join(f"{who} {found[rate]:.0f}" for who, found in document["whole"].items())
        + ".",
    ]
    if "idle_streams" in document:
        idle = document["idle_streams"]
        lines.append(f"- {idle['streams']} open streams that wait cost {idle['all_mb']:.0f} MB.")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
