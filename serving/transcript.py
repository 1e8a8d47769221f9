"""From an engine's events of one request to the pieces of its answer: echo, spellings and places of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import EngineError
from serving.calls import Piece, TokenScore

if TYPE_CHECKING:
    from actors.engine.request import Request, TokenEvent, TokenLogprob
    from actors.text import Text
    from actors.tools import Convention
    from serving.timing import Lap


class Transcript:
    """One answer as it comes.

    Args of the constructor:
        index: the answer's place among those of its call.
        request: what the engine was asked; what it holds as generated was given out before, the echo too.
        text: of the model.
        digest: of the model.
        echo: the prompt's text, if the answer begins with it.
        report_sampling: whether the last piece says how the answer was sampled.
        convention: how calls of tools are written in the answer, if there may be any.
        lap: measures where the time goes, if pieces are to say so.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        text: Text,
        digest: str,
        *,
        echo: str | None,
        report_sampling: bool,
        convention: Convention | None,
        lap: Lap | None,
    ) -> None:
        self._index = index
        self._request = request
        self._text = text
        self._digest = digest
        self._echo = echo
        self._report_sampling = report_sampling
        self._scored = request.sampling.logprobs is not None
        self._convention = convention
        self._lap = lap
        self._decoder = text.stream_decoder(request.spelt)
        self._length = 0
        """Characters of the tokens scored so far."""
        if request.generated:
            given = (*request.prompt_ids, *request.generated) if echo is not None else request.generated
            for token in given:
                self._advance(token)
            self._echo = None

    def piece(self, event: TokenEvent) -> Piece:
        """What the event adds to the answer. Raises the error that ends the request."""
        reason = event.finish_reason
        if event.error is not None:
            raise event.error
        if reason == "error":
            raise EngineError(f"request {event.request_id} failed without saying why")
        shown, scores = "", []
        if self._echo is not None:
            shown, self._echo = self._echo, None
            if self._scored:
                scores = self._prompt(event)
        scores += [self._score(entry) for entry in event.logprobs]
        return Piece(
            index=self._index,
            text=shown + event.text,
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            model_digest=self._digest,
            token_ids=event.token_ids,
            finish_reason=reason,
            scores=tuple(scores) if self._scored else None,
            convention=self._convention,
            sampling=self._request.sampling if self._report_sampling and reason is not None else None,
            spent=None if self._lap is None else self._lap.next(event),
        )

    def _prompt(self, event: TokenEvent) -> list[TokenScore]:
        first = self._request.prompt_ids[0]
        offset = self._advance(first)
        rest = [self._score(entry) for entry in event.prompt_logprobs or ()]
        return [TokenScore(self._text.token_bytes(first), offset, None), *rest]

    def _score(self, entry: TokenLogprob) -> TokenScore:
        top = tuple((self._text.token_bytes(token), logprob) for token, logprob in entry.top)
        offset = self._advance(entry.token_id)
        return TokenScore(self._text.token_bytes(entry.token_id), offset, entry.logprob, top)

    def _advance(self, token: int) -> int:
        """Where the token begins in what is scored."""
        offset = self._length
        self._length += len(self._decoder.push(token))
        return offset
