"""Continuous batching: many requests decode together, each joins and leaves at any step.

A step reads: schedule -> run -> sample -> emit. Guarantees: every submitted request that is not cancelled ends exactly
once; its tokens depend on the model, its prompt and its sampling settings, not on what it shared steps with (up to
the rounding of matrix products, which depends on the number of rows). Not thread-safe: `stream.AsyncEngine` gives an
engine a thread of its own. One device; Llama-architecture decoders.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
import torch.nn.functional as F

from actors.engine.decoder import LlamaDecoder
from actors.engine.emission import emit, wanted
from actors.engine.request import Completion, Request, TokenEvent
from actors.engine.scheduler import Scheduler, Span, Turn
from actors.engine.sequence import Sequence
from actors.text import Text
from configs.errors import ContractError, EngineError, RequestError

if TYPE_CHECKING:
    from actors.engine.structured import Structures

Precision = Literal["auto", "bf16", "fp32"]

_SCORE_TOKENS = 2048
"""Tokens scored at once: bounds the logits held, 32 MB for a vocabulary of 4096."""


class Engine:
    """Generates for many requests at once. Made by `Engine.load`."""

    def __init__(
        self,
        decoder: LlamaDecoder,
        text: Text,
        *,
        context_length: int,
        max_sequences: int,
        max_queued: int,
        prefill_tokens: int,
    ) -> None:
        self.text = text
        self.context_length = context_length
        """Most tokens of a request, prompt and completion together."""
        self._decoder = decoder
        self._cache = decoder.new_cache(slots=max_sequences, positions=context_length)
        self._scheduler = Scheduler(max_sequences=max_sequences, max_queued=max_queued, prefill_tokens=prefill_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._ready: dict[str, TokenEvent] = {}
        """Events of requests that had nothing to generate, for the next step to return."""

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        max_sequences: int = 16,
        cache_tokens: int | None = None,
        max_queued: int = 128,
        prefill_tokens: int = 256,
        precision: Precision = "auto",
        device: str = "auto",
    ) -> Self:
        """Opens a model folder.

        Args:
            folder: `config.json`, safetensors weights and tokenizer files.
            max_sequences: sequences decoded together.
            cache_tokens: positions of the key/value cache, shared out evenly among the sequences; shortens the
                context window if that is less than the model's. The model's window for each unless set.
            max_queued: requests that may wait before `submit` refuses.
            prefill_tokens: prompt tokens run in one step; bounds how long a long prompt delays those that decode.
            precision: `auto` is bf16 on a GPU and on processors with bf16 arithmetic, fp32 elsewhere.
            device: a torch device; `auto` is the first GPU if there is one.

        Raises `ArtifactError` for a folder that is not a supported model, `ContractError` if its tokenizer is not the
        one it was trained with.
        """
        text = Text.load(folder)
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        decoder = LlamaDecoder.load(folder, dtype=_dtype(precision, where), device=where)
        if text.vocab_size > decoder.shape.vocab:
            raise ContractError(
                f"the tokenizer in {folder} has more tokens than the model",
                received=text.vocab_size,
                allowed=f"at most {decoder.shape.vocab}",
                next_step="use the tokenizer files that were published with the model",
            )
        context = decoder.shape.context
        if cache_tokens is not None:
            context = min(context, cache_tokens // max_sequences)
        return cls(
            decoder,
            text,
            context_length=context,
            max_sequences=max_sequences,
            max_queued=max_queued,
            prefill_tokens=prefill_tokens,
        )

    @cached_property
    def structures(self) -> Structures:
        """What compiles the structures that requests ask for; may be asked from any thread, which keeps them."""
        # Here and not above: an engine that is asked for no structure needs no llguidance.
        from actors.engine.structured import Structures

        return Structures(self.text)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._ready) or self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `RequestError` if it cannot be served, `OverloadedError` if the queue is full."""
        self._add(request, bounded=True)

    def cancel(self, request_id: str) -> None:
        """Drops a request at once, without a further event; one that has ended already is no error."""
        self._ready.pop(request_id, None)
        if request_id in self._sequences:
            self._forget([self._sequences[request_id]])

    def step(self) -> list[TokenEvent]:
        """Runs every scheduled token once; returns what the requests that got a token have to show for it."""
        events = list(self._ready.values())
        self._ready.clear()
        turns = self._scheduler.schedule()
        if not turns:
            return events
        ended: list[Sequence] = []
        for turn, event in emit(self._run(turns), turns):
            events.append(event)
            if event.error is not None:
                # What spoiled the logits may be in the cache, where it would spread to the slot's next sequence.
                self._cache.clear(turn.span.slot)
            if event.finish_reason is not None:
                ended.append(turn.sequence)
        self._forget(ended)
        return events

    def generate(self, requests: Items[Request]) -> list[Completion]:
        """Runs requests to their end, however many; completions in the order of the requests.

        Raises `RequestError` before anything runs if one of them cannot be served, and `EngineError` if other
        requests are in flight (their events would be lost).
        """
        if self.has_work:
            raise EngineError("generate was called while other requests are in flight")
        events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        try:
            for request in requests:
                self._add(request, bounded=False)
            while self.has_work:
                for event in self.step():
                    events[event.request_id].append(event)
        finally:
            self._ready.clear()
            self._forget(list(self._sequences.values()))
        return [Completion.of(events[request.id]) for request in requests]

    @torch.inference_mode()
    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood, in nats, of each token of `rows` [B, T + 1] after the first; fp32 [B, T] on CPU.

        Independent of requests in flight. Raises `RequestError` for rows that do not fit the model's context window or
        vocabulary.
        """
        shape = self._decoder.shape
        length = rows.shape[1] - 1
        if not 0 < length <= shape.context:
            raise RequestError(
                "rows cannot be scored", received=f"{length + 1} tokens", allowed=f"2 to {shape.context + 1} tokens"
            )
        if int(rows.min()) < 0 or int(rows.max()) >= shape.vocab:
            raise RequestError(
                "rows hold token ids the model does not know",
                received=f"{int(rows.min())} to {int(rows.max())}",
                allowed=f"0 to {shape.vocab - 1}",
                next_step="score rows that were encoded with the model's own tokenizer",
            )
        group = max(1, _SCORE_TOKENS // length)
        return torch.cat([self._score_group(part) for part in rows.split(group)])

    def _score_group(self, rows: torch.Tensor) -> torch.Tensor:
        length = rows.shape[1] - 1
        cache = self._decoder.new_cache(slots=len(rows), positions=length)
        spans = [Span(slot, 0, tokens) for slot, tokens in enumerate(rows[:, :-1].tolist())]
        logits = self._decoder.logits(self._decoder.forward(spans, cache))
        targets = rows[:, 1:].flatten().to(logits.device)
        return F.cross_entropy(logits, targets, reduction="none").view(len(rows), length).cpu()

    def _add(self, request: Request, *, bounded: bool) -> None:
        if request.id in self._sequences or request.id in self._ready:
            raise RequestError("a request with this id is in flight", param="id", received=request.id)
        request.check(context_length=self.context_length, vocab=self._decoder.shape.vocab)
        structure = request.sampling.structure
        matcher = None if structure is None else self.structures.matcher(structure)
        sequence = Sequence.start(request, self.text, context_length=self.context_length, matcher=matcher)
        if not (sequence.generates or sequence.scores_prompt):
            self._ready[request.id] = sequence.end()
            return
        self._scheduler.add(sequence, bounded=bounded)
        self._sequences[request.id] = sequence

    @torch.inference_mode()
    def _run(self, turns: Items[Turn]) -> torch.Tensor:
        """Runs a step; the logits that `emit` needs."""
        hidden = self._decoder.forward([turn.span for turn in turns], self._cache)
        for turn in turns:
            turn.sequence.cached = turn.span.stop
        rows = wanted(turns)
        return self._decoder.logits(hidden if len(rows) == len(hidden) else hidden[rows])

    def _forget(self, sequences: Items[Sequence]) -> None:
        if not sequences:
            return
        for sequence in sequences:
            del self._sequences[sequence.request.id]
        for move in self._scheduler.remove(sequences):
            self._cache.move(move)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
