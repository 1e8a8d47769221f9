"""Training speed: our stage against loops written for the purpose and the `Trainer` of `transformers`.

    python -m benchmarks.training [--only PART ...] [--quick] [--json] [--steps N]

- `speed`: a Llama of 17 million parameters, rows of 256 tokens, fp32 on two cores. Ours is the stage as `ganymede run`
  runs it, with Ray, MLflow, loader and checkpoints; the others read the same rows from a file. Time is that of the
  steps, start and evaluation left out.
- `checkpoint`: what writing the state of that run costs, against 50 of its steps.
- `shakespeare`: the stage `third` of the recipe `shakespeare_char` beside a small GPT with AdamW and cosine on the same
  rows: time to the other's loss. `shakespeare_whole`: its stage `whole`, the loss in the other's time. They need
  tinyshakespeare below $GANYMEDE_DATA.

A full run keeps its results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.measuring import command, keep, machine, versions
from benchmarks.programs import ROOT, run_module
from configs.schema.model import ModelConfig
from configs.schema.training import OptimConfig
from pipelines.training.checkpoint import Checkpoint, Checkpoints
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.models import build_model
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import Ranks
from pipelines.training.sharding import held_weights

SHAPE = {"hidden_size": 384, "layers": 8, "heads": 6, "intermediate_size": 1024, "context_length": 256}
VOCAB = 8192
ROWS, MICRO_ROWS = 16, 8
REFERENCE_ROWS, REFERENCE_STEPS, REFERENCE_LOSS = 12, 2000, 1.886
SAVE_EVERY = 50
_WRITE_SECONDS = 3.0
"""By then a checkpoint is written, as it is in the 50 steps of a run."""
_CHARACTERS = {"vocab": 261, "length": 64, "width": 128, "layers": 4, "heads": 4, "inner": 352}
_LOOPS = {
    "bare loop, its loss over all logits": ("bare", MICRO_ROWS),
    "bare loop, our loss": ("bare_fused_loss", MICRO_ROWS),
    "transformers' Trainer": ("trainer", MICRO_ROWS),
    "transformers' Trainer, the batch at once": ("trainer", ROWS),
    "small GPT, plain loop": ("small_gpt", MICRO_ROWS),
}
"""Loop, and rows that it runs at once, by what it is called."""
_OURS = {
    "ganymede, 1 worker of 2 threads, AdamW": {"workers": 1, "cpus_per_worker": 2, "optim": {"name": "adamw"}},
    "ganymede, 2 workers of 1 thread, AdamW": {"workers": 2, "cpus_per_worker": 1, "optim": {"name": "adamw"}},
}
_LIKE_FOR_LIKE, _TWO_WORKERS = _OURS


def main() -> int:
    """Prints a page (or JSON)."""
    options = _options()
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine(),
        "versions": versions("torch", "transformers", "ray"),
        "parts": {},
    }
    for part in options.only:
        print(f"{part} ...", file=sys.stderr)
        document["parts"][part] = _PARTS[part](options)
    page = _page(document)
    if not options.quick:
        name = "training" if set(options.only) == set(_PARTS) else f"training-{'-'.join(options.only)}"
        print(f"kept as {keep(name, document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument(
        "--only", nargs="+", choices=_PARTS, default=tuple(_PARTS), metavar="PART", help=", ".join(_PARTS)
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of each contestant in `speed`")
    parser.add_argument("--work", type=Path, default=ROOT / ".ganymede/benchmarks/training", help="scratch folder")
    return parser.parse_args()


def _speed(options: argparse.Namespace) -> dict[str, Any]:
    """Positions a second of each contestant, and the share of the matrix-product rate that ours reach."""
    steps = 4 if options.quick else options.steps
    options.work.mkdir(parents=True, exist_ok=True)
    rates: dict[str, float] = {}
    fastest: dict[str, float] = {}
    shares: dict[str, float] = {}

    def enter(name: str, found: list[float]) -> None:
        later = found[1:]  # the first step allocates
        rates[name], fastest[name] = median(later), max(later)
        print(f"{name}: {rates[name]:,.0f} tokens/s, at most {fastest[name]:,.0f}", file=sys.stderr)

    path = options.work / "speed.yaml"
    path.write_text(yaml.safe_dump(_speed_recipe(steps)))
    ours = run_module("benchmarks.training_ours", path, options.work / "speed", "--rows", "run-0", "--row-steps", steps)
    for number, name in enumerate(_OURS):
        lines = ours["stages"][f"run-{number}"]["lines"]
        enter(name, [line["tokens_per_second"] for line in lines])
        shares[name] = median(line["mfu"] for line in lines[1:])
    arguments = _shape_arguments(VOCAB, SHAPE["context_length"], SHAPE["hidden_size"], SHAPE["layers"], SHAPE["heads"],
                                 SHAPE["intermediate_size"])  # fmt: skip
    for name, (loop, micro_rows) in _LOOPS.items():
        found = run_module(
            "benchmarks.training_loops", loop, ours["files"]["train"], *arguments, "--micro-rows", micro_rows
        )
        enter(name, [found["positions"] / seconds for seconds in found["seconds"]])
    return {
        "steps": steps,
        "tokens_per_second": rates,
        "fastest_tokens_per_second": fastest,
        "share_of_matmul_rate": shares,
    }


def _speed_recipe(steps: int) -> dict[str, Any]:
    """One corpus, and a run of each of ours on it."""
    source = {"path": "python:stdlib", "max_bad_fraction": 0.01}
    shared = {
        "steps": steps, "batch_rows": ROWS, "micro_batch_rows": MICRO_ROWS, "eval_rows": 2, "eval_every_steps": steps,
        "log_every_steps": 1, "precision": "fp32",
    }  # fmt: skip
    runs = {
        f"run-{number}": {"kind": "pretrain", "corpus": "corpus", "model": SHAPE, "training": {**shared, **training}}
        for number, training in enumerate(_OURS.values())
    }
    return {
        "name": "speed",
        "stages": {
            "tokenizer": {"source": source, "vocab_size": VOCAB},
            "corpus": {"tokenizer": "tokenizer", "source": source},
            **runs,
        },
    }


def _shape_arguments(vocab: int, length: int, width: int, layers: int, heads: int, inner: int) -> list[Any]:
    return ["--vocab", vocab, "--length", length, "--width", width, "--layers", layers, "--heads", heads,
            "--inner", inner]  # fmt: skip


def _checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that the loop stands still for one checkpoint of the 17M model, and of the one of `shakespeare`."""
    return {
        "17M": _saving(ModelConfig.model_validate(SHAPE), VOCAB, options.work),
        "0.8M": _saving(ModelConfig(hidden_size=128, layers=4, heads=4, context_length=64), 261, options.work),
    }


def _saving(shape: ModelConfig, vocab: int, work: Path) -> dict[str, float]:
    work.mkdir(parents=True, exist_ok=True)
    model = build_model(shape, vocab_size=vocab, eos_token_id=0, seed=1)
    weights = held_weights(model)
    optimizer = Optimizer(model, weights, OptimConfig(), dtype=torch.float32)
    states = {"model": weights, **optimizer.state()}
    tensors = {f"{kind}/{name}": tensor for kind, state in states.items() for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        writer, stalls = CheckpointWriter(Checkpoints(Path(folder)), Ranks()), []
        with writer.finishing(lambda problem: print(problem, file=sys.stderr)):
            for step in range(1, 6):
                started = time.perf_counter()
                writer.save(Checkpoint(step, 0, tensors))
                stalls.append(time.perf_counter() - started)
                time.sleep(_WRITE_SECONDS)
    return {"seconds": median(stalls), "bytes": sum(t.nbytes for t in tensors.values())}


def _shakespeare(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """A stage of the recipe, and the small GPT on the rows that it sees."""
    home = options.work / "shakespeare"
    short = ["--set", f"stages.{stage}.training.steps=100"] if options.quick else []
    steps = 200 if options.quick else REFERENCE_STEPS
    ours = run_module(
        "benchmarks.training_ours", "shakespeare_char", home, "--only", stage, "--rows", stage, "--row-steps", steps,
        *short,
    )  # fmt: skip
    reference = run_module(
        "benchmarks.training_loops", "small_gpt", ours["files"]["train"], *_shape_arguments(**_CHARACTERS),
        "--micro-rows", REFERENCE_ROWS, "--validation", ours["files"]["validation"], "--validate-every", 100,
    )  # fmt: skip
    curve = [line for line in ours["stages"][stage]["lines"] if "validation_loss" in line]
    return {"stage": stage, "reference": reference["curve"], "parameters": reference["parameters"], "ours": curve}


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts = document["machine"]
    lines = [
        "# Training",
        "",
        f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['memory_gb']} GB; load before "
        f"{facts['load_before']}; Python {facts['python']}, "
        + ", ".join(f"{name} {number}" for name, number in document["versions"].items())
        + "; fp32.",
        "",
        f"    {document['command']}",
        "",
    ]
    parts = document["parts"]
    if "speed" in parts:
        lines += _speed_lines(parts["speed"])
    if "checkpoint" in parts:
        lines += _checkpoint_lines(parts["checkpoint"], parts.get("speed"))
    for name in ("shakespeare", "shakespeare_whole"):
        if name in parts:
            lines += _shakespeare_lines(parts[name])
    return "\n".join(lines)


def _speed_lines(part: dict[str, Any]) -> list[str]:
    rates, fastest, shares = (
        part[key] for key in ("tokens_per_second", "fastest_tokens_per_second", "share_of_matmul_rate")
    )
    ours = rates[_LIKE_FOR_LIKE]
    lines = [
        f"## Speed: Llama of 17 M parameters, {ROWS} rows of {SHAPE['context_length']} tokens a step, median of "
        f"{part['steps'] - 1} steps",
        "",
        f"| | tokens/s | fastest step | {_LIKE_FOR_LIKE} against it (fastest steps) | share of the matmul rate |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rate in rates.items():
        share = f"{shares[name]:.0%}" if name in shares else ""
        ratios = f"{ours / rate:.2f}x ({fastest[_LIKE_FOR_LIKE] / fastest[name]:.2f}x)"
        lines.append(f"| {name} | {rate:,.0f} | {fastest[name]:,.0f} | {ratios} | {share} |")
    against = rates[_TWO_WORKERS] / ours, fastest[_TWO_WORKERS] / fastest[_LIKE_FOR_LIKE]
    return [*lines, "", f"- 2 workers of 1 thread against 1 of 2: {against[0]:.2f}x ({against[1]:.2f}x).", ""]


def _checkpoint_lines(part: dict[str, Any], speed: dict[str, Any] | None) -> list[str]:
    lines = ["## Checkpoints", ""]
    for name, found in part.items():
        lines.append(f"- {name}: {found['bytes'] / 1e6:.1f} MB, the loop stands still for {found['seconds']:.3f} s.")
    if speed is not None:
        step = ROWS * SHAPE["context_length"] / speed["tokens_per_second"][_TWO_WORKERS]
        share = part["17M"]["seconds"] / (SAVE_EVERY * step)
        lines.append(f"- Every {SAVE_EVERY} steps of {step:.2f} s, that is {share:.1%} of the time (17M).")
    return [*lines, ""]


def _shakespeare_lines(part: dict[str, Any]) -> list[str]:
    reference = part["reference"][-1]
    ours = f"ganymede `{part['stage']}`"
    lines = [
        f"## Tiny Shakespeare, by the character: 4 layers, 4 heads, 128 wide, context 64 (`{part['stage']}`)",
        "",
        "| | steps | training s | validation loss, nats a character | time against the small GPT's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, curve in (("small GPT, AdamW and cosine", part["reference"]), (ours, part["ours"])):
        last = curve[-1]
        lines.append(
            f"| {name} | {last['step']:,.0f} | {last['seconds']:.1f} | {last['validation_loss']:.4f} | "
            f"{last['seconds'] / reference['seconds']:.2f} |"
        )
    lines.append("")
    for wanted, whose in ((reference["validation_loss"], "the small GPT's last loss"), (REFERENCE_LOSS, "1.886")):
        found = f"small GPT {_time_to(part['reference'], wanted)}, {ours} {_time_to(part['ours'], wanted)}"
        lines.append(f"- To {whose} ({wanted:.3f}): {found}.")
    return [*lines, ""]


def _time_to(curve: list[dict[str, float]], wanted: float) -> str:
    """Training time to the first evaluation at or below a loss."""
    reached = [line["seconds"] for line in curve if line["validation_loss"] <= wanted]
    return f"{reached[0]:.1f} s" if reached else "not reached"


_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "speed": _speed,
    "checkpoint": _checkpoint,
    "shakespeare": partial(_shakespeare, stage="third"),
    "shakespeare_whole": partial(_shakespeare, stage="whole"),
}


if __name__ == "__main__":
    sys.exit(main())
