"""Requests of the OpenAI API that are understood here, read strictly.

A field that is not honoured is refused by name instead of being ignored, because an ignored parameter gives the client
another answer than it asked for. Everything wrong raises `ApiError`.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from configs.schema.generation import MAX_LOGPROBS, MAX_STOPS, Sampling
from serving.calls import Call, Conversation, Message, Prompt, Refusal
from serving.openai.errors import ApiError
from serving.openai.formats import ResponseFormat, Strict, StructuredOutputs

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; a chat goes on until the context window is full."""
MAX_CHOICES = 128
SEED_BITS = 63
_SHOWN_CHARS = 80
"""Of a value that is quoted in an error."""


def wrong(message: str) -> NoReturn:
    """For a field whose value cannot be used; raised inside a validator."""
    raise PydanticCustomError("wrong", "{message}", {"message": message})


def wrong_field(field: str, message: str) -> NoReturn:
    """For what only several fields together make wrong: the error's type names the one that is to be changed."""
    raise PydanticCustomError(field, "{message}", {"message": message})


def is_unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        wrong("holds half of a surrogate pair, which is no character")
    return text


def _prompts(value: Any) -> Any:
    """The four forms of `prompt` as one: a tuple of texts or of token id tuples."""
    allowed = "allowed: a string, a list of strings, a list of token ids, or a list of lists of token ids"
    if isinstance(value, str):
        return (is_unicode(value),)
    if not isinstance(value, list) or not value:
        wrong(allowed)
    if all(isinstance(item, str) for item in value):
        return tuple(is_unicode(item) for item in value)
    lists = [value] if _are_ids(value) else value
    if not all(isinstance(item, list) and item and _are_ids(item) for item in lists):
        wrong(allowed)
    return tuple(tuple(item) for item in lists)


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        wrong(f"allowed: a string or a list of at most {MAX_STOPS} strings, none of them empty")
    return tuple(is_unicode(stop) for stop in stops)


def _biases(value: Any) -> Any:
    """Token ids come as the names of a JSON object's fields."""
    if not isinstance(value, dict) or not all(name.isascii() and name.isdecimal() for name in value):
        wrong("allowed: an object from token ids to numbers from -100 to 100")
    return {int(name): bias for name, bias in value.items()}


def _content(value: Any) -> Any:
    """A message's text; text parts are joined."""
    if isinstance(value, list):
        if not all(isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in value):
            wrong('allowed: a string, or a list of parts {"type": "text", "text": ...}')
        if all(isinstance(p["text"], str) for p in value):
            return "".join(p["text"] for p in value)
    return value


Bias = Annotated[float, Field(ge=-100, le=100)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
UnicodeText = Annotated[str, AfterValidator(is_unicode)]


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool = False


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[UnicodeText, BeforeValidator(_content)]


Messages = Annotated[tuple[ChatMessage, ...], Field(min_length=1, strict=False)]


class _Request(Strict):
    """What the two kinds of request share. `null` stands for the default, as OpenAI has it."""

    required: ClassVar[frozenset[str]] = frozenset({"model"})

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_biases)] = Field({})
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """Who asks, for the client's own records; has no effect."""

    # Not in OpenAI's API, but in that of other servers; `openai` clients send them as `extra_body`.
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    structured_outputs: StructuredOutputs | None = None
    return_sampling: bool = False
    """Each choice says how it was sampled, defaults and seed included."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        optional = cls.model_fields.keys() - cls.required
        cleaned = {key: value for key, value in data.items() if value is not None or key not in optional}
        if "stream_options" in cleaned and cleaned.get("stream") is not True:
            wrong_field("stream_options", "allowed only with stream: true")
        return cleaned

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options.include_usage

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        if self.structured_outputs is not None and self.response_format.type != "text":
            wrong_field("structured_outputs", "response_format and structured_outputs exclude each other")
        if self.min_tokens and self._structure_field is not None:
            wrong_field("min_tokens", f"min_tokens and {self._structure_field} exclude each other")
        return self

    @property
    def _structure_field(self) -> str | None:
        if self.structured_outputs is not None:
            return "structured_outputs"
        return None if self.response_format.type == "text" else "response_format"

    def named(self, refusal: Refusal) -> Refusal:
        """A refusal that names the field as the client knows it."""
        if refusal.param != "structure":
            return refusal
        return replace(refusal, message=f"{self._structure_field}: {refusal.message}", param=self._structure_field)

    def _call(
        self,
        call_id: str,
        prompts: tuple[Prompt, ...],
        *,
        max_new_tokens: int | None,
        logprobs: int | None,
        echo: bool = False,
    ) -> Call:
        form = self.response_format if self.structured_outputs is None else self.structured_outputs
        sampling = Sampling(
            # The replica sets it; until then it must not be less than min_tokens.
            max_new_tokens=self.min_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
            structure=form.structure(),
        )
        return Call(
            id=call_id,
            prompts=prompts,
            seeds=self._seeds(len(prompts)),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            choices=self.n,
            echo=echo,
            report_sampling=self.return_sampling,
            whole=not self.stream,
        )

    def _seeds(self, prompts: int) -> tuple[int, ...]:
        """The seed that is asked for, or a random one for each prompt: drawn here, so that any replica draws alike."""
        if self.seed is not None:
            return (self.seed % (1 << SEED_BITS),) * prompts
        return tuple(secrets.randbits(SEED_BITS) for _ in range(prompts))


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`."""

    required: ClassVar[frozenset[str]] = frozenset({"model", "prompt"})

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 generates nothing: with `echo` and `logprobs`, the prompt is scored."""
    echo: bool = False
    logprobs: LogprobCount | None = None

    def call(self, call_id: str) -> Call:
        """What an engine replica is asked."""
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._call(call_id, self.prompt, max_new_tokens=limit, logprobs=self.logprobs, echo=self.echo)


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    required: ClassVar[frozenset[str]] = frozenset({"model", "messages"})

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: LogprobCount = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            wrong_field("max_tokens", "max_tokens and max_completion_tokens exclude each other")
        if self.top_logprobs and not self.logprobs:
            wrong_field("top_logprobs", "top_logprobs is allowed only with logprobs: true")
        return self

    def call(self, call_id: str) -> Call:
        """What an engine replica is asked."""
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        return self._call(call_id, (_conversation(self.messages),), max_new_tokens=limit, logprobs=logprobs)


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or the messages of a chat."""

    model: str
    prompt: UnicodeText | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            wrong_field("prompt", "allowed: either prompt or messages")
        return self

    def what(self) -> Prompt:
        """What is to be tokenized."""
        return _conversation(self.messages) if self.messages is not None else self.prompt or ""


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str
    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


def _conversation(messages: tuple[ChatMessage, ...]) -> Conversation:
    return Conversation(tuple(Message(m.role, m.content) for m in messages))


R = TypeVar("R", bound=BaseModel)


def read_request(kind: type[R], body: bytes) -> R:
    """Parses and checks a request body. Raises `ApiError` (400) that names the field at fault."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError.bad_request(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError.bad_request(
            f"the body is not a JSON object; received {_shown(data)}; allowed: an object with the request's fields"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # An unknown field tells more than what follows from its being misspelt: a required one that is missing.
        errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise _field_error(kind, errors[0]) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _field_error(kind: type[BaseModel], error: ErrorDetails) -> ApiError:
    param = ".".join(str(part) for part in error["loc"] if isinstance(part, str | int)) or error["type"]
    if error["type"] == "extra_forbidden":
        message, code = f"{param} is not supported; allowed: {', '.join(kind.model_fields)}", "unsupported_parameter"
        if len(error["loc"]) > 1:
            message = f"{param} is not supported"
        return ApiError.bad_request(message, param=param, code=code)
    if error["type"] == "missing":
        return ApiError.bad_request(f"{param} is required", param=param, code="missing_required_parameter")
    message = f"{param}: {error['msg']}"
    if error["loc"]:
        message += f"; received {_shown(error['input'])}"
    return ApiError.bad_request(message, param=param, code="invalid_value")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
