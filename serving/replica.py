"""An engine replica: the inference engine, asked for whole answers or piece by piece.

Guarantees: the prompts of a call are admitted together or refused together; whatever ends a call early (a client that
goes away, a refusal of one of its prompts, an error) cancels the rest of it in the engine. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import GanymedeError, RequestError
from configs.schema.serving import ServingConfig
from serving.calls import Call, Conversation, Piece, Prompt, Refusal, ReplicaStatus, ServedModel, Tokens
from serving.transcript import Transcript

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
        self._structures = engine.structures
        self._context_length = engine.context_length
        self._max_answers = config.max_queued
        self._engine = AsyncEngine(engine)

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers, in batches: pieces that have come since the last one, or all of them whole."""
        parts: dict[int, list[Piece]] = {}
        try:
            if call.sampling.structure is not None:
                # The engine's thread finds it compiled: that takes up to a second, which no other request waits for.
                await asyncio.to_thread(self._structures.matcher, call.sampling.structure)
            requests = self._requests(call)
            transcripts = [self._transcript(call, index, request) for index, request in enumerate(requests)]
            async with aclosing(self._events(requests)) as batches:
                async for batch in batches:
                    pieces = [transcripts[index].piece(event) for index, event in batch]
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
                yield [Piece.joined(pieces) for _, pieces in sorted(parts.items())]

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes."""
        try:
            return Tokens(self._token_ids(prompt), self._context_length)
        except RequestError as error:
            return Refusal.of(error)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | Refusal:
        """The text of token ids, special tokens left out."""
        unknown = next((token for token in token_ids if not 0 <= token < self._text.vocab_size), None)
        if unknown is not None:
            error = RequestError(
                "tokens holds an id the tokenizer does not know",
                param="tokens",
                received=unknown,
                allowed=f"0 to {self._text.vocab_size - 1}",
            )
            return Refusal.of(error)
        return self._text.decode(token_ids)

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
                    batch.append(item)
                    running -= item[1].finish_reason is not None
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _requests(self, call: Call) -> list[Request]:
        """The engine's requests: all choices of the first prompt, then of the next. Raises `RequestError` for what
        the model cannot take.
        """
        from actors.engine.request import Request

        if len(call.prompts) * call.choices > self._max_answers:
            raise RequestError(
                "too many answers asked for in one request",
                param="prompt" if call.choices == 1 else "n",
                received=f"{len(call.prompts)} prompts, n {call.choices}",
                allowed=f"at most {self._max_answers} answers",
                next_step="ask for them in several requests",
            )
        requests: list[Request] = []
        for index, prompt in enumerate(call.prompts):
            ids = self._token_ids(prompt)
            limit = self._limit(call, len(ids), "messages" if isinstance(prompt, Conversation) else "prompt")
            if call.sampling.min_tokens > limit:
                raise RequestError(
                    "min_tokens is more than there is room for",
                    param="min_tokens",
                    received=call.sampling.min_tokens,
                    allowed=f"at most {limit}",
                )
            seed = secrets.randbits(SEED_BITS) if call.seed is None else call.seed
            sampling = call.sampling.model_copy(update={"max_new_tokens": limit, "seed": seed})
            requests += Request(f"{call.id}-{index}", ids, sampling).choices(call.choices)
        return requests

    def _transcript(self, call: Call, index: int, request: Request) -> Transcript:
        prompt = call.prompts[index // call.choices]
        echo = None
        if call.echo:
            echo = prompt if isinstance(prompt, str) else self._text.decode(request.prompt_ids)
        return Transcript(index, request, self._text, echo=echo, report_sampling=call.report_sampling)

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._text.encode(prompt))
        if isinstance(prompt, Conversation):
            messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
            return tuple(self._text.render_chat(messages, add_generation_prompt=True))
        return prompt

    def _limit(self, call: Call, prompt_tokens: int, param: str) -> int:
        """Tokens to generate at most: what is asked for, as far as the context window has room."""
        room = self._context_length - prompt_tokens
        if room < (call.max_new_tokens != 0):
            raise _ContextExceededError(prompt_tokens, self._context_length, param)
        return room if call.max_new_tokens is None else min(call.max_new_tokens, room)


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
