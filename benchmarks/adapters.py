"""Adapters over one base in one batch: the engine against `peft`, on the same weights, adapters, prompts and cores.

    python -m benchmarks.adapters [--quick] [--json] [--runs N]

A Llama of 17 million parameters with random weights, 16 answers at once to prompts of 72 tokens, 64 new ones each, LoRA
of rank 16 on all linear layers; fp32. The rows have no adapter, all the same one, four in turn, or one each. `peft`
runs the same rows in one padded batch of `generate` with `adapter_names`. What the engine makes of a model that the
adapter was merged into is the bound: there is nothing to add. A full run keeps its results in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from actors.engine.adapter_loading import ADAPTER
from actors.engine.engine import Engine
from actors.engine.request import Request
from benchmarks.engine_decoding import NEW, PROMPT, timed
from benchmarks.engine_models import model_folder, prompts
from benchmarks.measuring import command, keep, machine, versions
from configs.schema.generation import Sampling

ROOT = Path(__file__).parents[1]
ROWS, RANK = 16, 16
SPREADS = {"no adapter": 0, "one adapter": 1, "four adapters": 4, "an adapter a row": ROWS}
"""How many adapters the rows have in turn."""


def main() -> int:
    """Prints a page (or JSON)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run, nothing kept")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    options = parser.parse_args()
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": command(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("torch", "transformers", "peft"),
        "runs": 1 if options.quick else options.runs,
    }
    with tempfile.TemporaryDirectory() as work:
        document |= _measured(Path(work), document["runs"])
    page = _page(document)
    if not options.quick:
        print(f"kept as {keep('adapters', document, page).relative_to(ROOT)}", file=sys.stderr)
    print(json.dumps(document, indent=2) if options.json else page)
    return 0


def _measured(work: Path, runs: int) -> dict[str, Any]:
    base = model_folder("17m", work)
    adapters = [_adapter(base, work / f"adapter-{number}", number) for number in range(ROWS)]
    rates: dict[str, dict[str, float]] = {"engine": {}, "peft": {}}
    same: dict[str, float] = {}
    engine = Engine.load(base, max_sequences=ROWS, precision="fp32", device="cpu")
    held = [engine.load_adapter(folder, folder.name) for folder in adapters]
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapters[0] / ADAPTER, adapter_name=adapters[0].name
    )
    for folder in adapters[1:]:
        model.load_adapter(folder / ADAPTER, adapter_name=folder.name)
    model.eval()
    for name, count in SPREADS.items():
        chosen = [row % count if count else None for row in range(ROWS)]
        # New prompts for each run: the engine would find those of an earlier one in its cache.
        asked = [prompts(ROWS, PROMPT, seed=100 * count + number) for number in range(runs + 1)]

        def ours(run: int, chosen: Sequence[int | None] = chosen, asked: Any = asked) -> list[list[int]]:
            requests = [
                Request(str(row), tuple(ids), Sampling(max_new_tokens=NEW, temperature=0),
                        adapter=None if at is None else held[at])
                for row, (ids, at) in enumerate(zip(asked[run], chosen, strict=True))
            ]  # fmt: skip
            return [list(done.token_ids) for done in engine.generate(requests)]

        def theirs(run: int, chosen: Sequence[int | None] = chosen, asked: Any = asked) -> list[list[int]]:
            names = ["__base__" if at is None else adapters[at].name for at in chosen]
            ids = torch.tensor(asked[run])
            options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
            return [row[PROMPT:] for row in out.tolist()]

        tokens = {}
        for who, run in (("engine", ours), ("peft", theirs)):
            seconds, tokens[who] = timed(run, runs)
            rates[who][name] = ROWS * NEW / seconds
        same[name] = sum(map(list.__eq__, tokens["engine"], tokens["peft"])) / ROWS
    merged, asked = _merged(base, adapters[0], work), [prompts(ROWS, PROMPT, seed=n) for n in range(runs + 1)]
    seconds, _ = timed(lambda run: _run(merged, asked[run]), runs)
    rates["engine"]["merged"] = ROWS * NEW / seconds
    return {"output_tokens_per_second": rates, "rows_equal_to_peft": same}


def _run(engine: Engine, asked: Sequence[Sequence[int]]) -> object:
    sampling = Sampling(max_new_tokens=NEW, temperature=0)
    return engine.generate([Request(str(row), tuple(ids), sampling) for row, ids in enumerate(asked)])


def _adapter(base: Path, folder: Path, seed: int) -> Path:
    """A folder as an artifact has it, with an adapter of random factors."""
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder / ADAPTER)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _merged(base: Path, adapter: Path, work: Path) -> Engine:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter / ADAPTER)
    model.merge_and_unload().save_pretrained(work / "merged")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, work / "merged")
    return Engine.load(work / "merged", max_sequences=ROWS, precision="fp32", device="cpu")


def _page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    facts, rates = document["machine"], document["output_tokens_per_second"]
    ours, theirs, same = rates["engine"], rates["peft"], document["rows_equal_to_peft"]
    rows = [
        f"| {name} | {ours[name]:,.0f} | {ours[name] / ours['no adapter']:.2f} | {theirs[name]:,.0f} "
        f"| {ours[name] / theirs[name]:.2f}x | {same[name]:.0%} |"
        for name in SPREADS
    ]
    return "\n".join(
        [
            "# Adapters",
            "",
            f"{document['date']}; {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, "
            f"{facts['memory_gb']} GB; load before {facts['load_before']}; Python {facts['python']}, "
            + ", ".join(f"{name} {number}" for name, number in document["versions"].items())
            + f"; fp32; medians of {document['runs']} runs.",
            "",
            f"    {document['command']}",
            "",
            f"Llama of 17 M parameters, {ROWS} answers at once, prompts of {PROMPT} tokens, {NEW} new ones; LoRA of "
            f"rank {RANK} on all linear layers. Output tokens/s; the model that one adapter was merged into writes "
            f"{ours['merged']:,.0f}.",
            "",
            "| the rows have | engine | against none | `peft`, padded `generate` | engine against it | equal rows |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
