"""Continuous batching: many requests decode together, each joins and leaves at any step.

A step reads: schedule -> run -> sample -> emit. Guarantees: every submitted request that is not cancelled ends exactly
once; its tokens depend on the model, its prompt and its sampling settings, not on what it shared steps with, nor on
whether it had to give up its place for a while or found part of its prompt computed (up to the rounding of matrix
products, which depends on the number of rows). Not thread-safe: `stream.AsyncEngine` gives an engine a thread of its
own. One device; decoder-only models.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F

from actors.engine.adapter_loading import check_text, load_adapter, not_lean
from actors.engine.adapters import Adapter
from actors.engine.decoder import LeanDecoder
from actors.engine.emission import emit, wanted
from actors.engine.kernels import kernels_kind
from actors.engine.modules import Decoder, DecoderChoice, load_decoder
from actors.engine.pretrained import Precision, check_vocabulary, placement, read_config
from actors.engine.request import Completion, Request, TokenEvent
from actors.engine.runner import check_kind, run_to_end
from actors.engine.scheduler import Scheduler, Span, Turn
from actors.engine.sequence import Sequence
from actors.engine.shortage import in_parts, no_memory
from actors.engine.structured import Structures
from actors.text import Text
from configs.errors import RequestError

_MIXED_PREFILL_TOKENS = 10
"""Prompt tokens in a step beside those that each decoding sequence allows, on a CPU. A step of few rows costs what 7
rows do, plus its rows: `product.c` takes 0.76 ms for 1 row times 512 x 8192, 1.37 for 8, 1.75 for 16, 3.2 for 32 and 24
for 256 on one AVX2 core. The scheduler's share of 1.5 times that is the delay of one and a half steps."""

_CPU_CACHE_BYTES = 4 << 30
_SCORE_TOKENS = 2048
"""Tokens scored at once: bounds the logits held, 32 MB for a vocabulary of 4096."""


class Engine:
    """Generates for many requests at once. Made by `Engine.load`."""

    def __init__(
        self,
        decoder: Decoder,
        text: Text,
        *,
        max_sequences: int,
        cache_tokens: int | None,
        max_queued: int,
        prefill_tokens: int,
        mixed_prefill_tokens: int,
    ) -> None:
        capacity = _capacity(decoder, max_sequences) if cache_tokens is None else cache_tokens
        self.text = text
        self.cache_tokens = capacity
        """Tokens whose keys and values are held."""
        self.context_length = min(decoder.context, capacity)
        """Most tokens of a request, prompt and completion together."""
        self.structures = Structures(text)
        """Compiles what texts are held to; any thread may have it do so ahead of a request."""
        self._decoder = decoder
        self._scheduler = Scheduler(
            cache_tokens=capacity,
            longest=self.context_length,
            max_sequences=max_sequences,
            max_queued=max_queued,
            prefill_tokens=prefill_tokens,
            mixed_prefill_tokens=mixed_prefill_tokens,
        )
        rows = self._scheduler.rows
        self._cache = decoder.new_cache(capacity)
        self.kernels = kernels_kind(self._cache.dtype, self._cache.device)
        """What runs the products: `compiled` functions, or `torch`."""
        self._cache.arrange(rows=rows.count, width=rows.width)
        self.tokens_run = 0
        """Tokens that went through the model; those found in the cache did not."""
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
        mixed_prefill_tokens: int | None = None,
        precision: Precision = "auto",
        device: str = "auto",
        decoder: DecoderChoice = "auto",
    ) -> Self:
        """Opens a model folder.

        Args:
            folder: `config.json`, safetensors weights and tokenizer files.
            max_sequences: sequences decoded together.
            cache_tokens: tokens whose keys and values are held, of all sequences together; bounds the memory. When
                it is full, the youngest sequences wait and are run again. If it is less than a context window, no
                request can be longer. Unless set, a window for each sequence, on a CPU as many as 4 GiB hold.
            max_queued: requests that may wait before `submit` refuses.
            prefill_tokens: prompt tokens run in one step at most.
            mixed_prefill_tokens: the same beside sequences that decode. Unless set, on a CPU so few that a long
                prompt delays none of their tokens by more than the time of two steps, elsewhere as many.
            precision: `auto` is bf16 on a GPU and on processors with bf16 arithmetic, fp32 elsewhere; `int8` rounds the
                weights of Llama-shaped models to that, on a CPU with a C compiler, and computes in fp32.
            device: a torch device; `auto` is the first GPU if there is one.
            decoder: `lean` for models shaped like Llama, `modules` for any other; `auto` takes the lean one if it
                can run the model.

        Raises `ArtifactError` for a folder that is not a supported model, `ContractError` if its tokenizer is not the
        one it was trained with.
        """
        text = Text.load(folder)
        dtype, where = placement(precision, device)
        if mixed_prefill_tokens is None:
            mixed_prefill_tokens = _MIXED_PREFILL_TOKENS if where.type == "cpu" else prefill_tokens
        check_vocabulary(folder, text.vocab_size, read_config(folder))
        return cls(
            load_decoder(folder, decoder, dtype=dtype, device=where, precision=precision),
            text,
            max_sequences=max_sequences,
            cache_tokens=cache_tokens,
            max_queued=max_queued,
            prefill_tokens=prefill_tokens,
            mixed_prefill_tokens=mixed_prefill_tokens,
        )

    @property
    def decoder_kind(self) -> str:
        """What runs the model: the `lean` decoder, its own `modules`, or `recurrent` for the LSTM baseline."""
        return self._decoder.kind

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._ready) or self._scheduler.has_work

    @property
    def preemptions(self) -> int:
        """Times a running request had to wait because the cache was full."""
        return self._scheduler.preemptions

    def load_adapter(self, folder: Path, key: str) -> Adapter:
        """Opens the adapter of an artifact for requests; any thread may ask for it.

        Args:
            folder: of the artifact: the adapter, and the tokenizer files it was trained with.
            key: tells it from other adapters, and never stands for two.

        Raises `ArtifactError` if there is no adapter that this model can be run with, `CorruptArtifactError` if it
        cannot be read, `ContractError` if it was trained with another tokenizer or chat template than the model's.
        """
        if not isinstance(self._decoder, LeanDecoder):
            raise not_lean(f"it runs through {self.decoder_kind}")
        check_text(folder, self.text)
        return load_adapter(self._decoder, folder, key)

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
        step = self._scheduler.schedule()
        self._cache.obey(step.commands)
        if not step.turns:
            return events
        ended: list[Sequence] = []
        for turn, event in self._run(step.turns):
            events.append(event)
            if event.error is not None:
                self._scheduler.discard(turn.sequence)
            if event.finish_reason is not None:
                ended.append(turn.sequence)
        self._forget(ended)
        return events

    def generate(self, requests: Items[Request]) -> list[Completion]:
        """Runs requests to their end, however many; completions in the order of the requests.

        Raises `RequestError` before anything runs if one of them cannot be served, and `EngineError` if other
        requests are in flight (their events would be lost).
        """
        ended = run_to_end(self, requests, partial(self._add, bounded=False))
        return [Completion.of(events) for events in ended]

    @torch.inference_mode()
    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood, in nats, of each token of `rows` [B, T + 1] after the first; fp32 [B, T] on CPU.

        Independent of requests in flight. Raises `RequestError` for rows that do not fit the model's context window or
        vocabulary.
        """
        context, vocab = self._decoder.context, self._decoder.vocab
        length = rows.shape[1] - 1
        if not 0 < length <= context:
            raise RequestError(
                "rows cannot be scored", received=f"{length + 1} tokens", allowed=f"2 to {context + 1} tokens"
            )
        if int(rows.min()) < 0 or int(rows.max()) >= vocab:
            raise RequestError(
                "rows hold token ids the model does not know",
                received=f"{int(rows.min())} to {int(rows.max())}",
                allowed=f"0 to {vocab - 1}",
                next_step="score rows that were encoded with the model's own tokenizer",
            )
        group = max(1, _SCORE_TOKENS // length)
        return torch.cat([self._score_group(part) for part in rows.split(group)])

    def _score_group(self, rows: torch.Tensor) -> torch.Tensor:
        length = rows.shape[1] - 1
        cache = self._decoder.new_cache(len(rows) * length)
        cache.arrange(rows=len(rows), width=length)
        spans = [Span(row, 0, tokens) for row, tokens in enumerate(rows[:, :-1].tolist())]
        logits = self._decoder.run(spans, cache, range(len(rows) * length))
        targets = rows[:, 1:].flatten().to(logits.device)
        return F.cross_entropy(logits, targets, reduction="none").view(len(rows), length).cpu()

    def _add(self, request: Request, *, bounded: bool) -> None:
        check_kind(request, Request, "generates, and neither classifies nor embeds")
        if request.id in self._sequences or request.id in self._ready:
            raise RequestError("a request with this id is in flight", param="id", received=request.id)
        request.check(context_length=self.context_length, vocab=self._decoder.vocab)
        matcher = self.structures.matcher(request.sampling.structure)
        sequence = Sequence.start(request, self.text, context_length=self.context_length, matcher=matcher)
        if not (sequence.generates or sequence.scores_prompt):
            self._ready[request.id] = sequence.end()
            return
        self._scheduler.add(sequence, bounded=bounded)
        self._sequences[request.id] = sequence

    def _run(self, turns: Items[Turn]) -> list[tuple[Turn, TokenEvent]]:
        """Runs turns and draws from their logits; in parts if the device has no memory for all of them at once."""
        return in_parts(self._run_once, turns, self._run_piece)

    def _run_once(self, turns: Items[Turn]) -> list[tuple[Turn, TokenEvent]]:
        """Nothing has changed but rows behind what is `cached` if this runs out of memory."""
        with torch.inference_mode():
            logits = self._decoder.run([turn.span for turn in turns], self._cache, wanted(turns))
        events = emit(logits, turns)
        for turn in turns:
            turn.sequence.cached = turn.span.stop
            self.tokens_run += len(turn.span.tokens)
        return events

    def _run_piece(self, turn: Turn, message: str) -> list[tuple[Turn, TokenEvent]]:
        """Half of a turn that is too long; the rest is scheduled again."""
        span = turn.span
        if len(span.tokens) > 1:
            return self._run([replace(turn, span=replace(span, tokens=span.tokens[: len(span.tokens) // 2]))])
        remedy = "lower cache_tokens or max_sequences, or shorten the prompt"
        return [(turn, turn.sequence.fail(no_memory(f"position {span.start}", message, remedy)))]

    def _forget(self, sequences: Items[Sequence]) -> None:
        if sequences:
            self._scheduler.remove(sequences)
        for sequence in sequences:
            del self._sequences[sequence.request.id]


def _capacity(decoder: Decoder, max_sequences: int) -> int:
    """Tokens that the cache holds unless it is told: a window a sequence, on a CPU within 4 GiB, but one at least."""
    smallest = decoder.new_cache(1)
    if smallest.device.type != "cpu":
        return decoder.context * max_sequences
    return max(decoder.context, min(decoder.context * max_sequences, _CPU_CACHE_BYTES // smallest.nbytes))
