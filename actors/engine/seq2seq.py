"""Encoder-decoder models: each source is read once, and then many targets are generated together.

A step seats waiting requests, has the encoder (`transformers`' own modules) read some of their sources in a batch of
like length, and gives every sequence that is past that its next token: schedule -> run -> sample -> emit, with the
scheduler, the cache and the sampling of the decoder-only engine. Guarantees and contract are the same too. What a
request's `prompt_ids` hold is the source, with what the tokenizer puts around it (`encode_source`); the target begins
with the tokens that the model's generation config names.
"""

# ruff: noqa: N806 - names end in the shape of their tensor: N token of a step, V vocabulary, B source, T token

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from actors.engine import seq2seq_weights
from actors.engine.batching import LengthQueue
from actors.engine.cache import KVCache
from actors.engine.emission import emit, wanted
from actors.engine.kernels import kernels_kind
from actors.engine.linear import pack
from actors.engine.padding import padded, present
from actors.engine.pretrained import (
    Precision,
    check_vocabulary,
    load_modules,
    placement,
    read_config,
    refuse_int8,
)
from actors.engine.request import Completion, Request, TokenEvent
from actors.engine.runner import check_kind, run_to_end
from actors.engine.scheduler import Scheduler, Turn
from actors.engine.seq2seq_decoder import Seq2SeqDecoder
from actors.engine.sequence import Sequence
from actors.engine.shortage import in_parts, no_memory
from actors.engine.sources import Source, SourceRows
from actors.engine.structured import Structures
from actors.text import Text
from configs.errors import ArtifactError, EngineError, OverloadedError, RequestError

_BUILDERS = {"bart": seq2seq_weights.bart, "t5": seq2seq_weights.t5}
MODEL_TYPES = tuple(_BUILDERS)
"""What is run by this module."""

_T5_WINDOW = 512
"""T5 has no positions to run out of; this is what it was trained with."""


class Target(Sequence):
    """A sequence whose keys and values are of no use to any other, as they depend on its source."""

    @property
    def reusable(self) -> int:
        """None of its tokens."""
        return 0


@dataclass(frozen=True, eq=False)
class _Flight:
    """A request in flight."""

    source: Source
    target: Target


@dataclass(frozen=True)
class Frame:
    """What the generation config says of a target's first and last token."""

    start: tuple[int, ...]
    """The tokens it begins with; they are no part of what is generated."""
    last: frozenset[int]
    """What the last token is made when the target ends for want of room; empty leaves it as it is."""

    @classmethod
    def of(cls, generation: Any, folder: Path) -> Self:
        """Reads a `transformers` generation config; raises `ArtifactError` if it names no first token."""
        first = generation.decoder_start_token_id
        first = generation.bos_token_id if first is None else first
        if first is None:
            raise ArtifactError(
                f"{folder}: neither config.json nor generation_config.json says what a target begins with",
                allowed="decoder_start_token_id",
                next_step="use the config files that were published with the model",
            )
        forced = generation.forced_eos_token_id
        start = (first,) if generation.forced_bos_token_id is None else (first, generation.forced_bos_token_id)
        return cls(start, frozenset(() if forced is None else forced if isinstance(forced, list) else [forced]))


class Seq2SeqEngine:
    """Generates from many sources at once. Made by `Seq2SeqEngine.load`. Not thread-safe."""

    def __init__(
        self,
        encoder: Any,
        decoder: Seq2SeqDecoder,
        text: Text,
        frame: Frame,
        *,
        context_length: int,
        max_sequences: int,
        cache_tokens: int,
        max_queued: int,
        batch_tokens: int,
    ) -> None:
        self.text = text
        self.structures = Structures(text)
        """Compiles what texts are held to; any thread may have it do so ahead of a request."""
        self.context_length = context_length
        """Most tokens of a source, and of a target with those that it begins with."""
        self.kernels = kernels_kind(decoder.dtype, decoder.device)
        """What runs the products: `compiled` functions, or `torch`."""
        self.cache_tokens = cache_tokens
        """Tokens of targets whose keys and values are held, and as many of sources."""
        self._encoder = encoder
        self._decoder = decoder
        self._frame = frame
        self._max_sequences = max_sequences
        self._max_queued = max_queued
        self._cache, self._cross_cache = (self._new_cache(cache_tokens) for _ in range(2))
        self._source_rows = SourceRows(capacity=cache_tokens, longest=context_length)
        self._scheduler = Scheduler(
            cache_tokens=cache_tokens,
            longest=context_length,
            max_sequences=max_sequences,
            max_queued=0,
            prefill_tokens=batch_tokens,
            mixed_prefill_tokens=batch_tokens,
        )
        self._cache.arrange(rows=self._scheduler.rows.count, width=self._scheduler.rows.width)
        self._cross_cache.arrange(rows=self._source_rows.count, width=self._source_rows.width)
        self._flights: dict[str, _Flight] = {}
        self._waiting: deque[str] = deque()
        """Requests whose sources have no row yet, in order of arrival."""
        self._unread = LengthQueue(batch_tokens)
        """Requests whose sources have a row but were not read yet."""
        self._ready: dict[str, TokenEvent] = {}
        """Events of requests that had nothing to generate, for the next step to return."""

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        context_length: int | None = None,
        max_sequences: int = 16,
        cache_tokens: int | None = None,
        max_queued: int = 128,
        batch_tokens: int = 1024,
        precision: Precision = "auto",
        device: str = "auto",
    ) -> Self:
        """Opens a model folder.

        Args:
            folder: `config.json`, safetensors weights and a fast tokenizer.
            context_length: most tokens of a source and of a target; what the model was made for unless set. Only T5,
                whose positions are relative, can take more than that.
            max_sequences: targets generated together.
            cache_tokens: positions of either cache of keys and values, the targets' and the sources';
                `max_sequences` windows unless set.
            max_queued: requests that may wait before `submit` refuses.
            batch_tokens: tokens that the encoder reads in one step, padding included; bounds how long new sources
                delay the targets under way. One source alone may be longer.
            precision: `auto` is bf16 on a GPU and on processors with bf16 arithmetic, fp32 elsewhere.
            device: a torch device; `auto` is the first GPU if there is one.

        Raises `ArtifactError` for a folder that is not a supported model, `ContractError` if its tokenizer is not the
        one it was trained with, `EngineError` if there is no memory for the caches.
        """
        text, config = Text.load(folder), read_config(folder)
        if config.model_type not in MODEL_TYPES:
            raise ArtifactError(
                f"{folder / 'config.json'}: this model_type is not run as an encoder-decoder",
                received=config.model_type,
                allowed=", ".join(MODEL_TYPES),
            )
        check_vocabulary(folder, text.vocab_size, config)
        window = _window(config, context_length)
        cache_tokens = max_sequences * window if cache_tokens is None else cache_tokens
        window = min(window, cache_tokens)
        refuse_int8(precision, folder, "an encoder-decoder")
        dtype, where = placement(precision, device)
        from transformers import AutoModelForSeq2SeqLM

        model = load_modules(folder, AutoModelForSeq2SeqLM, dtype=dtype, device=where)
        with torch.no_grad():
            decoder = _BUILDERS[config.model_type](model, window)
        pack(model.get_encoder())
        return cls(
            model.get_encoder(),
            decoder,
            text,
            Frame.of(model.generation_config, folder),
            context_length=window,
            max_sequences=max_sequences,
            cache_tokens=cache_tokens,
            max_queued=max_queued,
            batch_tokens=batch_tokens,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._flights or self._ready)

    def encode_source(self, text: str) -> tuple[int, ...]:
        """The `prompt_ids` of a source text."""
        return self.text.encode_input(text).token_ids

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `RequestError` if it cannot be served, `OverloadedError` if the queue is full.

        Requests that the next step takes from the queue do not count towards its bound.
        """
        self._add(request, bounded=True)

    def cancel(self, request_id: str) -> None:
        """Drops a request at once, without a further event; one that has ended already is no error."""
        self._ready.pop(request_id, None)
        flight = self._flights.get(request_id)
        if flight is not None:
            self._unread.remove(request_id)
            self._scheduler.remove([flight.target])
            self._forget(request_id)

    def step(self) -> list[TokenEvent]:
        """Reads a batch of sources and runs every scheduled token once; what there is to show for it."""
        events = list(self._ready.values())
        self._ready.clear()
        self._seat()
        events += self._read()
        step = self._scheduler.schedule()
        self._cache.obey(step.commands)
        if not step.turns:
            return events
        ended: list[Sequence] = []
        for turn, event in self._run(step.turns):
            target = turn.sequence
            length = len(self._flights[event.request_id].source.tokens)
            if event.finish_reason == "stop" and len(target.tokens) == target.max_tokens and self._forces(target):
                # The end token that the last token was made does not mean that the text was at its end.
                event = replace(event, finish_reason="length")
            events.append(replace(event, prompt_tokens=length))
            if event.error is not None:
                self._scheduler.discard(target)
                self._forget(event.request_id, spoiled=True)
            elif event.finish_reason is not None:
                ended.append(target)
                self._forget(event.request_id)
        self._scheduler.remove(ended)
        return events

    def generate(self, requests: Items[Request]) -> list[Completion]:
        """Runs requests to their end, however many; completions in the order of the requests.

        Raises `RequestError` before anything runs if one of them cannot be served, and `EngineError` if other
        requests are in flight (their events would be lost).
        """
        ended = run_to_end(self, requests, partial(self._add, bounded=False))
        return [Completion.of(events) for events in ended]

    def _add(self, request: Request, *, bounded: bool) -> None:
        self._check(request)
        framed = replace(request, prompt_ids=self._frame.start)
        matcher = self.structures.matcher(request.sampling.structure)
        target = Target.start(framed, self.text, context_length=self.context_length, matcher=matcher)
        if not target.generates:
            self._ready[request.id] = replace(target.end(), prompt_tokens=len(request.prompt_ids))
            return
        free = self._max_sequences - (len(self._flights) - len(self._waiting))
        if bounded and len(self._waiting) >= free + self._max_queued:
            raise OverloadedError(
                "the request queue is full",
                received=f"{len(self._waiting)} requests waiting",
                allowed=f"{self._max_queued} waiting",
                next_step="try again later, or raise max_queued or the number of replicas",
            )
        self._flights[request.id] = _Flight(Source(request.prompt_ids), target)
        self._waiting.append(request.id)

    def _check(self, request: Request) -> None:
        check_kind(request, Request, "generates, and neither classifies nor embeds")
        if request.id in self._flights or request.id in self._ready:
            raise RequestError("a request with this id is in flight", param="id", received=request.id)
        # The target has a window of its own, so that a source may fill its own to the end.
        window = self.context_length + (request.sampling.max_new_tokens > 0)
        request.check(context_length=window, vocab=self._decoder.shape.vocab)
        if request.sampling.prompt_logprobs is not None:
            raise RequestError(
                "an encoder-decoder model reads its source as a whole, and has no log-probabilities for it",
                param="prompt_logprobs",
                allowed="logprobs of what is generated",
            )

    def _seat(self) -> None:
        """Gives rows of the sources' cache to those that wait, first come, first served."""
        seated = len(self._flights) - len(self._waiting)
        while self._waiting and seated < self._max_sequences:
            flight = self._flights[self._waiting[0]]
            if not self._source_rows.seat(flight.source):
                break
            flight.target.began = time.monotonic()
            self._unread.add(self._waiting.popleft(), len(flight.source.tokens))
            seated += 1
        self._cross_cache.obey(self._source_rows.take_commands())

    def _read(self) -> list[TokenEvent]:
        """Has the encoder read a batch of sources, whose targets can begin then; events of those it cannot read."""
        batch = self._unread.take()
        return in_parts(self._read_once, batch, self._unreadable) if batch else []

    @torch.inference_mode()
    def _read_once(self, batch: Items[str]) -> list[TokenEvent]:
        flights = [self._flights[key] for key in batch]
        tokens = [flight.source.tokens for flight in flights]
        device = self._decoder.device
        mask_BT = present(tokens, device)
        output = self._encoder(input_ids=padded(tokens, 0, device), attention_mask=mask_BT.long())
        hidden_SC = output.last_hidden_state[mask_BT].to(self._decoder.dtype)
        self._decoder.read_sources(hidden_SC, [flight.source for flight in flights], self._cross_cache)
        for flight in flights:
            self._scheduler.add(flight.target, bounded=False)
        return []

    def _unreadable(self, request_id: str, message: str) -> list[TokenEvent]:
        """The end of a request whose source there is no memory for."""
        flight = self._flights[request_id]
        length = len(flight.source.tokens)
        error = no_memory(f"a source of {length} tokens", message, "shorten the source")
        self._forget(request_id)
        return [replace(flight.target.fail(error), prompt_tokens=length)]

    def _run(self, turns: Items[Turn]) -> list[tuple[Turn, TokenEvent]]:
        """Runs turns and draws from their logits; in parts if the device has no memory for all of them at once."""
        return in_parts(self._run_once, turns, self._run_piece)

    @torch.inference_mode()
    def _run_once(self, turns: Items[Turn]) -> list[tuple[Turn, TokenEvent]]:
        """Nothing has changed but rows behind what is `cached` if this runs out of memory."""
        sources = [self._flights[turn.sequence.request.id].source for turn in turns]
        hidden_NC = self._decoder.forward([turn.span for turn in turns], sources, self._cache, self._cross_cache)
        rows = wanted(turns)
        logits_NV = self._decoder.logits(hidden_NC if len(rows) == len(hidden_NC) else hidden_NC[rows])
        # A turn has one row of logits, that of its last token, as targets' beginnings are not scored.
        for row, turn in enumerate(turns):
            target = turn.sequence
            if turn.completes and len(target.tokens) + 1 == target.max_tokens and self._forces(target):
                only_V = torch.full_like(logits_NV[row], float("-inf"))
                only_V[list(self._frame.last)] = 0
                logits_NV[row] += only_V
        events = emit(logits_NV, turns)
        for turn in turns:
            turn.sequence.cached = turn.span.stop
        return events

    def _run_piece(self, turn: Turn, message: str) -> list[tuple[Turn, TokenEvent]]:
        """Half of a turn that is too long; the rest is scheduled again."""
        span = turn.span
        if len(span.tokens) > 1:
            return self._run([replace(turn, span=replace(span, tokens=span.tokens[: len(span.tokens) // 2]))])
        remedy = "lower cache_tokens or max_sequences, or shorten the source"
        return [(turn, turn.sequence.fail(no_memory(f"position {span.start}", message, remedy)))]

    def _forces(self, target: Sequence) -> bool:
        """Whether a target's last token is made an end token, unless the request has a say in that itself."""
        sampling = target.request.sampling
        return bool(self._frame.last) and sampling.structure is None and sampling.min_tokens < sampling.max_new_tokens

    def _forget(self, request_id: str, *, spoiled: bool = False) -> None:
        source = self._flights.pop(request_id).source
        if source.row >= 0:
            self._source_rows.leave(source, spoiled=spoiled)
        else:
            self._waiting.remove(request_id)

    def _new_cache(self, capacity: int) -> KVCache:
        shape = self._decoder.shape
        return KVCache(
            layers=shape.layers,
            kv_heads=shape.heads,
            head_dim=shape.head_dim,
            capacity=capacity,
            dtype=self._decoder.dtype,
            device=self._decoder.device,
        )


def _window(config: Any, asked: int | None) -> int:
    """Most tokens of a source and of a target."""
    if config.model_type == "t5":
        own: int = getattr(config, "n_positions", _T5_WINDOW)
        return own if asked is None else asked
    own = config.max_position_embeddings
    if asked is not None and asked > own:
        raise EngineError(
            "the model has no positions for a window of this length",
            received=f"context_length {asked}",
            allowed=f"at most {own}",
        )
    return own if asked is None else asked
