"""What a model writes at each evaluation, so that people see it learn: prompts of the objective, gone on with greedily.

Lines of a file that rank 0 of the workers writes; after a resumed run the last word of each step counts. Runs whose
ranks share the weights write none, as a model is generated with outside the call that gathers them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.text import Text
from pipelines.training.models import window

FILE = "samples.jsonl"
PROMPTS = 2
PROMPT_TOKENS = 16
"""Of a prompt that is cut out of a longer text."""
_WRITTEN_TOKENS = 32


@torch.no_grad()
def continuations(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that `model` writes behind each of `prompts`, or of an encoder-decoder for each, the likeliest first;
    none where its context has no room left.
    """
    return [_continuation(model, list(prompt)) for prompt in prompts]


def _continuation(model: nn.Module, prompt: list[int]) -> list[int]:
    begun = 1 if model.config.is_encoder_decoder else len(prompt)
    room = min(_WRITTEN_TOKENS, window(model.config) - begun)
    if room < 1:
        return []
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    # Compiled, every length would be compiled anew; padding is asked for and does not occur.
    with torch.compiler.set_stance("force_eager"):
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=room, pad_token_id=0
        )
    found: list[int] = output[0, begun:].tolist()
    return found


def keep_samples(path: Path, step: int, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> None:
    """Adds what was written after `step`."""
    with path.open("a", encoding="utf-8") as lines:
        for number, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
            line = {"step": step, "number": number, "prompt": list(prompt), "written": list(ids)}
            lines.write(json.dumps(line) + "\n")


def read_samples(path: Path, text: Text) -> list[dict[str, Any]]:
    """The samples as texts, by step; empty where there are none."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    latest = {(line["step"], line["number"]): line for line in lines}
    return [
        {"step": step, "prompt": text.decode(line["prompt"]), "written": text.decode(line["written"])}
        for (step, _), line in sorted(latest.items())
    ]
