"""The inference engine against `transformers` and llama.cpp, on the same weights, prompts and cores.

    python -m benchmarks.engine [--quick] [--json] [--only PART ...] [--llama-bench PATH] [--precision fp32|bf16]
        [--measure rates|steps|trace ...]

Decoders (17 and 100 million parameters, prompts of 72 tokens, 64 new ones) at 1, 8 and 32 requests at once, and with
requests that arrive at random; prefill; what of a step is not the model's; the machine's own bounds beside it. T5 and
BART against `generate` at 16; encoders against a `pipeline` and a length-sorted batch loop. All weights are random.
llama.cpp takes part if `--llama-bench` names its `llama-batched-bench`. A full run keeps its results in
`benchmarks/results/`, those of single parts in pages of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_decoding import CONCURRENCY, MEASURES, NEW, PROMPT, decoding
from benchmarks.engine_encoders import SOURCES, encoder, seq2seq
from benchmarks.engine_models import MODELS, model_folder
from benchmarks.measuring import command, keep, machine, versions

ROOT = Path(__file__).parents[1]
_PARTS = tuple(MODELS)


def main() -> int:
    """Prints a page (or JSON)."""
    options = _options()
    runs = 1 if options.quick else options.runs
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("torch", "transformers"),
        "runs": runs,
        "parts": {},
    }
    options.work.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        print(f"{part} ...", file=sys.stderr)
        document["parts"][part] = _part(part, options, runs)
    page = _page(document)
    if not options.quick:
        name = "engine" if set(options.only) == set(_PARTS) else f"engine-{'-'.join(options.only)}"
        if set(options.measure) != set(MEASURES):
            name += f"-{'-'.join(options.measure)}"
        print(f"kept as {keep(name, document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run, at 1 and 8 at once, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS, metavar="PART", help=", ".join(_PARTS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="of all weights")
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        default=MEASURES,
        help="what of the decoders, each in a page of its own",
    )
    llama = os.environ.get("GANYMEDE_LLAMA_BENCH")
    parser.add_argument("--llama-bench", default=llama, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks/engine", help="scratch folder")
    return parser.parse_args()


def _part(name: str, options: argparse.Namespace, runs: int) -> dict[str, Any]:
    folder = model_folder(name, options.work)
    if name in ("t5", "bart"):
        return seq2seq(folder, precision=options.precision, runs=runs)
    if name in ("classifier", "embedder"):
        return encoder(name, folder, precision=options.precision, runs=runs, count=32 if options.quick else 128)
    return decoding(
        folder,
        options.work,
        precision=options.precision,
        concurrency=CONCURRENCY[:2] if options.quick else CONCURRENCY,
        runs=runs,
        llama_bench=options.llama_bench,
        measures=options.measure,
    )


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts = document["machine"]
    lines = [
        "# Inference engine",
        "",
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['memory_gb']} GB; load before {facts['load_before']}; Python {facts['python']}, "
        + ", ".join(f"{name} {number}" for name, number in document["versions"].items())
        + f"; medians of {document['runs']} runs.",
        "",
        f"    {document['command']}",
        "",
    ]
    for name, part in document["parts"].items():
        if "parameters" in part:
            lines += _decoding_lines(name, part)
        elif "texts" in part:
            lines += [f"## {name}: {part['texts']} texts of very different lengths", ""]
            lines += _rate_lines("texts/s", part["texts_per_second"])
        else:
            same = f"{part['rows_equal_to_generate']:.0%} of the rows equal"
            lines += [f"## {name}: {SOURCES} sources of {PROMPT} tokens, {NEW} new ones; {same}", ""]
            lines += _rate_lines("output tokens/s", part["output_tokens_per_second"])
    return "\n".join(lines)


def _decoding_lines(name: str, part: dict[str, Any]) -> list[str]:
    lines = [
        f"## {name}: {part['parameters'] / 1e6:.0f} M parameters, {part['dtype']}, prompts of {PROMPT} tokens, {NEW} "
        "new ones",
        "",
    ]
    if "roofline" in part:
        lines += _level_lines(part)
    if "own_share_of_a_step" in part:
        ours, plain = part["prefill_tokens_per_second"].values()
        delays = ", ".join(f"{delay:.1f} beside {n}" for n, delay in part["prefill_delay_in_steps"].items())
        lines += [
            f"- Prefill: {ours:.0f} tokens/s, {ours / plain:.2f} of a plain batched forward pass.",
            f"- Steps' time by which a prompt of 500 tokens delays those that decode: {delays}.",
            f"- Of a decoding step, {part['own_share_of_a_step']:.1%} is not the model's.",
            "",
        ]
    if "trace" in part:
        lines += _trace_lines(part["trace"])
    return lines


def _trace_lines(trace: dict[str, dict[str, float]]) -> list[str]:
    return [
        "| requests that arrive at random, 16 to 200 tokens, 8 to 128 new ones | output tokens/s | median s | p95 s |",
        "|---|---:|---:|---:|",
        *(
            f"| {who} | {found['output_tokens_per_second']:.0f} | {found['median_seconds']:.1f} "
            f"| {found['p95_seconds']:.1f} |"
            for who, found in trace.items()
        ),
        "",
    ]


def _level_lines(part: dict[str, Any]) -> list[str]:
    rates = part["output_tokens_per_second"]
    levels = list(rates["engine"])
    lines = [
        "| output tokens/s, prefill and sampling included | " + " | ".join(f"{n} at once" for n in levels) + " |",
        "|---|" + "---:|" * len(levels),
    ]
    for who, found in rates.items():
        cells = [f"{found[n]:.0f} ({rates['engine'][n] / found[n]:.2f}x)" if n in found else "" for n in levels]
        lines.append(f"| {who} (engine's speed against it) | {' | '.join(cells)} |")
    roof = part["roofline"]
    same = ", ".join(f"{share:.0%} at {n}" for n, share in part["rows_equal_to_generate"].items())
    bounds = {"1": roof["tokens_per_second_at_1"], "32": roof["tokens_per_second_at_32"]}
    shares = [f"{rates['engine'][n] / bound:.0%} of {bound:.0f} tokens/s at {n}" for n, bound in bounds.items()
              if n in levels]  # fmt: skip
    return [
        *lines,
        "",
        f"- Bounds: {roof['gigabytes_per_second']:.1f} GB/s read, {roof['gigaflops']:.0f} GFLOP/s; the engine reaches "
        + ", ".join(shares) + ", prefill and sampling included.",
        f"- Rows with exactly the tokens of `generate`: {same}.",
        "",
    ]  # fmt: skip


def _rate_lines(unit: str, rates: dict[str, float]) -> list[str]:
    lines = [f"| | {unit} | engine's speed against it |", "|---|---:|---:|"]
    lines += [f"| {who} | {rate:.1f} | {rates['engine'] / rate:.2f}x |" for who, rate in rates.items()]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
