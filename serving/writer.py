"""The generating side of a replica: from a call to the engine's requests, and from its events to pieces of answers.

Guarantees: the prompts of a call are admitted together or refused together; whatever ends a call early (a client that
goes away, a refusal of one of its prompts, an error) cancels the rest of it in the engine. An answer that another
replica has begun goes on as if this one had written it: the tokens drawn are a function of the seed and the position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from functools import partial

from actors.engine.adapters import Adapter
from actors.engine.engine import Engine
from actors.engine.request import Request, TokenEvent
from actors.engine.seq2seq import Seq2SeqEngine
from actors.engine.stream import AsyncEngine
from actors.tools import Convention
from configs.errors import GanymedeError, RequestError
from configs.schema.generation import Structure
from serving.calls import Call, Conversation, Piece, Prompt, Refusal, is_long
from serving.timing import Lap
from serving.transcript import Transcript


class Writer:
    """Answers calls for text over one engine.

    Args of the constructor:
        engine: a decoder or an encoder-decoder.
        running: the same, behind asyncio.
        digest: of the model; every piece carries it.
        most_answers: that one call may ask for.
    """

    def __init__(
        self,
        engine: Engine | Seq2SeqEngine,
        running: AsyncEngine[Request, TokenEvent],
        *,
        digest: str,
        most_answers: int,
    ) -> None:
        self._text = engine.text
        self._structures = engine.structures
        self._context_length = engine.context_length
        self._reads_source = isinstance(engine, Seq2SeqEngine)
        self._running = running
        self._digest = digest
        self._most_answers = most_answers

    async def stream(
        self, call: Call, adapter: Adapter | None = None
    ) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers, in batches: pieces that have come since the last one, or all of them whole; by an adapter over
        the model if there is one.
        """
        parts: dict[int, list[Piece]] = {}
        lap = Lap() if call.report_timing else None
        try:
            self._check(call)
            convention = self._convention(call)
            if convention is not None and call.tool_use is not None:
                structure = Structure(grammar=convention.grammar(call.tool_use, self._text.special_id(convention.mark)))
                call = replace(call, sampling=call.sampling.model_copy(update={"structure": structure}))
            if call.sampling.structure is not None:
                # The engine's thread finds it compiled: that takes up to a second, which no other request waits for.
                await asyncio.to_thread(self._structures.matcher, call.sampling.structure)
            encode = partial(self._requests, call, convention, adapter)
            requests = await asyncio.to_thread(encode) if is_long(call.prompts) else encode()
            transcripts = {
                index: self._transcript(call, index, request, convention, copy(lap))
                for index, request in requests.items()
            }
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

    def token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """What the model reads for a prompt. Raises `RequestError` for a conversation that it has no template for."""
        if isinstance(prompt, Conversation):
            if self._text.tool_convention is None:
                _refuse_tools(prompt)
            messages, tools = [m.rendered for m in prompt.messages], [tool.rendered for tool in prompt.tools]
            return tuple(self._text.render_chat(messages, add_generation_prompt=True, tools=tools))
        if isinstance(prompt, str):
            return self._text.encode_input(prompt).token_ids if self._reads_source else tuple(self._text.encode(prompt))
        return prompt

    async def _events(self, requests: Mapping[int, Request]) -> AsyncGenerator[list[tuple[int, TokenEvent]], None]:
        """The engine's events of several requests, merged; raises the first error of any of them."""
        arrived: asyncio.Queue[tuple[int, TokenEvent | GanymedeError]] = asyncio.Queue()

        def deliver(index: int, event: TokenEvent | GanymedeError) -> None:
            arrived.put_nowait((index, event))

        cancels: list[Callable[[], None]] = []
        try:
            for index, request in requests.items():
                cancels.append(self._running.begin(request, partial(deliver, index)))
            running = len(requests)
            while running:
                batch: list[tuple[int, TokenEvent]] = []
                while not (batch and arrived.empty()):
                    index, event = await arrived.get()
                    if isinstance(event, GanymedeError):
                        raise event
                    batch.append((index, event))
                    running -= event.finish_reason is not None
                yield batch
        finally:
            for cancel in cancels:
                cancel()

    def _check(self, call: Call) -> None:
        """Raises `RequestError` for what this kind of model, or no model, does."""
        if call.answers > self._most_answers:
            raise RequestError(
                "too many answers asked for in one request",
                param="prompt" if call.choices == 1 else "n",
                received=f"{len(call.prompts)} prompts, n {call.choices}",
                allowed=f"at most {self._most_answers} answers",
                next_step="ask for them in several requests",
            )
        if call.echo and self._reads_source:
            raise RequestError(
                "an encoder-decoder's answer does not continue its prompt, which cannot be echoed",
                param="echo",
                allowed="echo: false",
            )

    def _convention(self, call: Call) -> Convention | None:
        """How calls of tools are written in the answers, if there may be any; None too where the prompt will refuse."""
        return None if call.tool_use is None else self._text.tool_convention

    def _requests(self, call: Call, convention: Convention | None, adapter: Adapter | None) -> dict[int, Request]:
        """The engine's requests by index: all choices of the first prompt, then of the next, those left out that have
        ended. Raises `RequestError` for what the model cannot take.
        """
        requests: list[Request] = []
        mark = None if convention is None else self._text.special_id(convention.mark)
        spelt = frozenset() if mark is None else frozenset({mark})
        for index, (prompt, seed) in enumerate(zip(call.prompts, call.seeds, strict=True)):
            ids = self.token_ids(prompt)
            limit = self._limit(call, len(ids), "messages" if isinstance(prompt, Conversation) else "prompt")
            if call.sampling.min_tokens > limit:
                raise RequestError(
                    "min_tokens is more than there is room for",
                    param="min_tokens",
                    received=call.sampling.min_tokens,
                    allowed=f"at most {limit}",
                )
            sampling = call.sampling.model_copy(update={"max_new_tokens": limit, "seed": seed})
            requests += Request(f"{call.id}-{index}", ids, sampling, spelt=spelt, adapter=adapter).choices(call.choices)
        if call.begun is None:
            return dict(enumerate(requests))
        return {
            index: _continued(request, given)
            for index, (request, given) in enumerate(zip(requests, call.begun, strict=True))
            if given is not None
        }

    def _transcript(
        self, call: Call, index: int, request: Request, convention: Convention | None, lap: Lap | None
    ) -> Transcript:
        prompt = call.prompts[index // call.choices]
        echo = None
        if call.echo:
            echo = prompt if isinstance(prompt, str) else self._text.decode(request.prompt_ids)
        return Transcript(
            index,
            request,
            self._text,
            self._digest if call.adapter is None else call.adapter.key,
            echo=echo,
            report_sampling=call.report_sampling,
            convention=convention,
            lap=lap,
        )

    def _limit(self, call: Call, prompt_tokens: int, param: str) -> int:
        """Tokens to generate at most: what is asked for, as far as the context window has room."""
        room = self._context_length - prompt_tokens
        if room < (call.max_new_tokens != 0 and not self._reads_source):
            raise _ContextExceededError(prompt_tokens, self._context_length, param)
        if self._reads_source:  # the target has a window of its own
            room = self._context_length
        return room if call.max_new_tokens is None else min(call.max_new_tokens, room)


def _refuse_tools(prompt: Conversation) -> None:
    """For a model whose template takes no tools. Raises `RequestError` if there are any."""
    spoken = any(message.calls or message.call_id is not None for message in prompt.messages)
    if prompt.tools or spoken:
        raise RequestError(
            "this model's chat template takes no tools, or writes calls in a way that is not known here",
            param="tools" if prompt.tools else "messages",
            allowed='templates that write calls as <tool_call>{"name", "arguments"}</tool_call> (Hermes, Qwen), '
            '[TOOL_CALLS] [{"name", "arguments"}] (Mistral) or {"name", "parameters"} (Llama 3)',
            next_step="leave tools and calls out, or serve a model whose template has them",
        )


def _continued(request: Request, given: tuple[int, ...]) -> Request:
    """A request whose answer has begun with the tokens `given`; the scores of its prompt were given out then."""
    if not given:
        return request
    sampling = request.sampling.model_copy(update={"prompt_logprobs": None})
    return replace(request, sampling=sampling, generated=given)


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
