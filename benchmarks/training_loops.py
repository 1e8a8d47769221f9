"""What training is measured against: loops written for the purpose, and the `Trainer` of `transformers`.

All of them take the rows of a file, batch by batch, in fp32 on the CPU. Run as a process of its own; prints one JSON
document with the seconds of each step or, with `--validate-every`, validation losses by training time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from pipelines.training.cross_entropy import linear_cross_entropy

Batches = npt.NDArray[np.int64]
"""[steps, rows, length + 1]."""
LEARNING_RATE = 1e-3
_FINAL_RATE = 1e-4
_WARMUP_STEPS = 100
_WEIGHT_DECAY = 0.1


class _Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.gather = nn.Linear(width, width, bias=False)
        self.before_feed = nn.LayerNorm(width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        rows, length, width = stream.shape
        mixed = self.mix(self.before_attention(stream)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.gather(seen.transpose(1, 2).reshape(rows, length, width))
        return stream + self.narrow(F.gelu(self.widen(self.before_feed(stream))))


class SmallGpt(nn.Module):
    """GPT-2 in its plainest form: learned positions, layer norms, tied embeddings, no biases."""

    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("gather.weight", "narrow.weight"))
                nn.init.normal_(weight, 0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.blocks(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        return F.linear(self.norm(stream), self.tokens.weight)


def _llama(shape: argparse.Namespace) -> Any:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, intermediate_size=shape.inner,
        max_position_embeddings=shape.length, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        pad_token_id=0))  # fmt: skip


def _plain_loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Cross-entropy over all logits at once."""

    def loss(rows: Tensor) -> Tensor:
        output = model(rows[:, :-1])
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return loss


def _fused_loss(model: Any) -> Callable[[Tensor], Tensor]:
    """Our output projection and cross-entropy in one, which never holds all logits."""

    def loss(rows: Tensor) -> Tensor:
        hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        return linear_cross_entropy(hidden, model.lm_head.weight, rows[:, 1:].flatten()) / len(hidden)

    return loss


def cosine_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a tenth."""
    if step < _WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / (_WARMUP_STEPS + 1)
    share = (step - _WARMUP_STEPS) / max(1, steps - _WARMUP_STEPS)
    return _FINAL_RATE + (LEARNING_RATE - _FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: Batches,
    *,
    micro_rows: int,
    validation: Tensor | None = None,
    validate_every: int = 0,
) -> dict[str, Any]:
    """AdamW and cosine over all `batches`; the times of the steps leave validation out."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    seconds: list[float] = []
    curve: list[dict[str, float]] = []
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, len(batches))
        parts = torch.from_numpy(batch.astype(np.int64)).split(micro_rows)
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            (loss(part) / len(parts)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        if validation is not None and (step + 1) % validate_every == 0:
            with torch.no_grad():
                losses = [float(loss(part)) * len(part) for part in validation.split(64)]
            curve.append({"step": step + 1, "seconds": sum(seconds), "validation_loss": sum(losses) / len(validation)})
    return {"seconds": seconds, "curve": curve}


def hf_trainer(model: nn.Module, batches: Batches, *, micro_rows: int) -> dict[str, Any]:
    """`transformers.Trainer` with a fused AdamW, no evaluation, no checkpoint and no reports."""
    rows = [
        {"input_ids": row, "labels": row} for row in torch.from_numpy(batches[:, :, :-1].astype(np.int64)).flatten(0, 1)
    ]
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, use_cpu=True, per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=batches.shape[1] // micro_rows, max_steps=len(batches),
            learning_rate=LEARNING_RATE, weight_decay=_WEIGHT_DECAY, lr_scheduler_type="cosine",
            optim="adamw_torch_fused", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Clock()]).train()
    return {"seconds": np.diff(times).tolist(), "curve": []}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=("bare", "bare_fused_loss", "trainer", "small_gpt"))
    parser.add_argument("batches", help="a .npy file of token ids, [steps, rows, length + 1]")
    for name in ("vocab", "length", "width", "layers", "heads", "inner", "micro_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation", help="a .npy file of token ids, [rows, length + 1]")
    parser.add_argument("--validate-every", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    batches = np.load(options.batches)
    if options.loop == "small_gpt":
        model: nn.Module = SmallGpt(options.vocab, options.length, options.width, options.layers, options.heads)
    else:
        model = _llama(options)
    if options.loop == "trainer":
        found = hf_trainer(model, batches, micro_rows=options.micro_rows)
    else:
        loss = _fused_loss(model) if options.loop == "bare_fused_loss" else _plain_loss(model)
        validation = torch.from_numpy(np.load(options.validation).astype(np.int64)) if options.validation else None
        found = train(model, loss, batches, micro_rows=options.micro_rows, validation=validation,
                      validate_every=options.validate_every)  # fmt: skip
    parameters = sum(w.numel() for w in model.parameters())
    json.dump({"parameters": parameters, "positions": batches.shape[1] * (batches.shape[2] - 1), **found}, sys.stdout)


if __name__ == "__main__":
    _main()
