"""`ganymede generate`: text from a model in this process, with the engine that serves."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.cli.models import MODEL_HELP, find_model_folder
from infra.cli.output import Debug, Json, err, print_json
from infra.local import route_logs, state_home

if TYPE_CHECKING:
    from actors.engine.engine import Engine
    from actors.engine.request import Completion, Request
    from actors.engine.seq2seq import Seq2SeqEngine
    from configs.schema.generation import Sampling


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", help="Text to continue, or the source of an encoder-decoder; - reads standard input."
        ),
    ],
    chat: Annotated[bool, typer.Option("--chat", help="Ask the prompt as a user of the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; can be repeated.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continues a prompt, or answers a source (T5, BART), as it is generated.

    Example: ganymede generate demo@champion --chat --prompt "Hello".
    """
    home = state_home()
    route_logs(home)
    sampling = _sampling(
        {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or ()}
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with err().status(f"loading {model}"):
        from actors.engine.request import Request

        found = find_model_folder(model, home)
        engine = _load(found.folder)
    ids = _prompt_ids(engine, text, chat=chat)
    began = time.monotonic()
    completion = _stream(engine, Request("prompt", tuple(ids), sampling), show=not as_json)
    seconds = time.monotonic() - began
    if not as_json:
        return
    print_json(
        {
            "model": found.name,
            "digest": found.digest,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "tokens_per_second": round(len(completion.token_ids) / seconds, 1),
        }
    )


def _load(folder: Path) -> Engine | Seq2SeqEngine:
    """Raises `ArtifactError` for an encoder, which generates no text."""
    from actors.engine.engine import Engine
    from actors.engine.loading import runner_kind
    from actors.engine.seq2seq import Seq2SeqEngine
    from configs.errors import ArtifactError

    kind = runner_kind(folder)
    if kind == "encoder":
        raise ArtifactError(
            f"the model in {folder} generates no text",
            received="an encoder, which classifies, tags or embeds",
            allowed="a causal language model or an encoder-decoder",
            next_step="choose another model",
        )
    return Seq2SeqEngine.load(folder, max_sequences=1) if kind == "seq2seq" else Engine.load(folder, max_sequences=1)


def _prompt_ids(engine: Engine | Seq2SeqEngine, text: str, *, chat: bool) -> Sequence[int]:
    """What the model reads: a chat, a source with what the tokenizer puts around it, or the text alone."""
    from actors.engine.seq2seq import Seq2SeqEngine

    if chat:
        return engine.text.render_chat([{"role": "user", "content": text}])
    return engine.encode_source(text) if isinstance(engine, Seq2SeqEngine) else engine.text.encode(text)


def _sampling(values: dict[str, object]) -> Sampling:
    """Raises `RequestError` with the option at fault."""
    from pydantic import ValidationError

    from configs.errors import RequestError
    from configs.schema.generation import Sampling

    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        option = "--max-tokens" if name == "max_new_tokens" else f"--{name.replace('_', '-')}"
        allowed = first["msg"].removeprefix("Input should be ")
        raise RequestError(option, param=name, received=first["input"], allowed=allowed) from error


def _stream(engine: Engine | Seq2SeqEngine, request: Request, *, show: bool) -> Completion:
    """Runs one request to its end, writing the text as it is certain. Raises the engine's error if it ends in one."""
    from actors.engine.request import Completion

    engine.submit(request)
    events = []
    while engine.has_work:
        for event in engine.step():
            events.append(event)
            if show:
                sys.stdout.write(event.text)
                sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
    completion = Completion.of(events)
    if completion.error is not None:
        raise completion.error
    return completion
