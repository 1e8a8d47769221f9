"""What a model may say next, and what each control of the sampling leaves of it.

The logits come from the engine's forward pass, top-k, top-p, min-p and the draws from the engine's sampling; a view's
probabilities are those that `sample` draws by.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from actors.engine.modules import load_decoder
from actors.engine.pretrained import Precision, placement
from actors.engine.sampling import Row, sample, truncate
from actors.engine.scheduler import Span
from actors.text import Text
from configs.errors import EngineError, RequestError
from configs.schema.generation import Sampling

CONTROLS = {"temperature", "top_k", "top_p", "min_p"}
"""Fields of the sampling settings that are shown; the others need a text that is under way."""
_SEEDS_SHOWN = 5


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class View(_Record):
    """The distribution that is drawn from under some settings."""

    settings: dict[str, float]
    """Of the sampling, those that differ from drawing from all that the model says."""
    tokens_kept: int
    """Tokens that can be drawn."""
    mass_kept: float
    """Share of the distribution, after the temperature, that these tokens had."""
    entropy_bits: float
    """0 where one token is certain, log2 of the vocabulary where all are alike."""
    drawn: tuple[str, ...]
    """What the seeds 0, 1, 2, ... draw."""


class Candidate(_Record):
    """One of the likeliest tokens."""

    id: int
    text: str
    """What the token adds to a text; a character that it holds a part of is U+FFFD."""
    logit: float
    probabilities: dict[str, float]
    """By view; 0 where it cannot be drawn."""


class NextToken(_Record):
    """The next token of a prompt under several views."""

    prompt_tokens: int
    vocabulary: int
    views: dict[str, View]
    candidates: tuple[Candidate, ...]
    """Likeliest first."""
    other_probability: float
    """What the model gives to all tokens that are not among the candidates."""


def next_token(
    logits_V: torch.Tensor, prompt_ids: Sequence[int], text: Text, views: Mapping[str, Sampling], *, shown: int
) -> NextToken:
    """What may follow a prompt.

    Args:
        logits_V: fp32, of the token after the prompt.
        prompt_ids: the prompt; a draw depends on its length.
        text: the model's tokenizer.
        views: settings by name. Penalties, bias and structure change nothing here.
        shown: how many candidates.

    Raises `EngineError` if the logits are not finite numbers.
    """
    if not bool(logits_V.isfinite().all()):
        raise EngineError("the model's logits are not finite numbers", next_step="check the model's weights")
    plain_V = logits_V.double().softmax(-1)
    ids = plain_V.topk(min(shown, len(plain_V))).indices.tolist()
    found = {name: _view(logits_V, prompt_ids, text, settings) for name, settings in views.items()}
    return NextToken(
        prompt_tokens=len(prompt_ids),
        vocabulary=len(logits_V),
        views={name: view for name, (view, _) in found.items()},
        candidates=tuple(
            Candidate(
                id=token,
                text=token_text(text, token),
                logit=float(logits_V[token]),
                probabilities={name: float(kept_V[token]) for name, (_, kept_V) in found.items()},
            )
            for token in ids
        ),
        other_probability=max(0.0, 1.0 - float(plain_V[ids].sum())),
    )


def prompt_logits(
    folder: Path, prompt_ids: Sequence[int], *, precision: Precision = "auto", device: str = "auto"
) -> torch.Tensor:
    """fp32 logits [V] of the token after a prompt, by the engine's forward pass over its cache.

    Raises `RequestError` for a prompt that does not fit, and what `load_decoder` raises.
    """
    dtype, where = placement(precision, device)
    decoder = load_decoder(folder, "auto", dtype=dtype, device=where, precision=precision)
    if not 0 < len(prompt_ids) < decoder.context:
        raise RequestError(
            "the prompt leaves no room in the model's context window, or is empty", param="prompt",
            received=f"{len(prompt_ids)} tokens", allowed=f"1 to {decoder.context - 1} tokens",
        )  # fmt: skip
    cache = decoder.new_cache(len(prompt_ids))
    cache.arrange(rows=1, width=len(prompt_ids))
    with torch.inference_mode():
        return decoder.run([Span(0, 0, list(prompt_ids))], cache, [len(prompt_ids) - 1])[0].cpu()


def token_text(text: Text, token_id: int) -> str:
    """A token as it reads: the characters of its bytes."""
    return text.token_bytes(token_id).decode("utf-8", "replace")


def _view(
    logits_V: torch.Tensor, prompt_ids: Sequence[int], text: Text, settings: Sampling
) -> tuple[View, torch.Tensor]:
    """What the settings leave, and each token's chance to be drawn, [V]."""
    rows = [
        Row(settings.model_copy(update={"seed": seed}), prompt_ids, len(prompt_ids)) for seed in range(_SEEDS_SHOWN)
    ]
    drawn = [token for token in sample(logits_V.repeat(len(rows), 1), rows) if token is not None]
    if settings.temperature == 0:
        weights_V = torch.zeros_like(logits_V)
        weights_V[drawn[0]] = logits_V.softmax(-1)[drawn[0]]
    else:
        weights_V = truncate((logits_V / settings.temperature).softmax(-1)[None], [settings])[0]
    share = float(weights_V.double().sum())
    kept_V = weights_V.double() / share
    view = View(
        settings=settings.model_dump(include=CONTROLS, exclude_defaults=True),
        tokens_kept=int((kept_V > 0).sum()),
        mass_kept=min(1.0, share),
        entropy_bits=float(torch.special.entr(kept_V).sum()) / math.log(2),
        drawn=tuple(token_text(text, token) for token in drawn),
    )
    return view, kept_V
