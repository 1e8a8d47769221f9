"""A model behind an OpenAI-compatible endpoint as a responder.

Requests that are refused for want of room (429), fail (5xx), get no answer or garbage are sent again, with longer and
longer pauses, or when the endpoint says (`Retry-After`); what fails to the end is an item without an answer, which
counts as wrong. A refusal that would meet every request (no such model, no permission) ends the evaluation.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httpx

from configs.artifacts import hash_json
from configs.errors import ConfigError, EngineError
from configs.schema.tasks import Answering
from pipelines.evaluation.responses import Prompt, Response
from pipelines.evaluation.threads import at_once

KEY = "OPENAI_API_KEY"
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_TIMEOUT_SECONDS = 300.0
_AGAIN = {408, 409, 429, 500, 502, 503, 504}


class Endpoint:
    """A model of an endpoint; see `Responder` for what it answers. Nothing is sent before the first question, and never
    more than `parallel` requests at once, whoever asks."""

    def __init__(self, url: str, model: str, *, chat: bool, parallel: int) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._chat = chat
        self._parallel = parallel
        self._room = threading.BoundedSemaphore(parallel)
        headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, headers=headers)

    @property
    def reads_only(self) -> bool:
        """Never: what stands behind an endpoint answers in words."""
        return False

    @property
    def talks(self) -> bool:
        """Whether it is asked by `/chat/completions`."""
        return self._chat

    def fits(self, prompt: Prompt, answers: Sequence[str] | int) -> bool:
        """Always: only the endpoint can tell, and refuses what does not fit."""
        return True

    def facts(self) -> dict[str, Any]:
        """Address, and what the endpoint says of the model.

        Raises:
            ConfigError: the endpoint has no such model.
            EngineError: the endpoint does not answer.
        """
        listed = self._ask("GET", "/models", None)
        found = [entry for entry in listed.get("data", []) if isinstance(entry, dict)]
        mine = next((entry for entry in found if entry.get("id") == self._model), None)
        if mine is None:
            raise ConfigError(
                f"{self._url} has no such model", received=self._model,
                allowed=", ".join(str(entry.get("id")) for entry in found), next_step="name one of these",
            )  # fmt: skip
        return {"runner": "endpoint", "endpoint": self._url, "digest": hash_json(mine), "model": mine}

    def likelihoods(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Response]:
        """See `Responder`; by `/completions` that echo what they were given and say how likely it was."""
        pairs = [(n, prompt, text) for n, (prompt, texts) in enumerate(asked) for text in texts]
        answers = self._all([partial(self._likelihood, prompt, text) for _, prompt, text in pairs])
        found = []
        for number in range(len(asked)):
            own = [answer for (owner, _, _), answer in zip(pairs, answers, strict=True) if owner == number]
            error = next((answer.error for answer in own if answer.error), None)
            logprobs = () if error else tuple(answer.logprobs[0] for answer in own)
            tokens = sum(answer.tokens for answer in own)
            prompt_tokens = max(answer.prompt_tokens for answer in own)
            found.append(Response(logprobs=logprobs, tokens=tokens, prompt_tokens=prompt_tokens, error=error))
        return found

    def documents(self, texts: Sequence[str], stride: int | None) -> list[Response]:
        """Raises `ConfigError`: where a window ends in a text only the model's tokenizer tells."""
        raise self._not_able("the model's tokenizer")

    def generate(self, prompts: Sequence[Prompt], answering: Answering) -> list[Response]:
        """See `Responder`."""
        calls = [
            partial(self._generated, prompt, answering, sample)
            for prompt in prompts
            for sample in range(answering.samples)
        ]
        answers = self._all(calls)
        per = answering.samples
        return [_joined(answers[n * per : (n + 1) * per]) for n in range(len(prompts))]

    def classify(self, texts: Sequence[str], choices: Sequence[str]) -> list[Response]:
        """Raises `ConfigError`: there is no head to ask."""
        raise self._not_able("an encoder's head")

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[Response]:
        """Raises `ConfigError`: there is no head to ask."""
        raise self._not_able("an encoder's head")

    def _not_able(self, what: str) -> ConfigError:
        return ConfigError(
            f"this task needs {what}, which an endpoint does not give", received=self._url,
            next_step="evaluate the model's folder or artifact",
        )  # fmt: skip

    def _all(self, calls: Sequence[Callable[[], Response]]) -> list[Response]:
        made = dict(at_once(calls, self._parallel))
        return [made[number] for number in range(len(calls))]

    def _generated(self, prompt: Prompt, answering: Answering, sample: int) -> Response:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": answering.max_new_tokens,
            "temperature": answering.temperature,
            "seed": answering.seed + sample,
        }
        if answering.stop:
            body["stop"] = list(answering.stop)
        talks = not isinstance(prompt, str)
        body["messages" if talks else "prompt"] = prompt

        def read(answer: dict[str, Any]) -> Response:
            choice = answer["choices"][0]
            # A model that refuses may say so in a field of its own, without a content.
            text = choice["message"]["content"] or choice["message"].get("refusal") if talks else choice["text"]
            usage = answer.get("usage") or {}
            return Response(
                texts=(text or "",),
                prompt_tokens=int(usage.get("prompt_tokens", 0)),
                tokens=int(usage.get("completion_tokens", 0)),
                finish_reason=str(choice.get("finish_reason")),
            )

        return self._answer("/chat/completions" if talks else "/completions", body, read)

    def _likelihood(self, prompt: Prompt, continuation: str) -> Response:
        if not isinstance(prompt, str):
            raise self._not_able("likelihoods of conversations")
        kept = prompt.rstrip()
        body = {
            "model": self._model, "prompt": prompt + continuation, "max_tokens": 0, "echo": True, "logprobs": 0,
            "temperature": 0,
        }  # fmt: skip

        def read(answer: dict[str, Any]) -> Response:
            scores = answer["choices"][0]["logprobs"]
            pairs = list(zip(scores["text_offset"], scores["token_logprobs"], strict=True))
            own = [logprob for offset, logprob in pairs if offset >= len(kept)]
            return Response(logprobs=(float(sum(own)),), tokens=len(own), prompt_tokens=len(pairs) - len(own))

        return self._answer("/completions", body, read)

    def _answer(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Response]) -> Response:
        try:
            return read(self._ask("POST", path, body, read))
        except EngineError as error:
            return Response(error=str(error), finish_reason="error")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], Any] = dict
    ) -> dict[str, Any]:
        """The JSON object that the endpoint answers, once `read` can make something of it.

        Raises:
            ConfigError: the endpoint refuses for a reason that another attempt does not mend.
            EngineError: no attempt got an answer.
        """
        problem, wait_seconds = "", 0.0
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(max(wait_seconds, _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)))
            wait_seconds = 0.0
            try:
                with self._room:
                    answer = self._client.request(method, f"{self._url}{path}", json=body)
                if answer.status_code == httpx.codes.OK:
                    value: dict[str, Any] = answer.json()
                    read(value)
                    return value
                problem = f"HTTP {answer.status_code}: {answer.text[:200]}"
                wait_seconds = _asked_to_wait(answer)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"an answer that is none: {type(error).__name__}: {error}"
                continue
            if answer.status_code == httpx.codes.BAD_REQUEST and body is not None:
                break  # this request alone is at fault
            if answer.status_code not in _AGAIN:
                raise ConfigError(
                    f"{self._url}{path} refuses", received=problem,
                    next_step=f"check the address, the model's name and ${KEY}",
                )  # fmt: skip
        raise EngineError(f"{self._url}{path} gave no answer", received=problem, next_step="see the endpoint's log")


def _asked_to_wait(answer: httpx.Response) -> float:
    """Seconds by `Retry-After`, within reason."""
    asked = answer.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_WAIT_SECONDS) if asked.isdecimal() else 0.0


def _joined(answers: Sequence[Response]) -> Response:
    error = next((answer.error for answer in answers if answer.error), None)
    return Response(
        texts=() if error else tuple(text for answer in answers for text in answer.texts),
        prompt_tokens=answers[0].prompt_tokens,
        tokens=sum(answer.tokens for answer in answers),
        finish_reason=answers[0].finish_reason,
        error=error,
    )
