"""What a model's input embeddings say is alike: nearest tokens by cosine, and a projection of them to two dimensions.

A word of several tokens stands for the mean of their vectors, which the result says.
"""

# ruff: noqa: N803, N806 - names end in the shape of their tensor: V vocabulary, C hidden, N word or neighbour

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoModel

from actors.engine.pretrained import load_modules
from actors.text import Text
from configs.errors import RequestError

Floats = npt.NDArray[np.float32]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Neighbour(_Record):
    """A token of the vocabulary."""

    id: int
    text: str
    cosine: float
    x: float
    y: float


class WordNeighbours(_Record):
    """What is nearest to a word."""

    word: str
    token_ids: tuple[int, ...]
    """What the word is cut into; its vector is the mean of theirs."""
    x: float
    y: float
    neighbours: tuple[Neighbour, ...]
    """Nearest first; the word's own tokens left out."""


class EmbeddingView(_Record):
    """Words with their neighbours, placed by the two directions in which all of these differ most (PCA)."""

    vocabulary: int
    dimensions: int
    explained: tuple[float, float]
    """Share of the variance that each axis has."""
    words: tuple[WordNeighbours, ...]


def input_embeddings(folder: Path) -> Floats:
    """The vectors of all tokens, [V, C]. Raises what `load_modules` raises."""
    model = load_modules(folder, AutoModel, dtype=torch.float32, device=torch.device("cpu"), optional=("pooler.",))
    weights: Floats = model.get_input_embeddings().weight.detach().numpy()
    return weights


def neighbours(vectors_VC: Floats, text: Text, words: Sequence[str], *, count: int) -> EmbeddingView:
    """The `count` nearest tokens of each word, without the special ones.

    Raises `RequestError` for a word that has no token.
    """
    unit_VC = vectors_VC / np.maximum(np.linalg.norm(vectors_VC, axis=1, keepdims=True), 1e-12)
    cut = {word: text.encode(word) for word in words}
    for word, ids in cut.items():
        if not ids:
            raise RequestError("a word has no tokens", param="WORD", received=word, allowed="at least one character")
    usable = [token for token in range(min(text.vocab_size, len(vectors_VC))) if token not in text.special_ids]
    means = np.stack([vectors_VC[ids].mean(0) for ids in cut.values()])
    found = []
    for vector, ids in zip(means, cut.values(), strict=True):
        cosines = unit_VC @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
        others = np.array([token for token in usable if token not in ids])
        # Of equals the one with the smaller id first.
        nearest = others[np.argsort(-cosines[others], kind="stable")[:count]]
        found.append([(int(token), float(cosines[token])) for token in nearest])
    points, explained = project(np.concatenate([means, *(vectors_VC[[token for token, _ in near]] for near in found)]))
    places = iter(points[len(cut) :])
    return EmbeddingView(
        vocabulary=len(vectors_VC),
        dimensions=vectors_VC.shape[1],
        explained=explained,
        words=tuple(
            WordNeighbours(
                word=word,
                token_ids=tuple(ids),
                x=float(points[index, 0]),
                y=float(points[index, 1]),
                neighbours=tuple(
                    Neighbour(
                        id=token, text=text.token_bytes(token).decode("utf-8", "replace"), cosine=cosine,
                        x=float(place[0]), y=float(place[1]),
                    )
                    for (token, cosine), place in zip(near, places, strict=False)
                ),
            )
            for index, ((word, ids), near) in enumerate(zip(cut.items(), found, strict=True))
        ),
    )  # fmt: skip


def project(vectors_NC: Floats) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """The two principal components of some vectors [N, 2], and the share of the variance of each.

    The sign of an axis, which the method leaves open, is such that its largest entry is positive.
    """
    centred = vectors_NC.astype(np.float64) - vectors_NC.mean(0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2][np.arange(len(axes[:2])), np.abs(axes[:2]).argmax(1)])[:, None]
    points = np.zeros((len(centred), 2))
    points[:, : len(axes)] = centred @ axes.T
    total = float((sizes**2).sum())
    shares = [float(size**2) / total if total > 0 else 0.0 for size in (*sizes, 0.0, 0.0)[:2]]
    return points, (shares[0], shares[1])
