"""A model folder as a responder, with the engine that serves: no request goes through a server.

Log-likelihoods follow the conventions of lm-eval's `hf` models: prompt and continuation are encoded together, blanks
at the end of the prompt counting as the continuation's; nothing is put before a prompt but, where it is empty and
before documents, the token that begins or else ends texts; what is too long loses its beginning. In conversations an
answer is encoded by itself, as the model would write it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import Classification, EncodeEvent, EncodeRequest, Tagging
from actors.engine.engine import Engine
from actors.engine.loading import load_engine, runner_kind
from actors.engine.pretrained import placement
from actors.engine.request import Completion, Request
from actors.engine.seq2seq import Seq2SeqEngine
from actors.store.artifacts import model_digest
from configs.errors import ConfigError, ContractError, EngineError
from configs.schema.generation import Sampling
from configs.schema.tasks import Answering
from pipelines.evaluation.responses import Prompt, Response

_ROWS_AT_ONCE = 64
_PREFILL_TOKENS = 1024
"""Of a step."""


class LocalModel:
    """Made by `LocalModel.load`; see `Responder` for what it answers."""

    def __init__(self, folder: Path, engine: Engine | Seq2SeqEngine | EncoderEngine, *, chat: bool) -> None:
        self._folder = folder
        self._engine = engine
        self._chat = chat

    @classmethod
    def load(cls, folder: Path, *, max_sequences: int, chat: bool) -> LocalModel:
        """Opens a model folder; with `chat`, it is asked in conversations, under its chat template.

        Raises:
            ArtifactError: it is no model that can be run.
            ContractError: its tokenizer is not the one it was trained with.
        """
        options: dict[str, int] = {}
        match runner_kind(folder):
            case "decoder":
                # Nobody waits for a single answer: prompts need not give way to answers that are under way.
                options = {"prefill_tokens": _PREFILL_TOKENS, "mixed_prefill_tokens": _PREFILL_TOKENS}
                options["max_sequences"] = max_sequences
            case "seq2seq":
                options["max_sequences"] = max_sequences
        return cls(folder, load_engine(folder, **options), chat=chat)

    @property
    def reads_only(self) -> bool:
        """Whether it is an encoder."""
        return isinstance(self._engine, EncoderEngine)

    def facts(self) -> dict[str, Any]:
        """Runner, digest of the folder, precision, text contract and window."""
        contract = self._engine.text.contract
        dtype, device = placement("auto", "auto")
        return {
            "runner": runner_kind(self._folder),
            "digest": model_digest(self._folder),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "contract": None if contract is None else contract.hash,
            "window": self._engine.context_length,
        }

    @property
    def talks(self) -> bool:
        """Whether it was opened for conversations."""
        return self._chat

    def fits(self, prompt: Prompt, answers: Sequence[str] | int) -> bool:
        """See `Responder`."""
        engine = self._engine
        if isinstance(answers, int):
            beside = 0 if isinstance(engine, Seq2SeqEngine) else answers
            return len(self._prompt_ids(prompt)) + beside <= engine.context_length
        return all(sum(map(len, self._pair(prompt, answer))) <= engine.context_length + 1 for answer in answers)

    def likelihoods(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Response]:
        """See `Responder`. Raises `ConfigError` for a model that continues no texts."""
        engine = self._decoder("likelihoods")
        window = engine.context_length
        rows: list[tuple[list[int], int]] = []
        owners: list[tuple[int, int]] = []
        cut: set[int] = set()
        prompts = [0] * len(asked)
        for number, (prompt, continuations) in enumerate(asked):
            for choice, continuation in enumerate(continuations):
                before, after = self._pair(prompt, continuation)
                if len(before) + len(after) > window + 1:
                    cut.add(number)
                parts = windows([*before, *after], len(before), window, window)
                prompts[number] = max(prompts[number], *(len(row) - count for row, count in parts))
                rows += parts
                owners += [(number, choice)] * len(parts)
        found = [[0.0] * len(continuations) for _, continuations in asked]
        tokens = [0] * len(asked)
        for (number, choice), (_, count), nats in zip(owners, rows, self._sum_nats(engine, rows), strict=True):
            found[number][choice] -= nats
            tokens[number] += count
        return [
            Response(logprobs=tuple(one), tokens=tokens[n], prompt_tokens=prompts[n], truncated=n in cut)
            for n, one in enumerate(found)
        ]

    def documents(self, texts: Sequence[str], stride: int | None) -> list[Response]:
        """See `Responder`. Raises `ConfigError` for a model that continues no texts, or a stride beyond its window."""
        engine = self._decoder("likelihoods of documents")
        if self._chat:
            raise ConfigError(
                "likelihoods of documents are asked of texts, not of conversations", received="chat",
                allowed="tasks whose items are answered", next_step="leave --chat out",
            )  # fmt: skip
        step = engine.context_length if stride is None else stride
        if step > engine.context_length:
            raise ConfigError(
                "stride is longer than the model's window", received=step, allowed=f"at most {engine.context_length}"
            )
        rows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        encoded = [engine.text.encode(text) for text in texts]
        for number, ids in enumerate(encoded):
            parts = windows([self._first_token(engine), *ids], 1, engine.context_length, step)
            rows += parts
            owners += [number] * len(parts)
        totals = [0.0] * len(texts)
        for owner, value in zip(owners, self._sum_nats(engine, rows), strict=True):
            totals[owner] -= value
        return [Response(logprobs=(totals[n],), tokens=len(ids)) for n, ids in enumerate(encoded)]

    def generate(self, prompts: Sequence[Prompt], answering: Answering) -> list[Response]:
        """See `Responder`. Raises `ConfigError` for an encoder, `RequestError` if a chat template refuses a prompt."""
        engine = self._engine
        if isinstance(engine, EncoderEngine):
            raise self._not_able("answers in words")
        requests: list[Request] = []
        cut: list[bool] = []
        for number, prompt in enumerate(prompts):
            ids = self._prompt_ids(prompt)
            if isinstance(engine, Seq2SeqEngine):
                kept, new_tokens = ids[: engine.context_length], answering.max_new_tokens
            else:
                kept, new_tokens = shared_out(ids, answering.max_new_tokens, engine.context_length)
            sampling = Sampling(
                max_new_tokens=new_tokens, temperature=answering.temperature, stop=answering.stop, seed=answering.seed
            )
            cut.append(len(kept) < len(ids))
            requests += Request(str(number), tuple(kept), sampling).choices(answering.samples)
        completions = engine.generate(requests)
        per = answering.samples
        return [_generated(completions[n * per : (n + 1) * per], truncated=cut[n]) for n in range(len(prompts))]

    def classify(self, texts: Sequence[str], choices: Sequence[str]) -> list[Response]:
        """See `Responder`. Raises `ConfigError` for a model without such a head, `ContractError` for other classes."""
        engine = self._encoder("classify")
        if set(engine.labels) != set(choices):
            raise ContractError(
                f"the classes of {self._folder} are not those of the task",
                received=", ".join(engine.labels),
                allowed=", ".join(choices),
                next_step="name them alike: choices of the task, labels of the stage examples",
            )
        return [_classified(event, choices) for event in self._read(engine, texts, "classify")]

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[Response]:
        """See `Responder`. Raises `ConfigError` for a model without such a head."""
        events = self._read(self._encoder("tag"), [" ".join(words) for words in sentences], "tag")
        return [_tagged(event, words) for event, words in zip(events, sentences, strict=True)]

    def _read(self, engine: EncoderEngine, texts: Sequence[str], task: Any) -> list[EncodeEvent]:
        # A text without a character is read as a blank.
        return engine.encode([EncodeRequest(str(n), text or " ", task, truncate=True) for n, text in enumerate(texts)])

    def _decoder(self, what: str) -> Engine:
        if not isinstance(self._engine, Engine):
            raise self._not_able(what)
        return self._engine

    def _encoder(self, task: str) -> EncoderEngine:
        if not isinstance(self._engine, EncoderEngine) or self._engine.task != task:
            raise self._not_able(f"a head that can {task}")
        return self._engine

    def _not_able(self, what: str) -> ConfigError:
        head = f" for {self._engine.task}" if isinstance(self._engine, EncoderEngine) else ""
        return ConfigError(
            f"this task needs {what}, which {self._folder} has not",
            received=f"a model run as {runner_kind(self._folder)}{head}",
            next_step="evaluate another model, or another task",
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        text = self._engine.text
        if not isinstance(prompt, str):
            return text.render_chat(prompt)
        if isinstance(self._engine, Seq2SeqEngine):
            return list(text.encode_input(prompt).token_ids)
        return text.encode(prompt) or [self._first_token(self._engine)]

    def _pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        text = self._engine.text
        if not isinstance(prompt, str):
            return text.render_chat(prompt), text.encode(continuation)
        blanks = len(prompt) - len(prompt.rstrip())
        if blanks:
            prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
        if not prompt:
            return [self._first_token(self._engine)], text.encode(continuation)
        before, whole = text.encode(prompt), text.encode(prompt + continuation)
        return before, whole[len(before) :]

    def _first_token(self, engine: Any) -> int:
        """What stands before a text that nothing precedes: what begins texts, or else what ends them."""
        text = engine.text
        found = text.bos_token_id if text.bos_token_id is not None else min(text.eos_token_ids, default=None)
        if found is None:
            raise ContractError(
                f"{self._folder} names no token that begins or ends a text, and one has to stand before the first",
                allowed="bos_token or eos_token in tokenizer_config.json",
            )
        return int(found)

    def _sum_nats(self, engine: Engine, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Nats of the last tokens of each row, as many as it says; rows of one length go together."""
        totals = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))
        start = 0
        while start < len(order):
            length = len(rows[order[start]][0])
            group = [n for n in order[start : start + _ROWS_AT_ONCE] if len(rows[n][0]) == length]
            start += len(group)
            scored = engine.score(torch.tensor([rows[n][0] for n in group])).double()
            for n, nats in zip(group, scored, strict=True):
                totals[n] = float(nats[len(nats) - rows[n][1] :].sum())
        if not all(map(math.isfinite, totals)):
            raise EngineError(
                "the model's likelihoods are not finite numbers",
                next_step="check the model's weights; in bf16, try precision fp32",
            )
        return totals


def windows(ids: Sequence[int], known: int, window: int, stride: int) -> list[tuple[list[int], int]]:
    """Rows that together predict every token of `ids` from number `known` (at least 1) on once: tokens, and how many of
    the last of them are predicted.

    The first row predicts up to `window` tokens, each further one `stride`, with as many before them as fit; so does
    the last, however few are left.
    """
    rows = []
    done = known
    while done < len(ids):
        end = min(done + (window if done == known else stride), len(ids))
        rows.append((list(ids[max(0, end - window - 1) : end]), end - done))
        done = end
    return rows


def shared_out(ids: list[int], new_tokens: int, window: int) -> tuple[list[int], int]:
    """What is kept of a prompt, and how long its answer may become, where both together are longer than the window.

    The answer has its room and the prompt loses its beginning; but never more than to half the window for the sake of
    an answer that would take more than the other half.
    """
    room = min(new_tokens, max(window - len(ids), window // 2))
    return ids[-(window - room) :], room


def _generated(completions: Sequence[Completion], *, truncated: bool) -> Response:
    error = next((str(c.error) for c in completions if c.error is not None), None)
    return Response(
        texts=() if error else tuple(c.text for c in completions),
        prompt_tokens=completions[0].prompt_tokens,
        tokens=sum(len(c.token_ids) for c in completions),
        finish_reason=completions[0].finish_reason,
        truncated=truncated,
        error=error,
    )


def _classified(event: EncodeEvent, choices: Sequence[str]) -> Response:
    if not isinstance(event.encoding, Classification):
        return Response(error=str(event.error), finish_reason="error")
    scores = event.encoding.scores
    logprobs = tuple(math.log(max(scores[choice], 1e-30)) for choice in choices)
    return Response(logprobs=logprobs, prompt_tokens=event.prompt_tokens, truncated=event.truncated)


def _tagged(event: EncodeEvent, words: Sequence[str]) -> Response:
    """The tag of a word is that of the piece in which it begins; what the window cut off has none."""
    if not isinstance(event.encoding, Tagging):
        return Response(error=str(event.error), finish_reason="error")
    pieces = list(event.encoding.words)
    tags = []
    start = 0
    for word in words:
        label = next((piece.label for piece in pieces if piece.start <= start < piece.end), "O")
        tags.append(label)
        start += len(word) + 1
    return Response(tags=tuple(tags), prompt_tokens=event.prompt_tokens, truncated=event.truncated)
