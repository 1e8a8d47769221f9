"""Requests of the OpenAI API that are understood here, read strictly.

A field that is not honoured is refused by name instead of being ignored, because an ignored parameter gives the client
another answer than it asked for.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from actors.tools import ToolUse
from configs.schema.generation import MAX_LOGPROBS, MAX_STOPS, Sampling
from serving.calls import Call, Prompt, Refusal
from serving.openai.body import short
from serving.openai.formats import ResponseFormat, Strict, StructuredOutputs, wrong, wrong_field
from serving.openai.messages import Messages, NamedFunction, ToolChoice, Tools, conversation, functions

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; a chat goes on until the context window is full."""
MAX_CHOICES = 128
SEED_BITS = 63

# What clients may send where a validator makes one form of several.
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_PromptForms = (
    str | Annotated[list[str], Field(min_length=1)] | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]
)
_Stop = Annotated[str, Field(min_length=1)]
_StopForms = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)]


def _prompts(value: Any) -> Any:
    """The four forms of `prompt` as one: a tuple of texts or of token id tuples."""
    allowed = "allowed: a string, a list of strings, a list of token ids, or a list of lists of token ids"
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        wrong(allowed)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
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
    return tuple(stops)


def _biases(value: Any) -> Any:
    """Token ids come as the names of a JSON object's fields."""
    if not isinstance(value, dict) or not all(name.isascii() and name.isdecimal() for name in value):
        wrong("allowed: an object from token ids to numbers from -100 to 100")
    return {int(name): bias for name, bias in value.items()}


Bias = Annotated[float, Field(ge=-100, le=100)]
_BiasForm = dict[Annotated[str, Field(pattern=r"^[0-9]+$")], Bias]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool = False


class _Request(Strict):
    """What the two kinds of request share. `null` stands for the default, as OpenAI has it."""

    required: ClassVar[frozenset[str]] = frozenset({"model"})

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops, json_schema_input_type=_StopForms)] = ()
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_biases, json_schema_input_type=_BiasForm)] = Field({})
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    """Who asks: all of theirs go to one version where there is a canary; has no other effect."""

    # Not in OpenAI's API, but in that of other servers; `openai` clients send them as `extra_body`.
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    structured_outputs: StructuredOutputs | None = None
    return_sampling: bool = False
    """Each choice says how it was sampled, defaults and seed included."""
    return_timing: bool = False
    """The answer says where its time went, in the header `Server-Timing`."""

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
        tool_use: ToolUse | None = None,
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
            seeds=self._seeds(call_id, len(prompts)),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            choices=self.n,
            echo=echo,
            report_sampling=self.return_sampling,
            report_timing=self.return_timing,
            whole=not self.stream,
            tool_use=tool_use,
        )

    def _seeds(self, call_id: str, prompts: int) -> tuple[int, ...]:
        """The seed that is asked for, or one for each prompt that follows from the call's id, which is random: so any
        replica draws alike, and a stream that was cut can be written again.
        """
        if self.seed is not None:
            return (self.seed % (1 << SEED_BITS),) * prompts
        names = (f"{call_id}/{index}".encode() for index in range(prompts))
        return tuple(int.from_bytes(blake2b(name, digest_size=8).digest()) % (1 << SEED_BITS) for name in names)


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`."""

    required: ClassVar[frozenset[str]] = frozenset({"model", "prompt"})

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts, json_schema_input_type=_PromptForms)]
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
    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            wrong_field("max_tokens", "max_tokens and max_completion_tokens exclude each other")
        if self.top_logprobs and not self.logprobs:
            wrong_field("top_logprobs", "top_logprobs is allowed only with logprobs: true")
        conversation(self.messages)
        for field in ("tool_choice", "parallel_tool_calls"):
            if self.tools is None and field in self.model_fields_set:
                wrong_field(field, f"{field} is allowed only with tools")
        offered = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedFunction) and self.tool_choice.name not in offered:
            wrong_field("tool_choice", f"no function of tools has the name {short(repr(self.tool_choice.name))}")
        if self.tool_use is not None:
            for field in ("response_format", "structured_outputs"):
                if super()._structure_field == field:
                    wrong_field(field, f"tools and {field} exclude each other, unless tool_choice is none")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """What the answer may call; None where it is a text in any case."""
        if self.tools is None or self.tool_choice == "none":
            return None
        offered, required = functions(self.tools), self.tool_choice == "required"
        if isinstance(self.tool_choice, NamedFunction):
            name, required = self.tool_choice.name, True
            offered = tuple(function for function in offered if function.name == name)
        return ToolUse(offered, required, self.parallel_tool_calls)

    @property
    def _structure_field(self) -> str | None:
        return super()._structure_field if self.tool_use is None else "tools"

    def call(self, call_id: str) -> Call:
        """What an engine replica is asked."""
        limit = self.max_completion_tokens or self.max_tokens
        logprobs = self.top_logprobs if self.logprobs else None
        use = self.tool_use
        offered = () if use is None else functions(self.tools or ())
        asked = conversation(self.messages, offered)
        return self._call(call_id, (asked,), max_new_tokens=limit, logprobs=logprobs, tool_use=use)


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or the messages of a chat."""

    model: str
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    """As a chat offers them."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            wrong_field("prompt", "allowed: either prompt or messages")
        if self.tools is not None and self.messages is None:
            wrong_field("tools", "tools is allowed only with messages")
        self.what()
        return self

    def what(self) -> Prompt:
        """What is to be tokenized."""
        if self.messages is None:
            return self.prompt or ""
        return conversation(self.messages, functions(self.tools or ()))


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str
    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
