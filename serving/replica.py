"""An engine replica: one model behind its engine, asked for texts or about texts. Knows nothing of Ray.

Any family that `load_engine` opens: decoders and encoder-decoders write (`writer`), encoders read (`reader`). A model
that is asked for what it cannot do refuses, and says what it can.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import EngineError, GanymedeError, RequestError
from configs.schema.serving import ModelSettings
from serving.calls import (
    LOST,
    AdapterSource,
    Call,
    Capability,
    Conversation,
    LoadReport,
    Piece,
    Prompt,
    ReadCall,
    Readings,
    Refusal,
    ReplicaStatus,
    ServedModel,
    Tokens,
    is_long,
)
from serving.wire import Senders

if TYPE_CHECKING:
    from actors.engine.adapters import Adapter
    from serving.adapters import Shelf
    from serving.reader import Reader
    from serving.writer import Writer

logger = logging.getLogger("ray.serve")


class EngineReplica:
    """One engine with the model's weights; a Ray Serve deployment wraps it."""

    def __init__(self, model: ServedModel, config: ModelSettings) -> None:
        # Here and not above: the driver and the ingress import this module, and torch takes seconds and 300 MB.
        from actors.engine.encoder import EncoderEngine
        from actors.engine.engine import Engine
        from actors.engine.stream import AsyncEngine
        from serving.adapters import Shelf
        from serving.reader import Reader
        from serving.watch import Watch
        from serving.writer import Writer

        # In a thread that ends. OpenMP counts the threads of all that have multiplied, and once they are more than the
        # cores, those of the engine no longer wait for each other awake: on 2 cores steps took 1.4 to 2 times as long.
        with ThreadPoolExecutor(1) as loading:
            engine = loading.submit(_load, Path(model.folder), config).result()
        self._digest = model.digest
        self._text = engine.text
        self._context_length: int = engine.context_length
        self._watch = Watch(
            engine,
            capacity_tokens=0 if isinstance(engine, EncoderEngine) else engine.cache_tokens,
            queue_limit_seconds=config.queue_limit_seconds,
        )
        self._step_limit_seconds = config.step_limit_seconds
        self._engine: AsyncEngine[Any, Any] = AsyncEngine(self._watch)
        self._senders = Senders()
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._labels: tuple[str, ...] = ()
        if isinstance(engine, EncoderEngine):
            most = max(1, config.max_queued // 2)
            self._reader = Reader(engine, self._engine, digest=model.digest, most_in_flight=most)
            self._labels = () if engine.task == "embed" else engine.labels
        else:
            self._writer = Writer(engine, self._engine, digest=model.digest, most_answers=config.max_queued)
        self._adapters: Shelf | None = None
        if isinstance(engine, Engine):
            self._adapters = Shelf(engine.load_adapter, config.max_adapters)

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked."""
        if self._reader is not None:
            return self._reader.capabilities
        return ("completions", "chat") if self._text.has_chat_template else ("completions",)

    async def stream(self, call: Call) -> AsyncGenerator[Sequence[Piece] | Refusal, None]:
        """The answers, in batches: pieces that have come since the last one, or all of them whole."""
        if self._writer is None:
            chat = any(isinstance(prompt, Conversation) for prompt in call.prompts)
            yield Refusal.incapable("chat" if chat else "completions", self.capabilities)
            return
        source = call.adapter
        if call.begun_by not in (None, self._digest if source is None else source.key):
            yield Refusal(503, "the model was replaced while this answer was being written", "model_replaced")
            return
        adapter = None if source is None else await self._adapter(source)
        if isinstance(adapter, Refusal):
            yield adapter
            return
        async with aclosing(self._writer.stream(call, adapter)) as batches:
            async for batch in batches:
                yield self._or_lost(batch) if isinstance(batch, Refusal) else batch

    async def relay(self, call: Call, to: str | None) -> AsyncGenerator[Sequence[Piece] | Refusal | str, None]:
        """The same for an ingress. If the wire at `to` is on this machine, it takes the answers, and all that comes
        this way is the name of this end of it. Ends early if that ingress has gone away.
        """
        sender = None if to is None else await self._senders.to(to)
        if sender is not None:
            yield sender.name
        async with aclosing(self.stream(call)) as batches:
            async for batch in batches:
                if sender is None:
                    yield batch
                elif sender.open:
                    sender.send(call.id, batch)
                else:
                    return

    async def _adapter(self, source: AdapterSource) -> Adapter | Refusal:
        """An adapter to write with. In the middle of an update, a replica with another base is as good as lost."""
        if source.base != self._digest or self._adapters is None:
            return Refusal(503, f"this replica does not run the base of {source.ref}", LOST)
        try:
            return await self._adapters.get(source)
        except GanymedeError as error:
            logger.exception("%s cannot be loaded", source.ref)
            return Refusal(500, f"the adapter {source.ref} cannot be loaded: {error}", error.code)

    async def read(self, call: ReadCall) -> Readings | Refusal:
        """What the model says of texts."""
        if self._reader is None:
            return Refusal.incapable(call.task, self.capabilities)
        result = await self._reader.read(call)
        return self._or_lost(result) if isinstance(result, Refusal) else result

    async def tokenize(self, prompt: Prompt) -> Tokens | Refusal:
        """The token ids that a text or a conversation becomes, as the model reads them."""
        try:
            encode: Callable[[], tuple[int, ...]]
            if self._writer is not None:
                encode = partial(self._writer.token_ids, prompt)
            elif isinstance(prompt, str):
                encode = partial(_encode_input, self._text, prompt)
            else:
                return Refusal.incapable("chat", self.capabilities)
            ids = await asyncio.to_thread(encode) if is_long([prompt]) else encode()
        except RequestError as error:
            return Refusal.of(error)
        return Tokens(ids, self._context_length)

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
        """Answers only once the model is loaded."""
        healthy = self._engine.healthy and not self._hangs
        return ReplicaStatus(self._digest, healthy, self._context_length, self.capabilities, self._labels)

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises: one whose engine has failed, or hangs in a step."""
        if self._engine.error is not None:
            raise self._engine.error
        if self._hangs:
            raise EngineError(
                "the engine hangs",
                received=f"a step of {self._watch.step_seconds:.0f} s",
                allowed=f"at most {self._step_limit_seconds:g} s",
                next_step="if steps of this model are that slow, raise serving.step_limit_seconds",
            )

    @property
    def _hangs(self) -> bool:
        return self._watch.step_seconds > self._step_limit_seconds

    async def report(self) -> LoadReport:
        """The engine's work now."""
        return self._report

    @property
    def _report(self) -> LoadReport:
        shelf, report = self._adapters, self._watch.report
        return report if shelf is None else replace(report, adapters=len(shelf.held), adapter_loads=shelf.loads)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The same, asked by Ray Serve for `autoscaling.WorkPolicy`."""
        return asdict(self._report)

    async def asleep(self) -> bool:
        """Never: this is a replica."""
        return False

    async def statuses(self) -> dict[str, ReplicaStatus | Refusal]:
        """Of all versions: there is this one."""
        return {self._digest: await self.status()}

    async def reports(self) -> dict[str, list[LoadReport]]:
        """Of all replicas: there is this one."""
        return {self._digest: [self._report]}

    def _or_lost(self, refusal: Refusal) -> Refusal:
        """A refusal as it is, unless it is the engine that has failed, and not the request."""
        return refusal if self._engine.healthy else replace(refusal, status=503, code=LOST)

    def close(self) -> None:
        """Ends the engine's thread; requests in flight end with an error."""
        self._engine.close()


def _encode_input(text: Any, prompt: str) -> tuple[int, ...]:
    return tuple(text.encode_input(prompt).token_ids)


def _load(folder: Path, config: ModelSettings) -> Any:
    """The engine for the model's family."""
    from actors.engine.loading import load_engine, runner_kind

    options: dict[str, Any] = {"max_queued": config.max_queued, "precision": config.precision}
    if runner_kind(folder) != "encoder":
        options["max_sequences"] = config.max_sequences
    return load_engine(folder, **options)
