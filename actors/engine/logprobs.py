"""Log-probabilities of tokens under the model's own distribution."""

# ruff: noqa: N803, N806 - names end in the shape of their tensor

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.engine.request import TokenLogprob


def describe(logprobs_NV: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """What each row says of its token and of as many of its likeliest tokens as `tops` has for it.

    Args:
        logprobs_NV: `log_softmax` of the model's logits.
        tokens: the token that stands, or is to stand, at each row's place.
        tops: how many alternatives each row is to name; at most the vocabulary is.
    """
    tokens_N1 = torch.tensor(tokens, device=logprobs_NV.device)[:, None]
    own = logprobs_NV.gather(-1, tokens_N1).squeeze(-1).tolist()
    most = min(max(tops, default=0), logprobs_NV.shape[-1])
    values_NT, ids_NT = logprobs_NV.topk(most, dim=-1)
    best = zip(ids_NT.tolist(), values_NT.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, logprob, top, (ids, values) in zip(tokens, own, tops, best, strict=True)
    ]
