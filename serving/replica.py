"""An engine replica: the inference engine, asked for whole answers or piece by piece.

Guarantees: the prompts of a call are admitted together or refused together; whatever ends a call early (a client that
goes away, a refusal of one of its prompts, an error) cancels the rest of it in the engine. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import EngineError, GanymedeError, RequestError
from configs.schema.generation import Sampling
from configs.schema.serving import ServingConfig
from serving.calls import Call, Piece, Refusal, ReplicaStatus, ServedModel

if TYPE_CHECKING:
    from actors.engine.request import Request, TokenEvent

SEED_BITS = 63


class EngineReplica:
    """One engine with the model's weights; a Ray Serve deployment wraps it."""

    def __init__(self, model: ServedModel, config: ServingConfig) -> None:
        # Here and not above: the driver and the ingress import this module, and torch takes seconds and 300 MB.
        from actors.engine.engine import Engine
        from actors.engine.stream import AsyncEngine

        engine = Engine.load(
            Path(model.folder),
            max_sequences=config.max_sequences,
            max_queued=config.max_queued,
            precision=config.precision,
        )
        self._digest = model.digest
        self._text = engine.text
        self._context_length = engine.context_length
        self._max_prompts = config.max_queued
        self._engine = AsyncEngine(engine)

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers, in batches: pieces that have come since the last one, or all of them whole."""
        parts: dict[int, list[Piece]] = {}
        try:
            async with aclosing(self._events(self._requests(call))) as batches:
                async for batch in batches:
                    pieces = [_piece(index, event) for index, event in batch]
                    if not call.whole:
                        yield pieces
                        continue
                    for piece in pieces:
                        parts.setdefault(piece.index, []).append(piece)
        except GanymedeError as error:
            yield Refusal.of(error)
        except _ContextExceededError as error:
            yield error.refusal
        else:
            if call.whole:
                yield [replace(p[-1], text="".join(piece.text for piece in p)) for _, p in sorted(parts.items())]

    async def status(self) -> ReplicaStatus:
        """Asked by `/health`: answers only once the model is loaded."""
        return ReplicaStatus(self._digest, self._engine.healthy, self._context_length, self._text.has_chat_template)

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        if self._engine.error is not None:
            raise self._engine.error

    def close(self) -> None:
        """Ends the engine's thread; requests in flight end with an error."""
        self._engine.close()

    async def _events(self, requests: Sequence[Request]) -> AsyncGenerator[list[tuple[int, TokenEvent]], None]:
        """The engine's events of several requests, merged; raises the first error of any of them."""
        arrived: asyncio.Queue[tuple[int, TokenEvent] | BaseException] = asyncio.Queue()

        async def pump(index: int, request: Request) -> None:
            try:
                async for event in self._engine.stream(request):
                    arrived.put_nowait((index, event))
            except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
        try:
            running = len(tasks)
            while running:
                batch: list[tuple[int, TokenEvent]] = []
                while not (batch and arrived.empty()):
                    item = await arrived.get()
                    if isinstance(item, BaseException):
                        raise item
                    if item[1].error is not None:
                        raise item[1].error
                    batch.append(item)
                    running -= item[1].finish_reason is not None
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _requests(self, call: Call) -> list[Request]:
        """One engine request a prompt. Raises `RequestError` for what the model cannot take."""
        from actors.engine.request import Request

        if len(call.prompts) > self._max_prompts:
            raise RequestError(
                "too many prompts in one request",
                param="prompt",
                received=len(call.prompts),
                allowed=f"at most {self._max_prompts}",
                next_step="send them in several requests",
            )
        requests = []
        for index, prompt_ids in enumerate(self._token_ids(call)):
            room = self._room(prompt_ids, "messages" if call.messages else "prompt")
            sampling = Sampling(
                max_new_tokens=room if call.max_new_tokens is None else min(call.max_new_tokens, room),
                temperature=call.temperature,
                top_p=call.top_p,
                stop=call.stop,
                seed=secrets.randbits(SEED_BITS) if call.seed is None else call.seed,
            )
            requests.append(Request(f"{call.id}-{index}", prompt_ids, sampling))
        return requests

    def _token_ids(self, call: Call) -> list[tuple[int, ...]]:
        if call.messages:
            messages = [{"role": m.role, "content": m.content} for m in call.messages]
            return [tuple(self._text.render_chat(messages, add_generation_prompt=True))]
        return [tuple(self._text.encode(p)) if isinstance(p, str) else p for p in call.prompts]

    def _room(self, prompt_ids: tuple[int, ...], param: str) -> int:
        """Tokens that fit after the prompt."""
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise _ContextExceededError(len(prompt_ids), self._context_length, param)
        return room


class _ContextExceededError(Exception):
    """A prompt that leaves no room in the context window; carries the code that OpenAI clients look for."""

    def __init__(self, tokens: int, context_length: int, param: str) -> None:
        super().__init__(tokens, context_length, param)
        self.refusal = Refusal(
            400,
            f"the prompt does not fit this model's context window; received {tokens} tokens; "
            f"allowed: at most {context_length - 1}, which leaves room for one more; next: shorten the {param}",
            "context_length_exceeded",
            param,
        )


def _piece(index: int, event: TokenEvent) -> Piece:
    reason = event.finish_reason
    if reason == "error":
        raise EngineError(f"request {event.request_id} failed without saying why")
    return Piece(index, event.text, event.prompt_tokens, event.completion_tokens, reason)
