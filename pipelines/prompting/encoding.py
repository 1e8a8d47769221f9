"""Vectors of texts from the engine's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import Embedding, EncodeRequest
from pipelines.prompting.examples import Embed


def open_encoder(folder: Path) -> Embed:
    """An encoder that gives each text a vector of length 1; texts longer than its window are cut at their ends.

    Raises what `EncoderEngine.load` raises; the result raises `RequestError` if the model does not embed.
    """
    engine = EncoderEngine.load(folder)

    def embed(texts: Sequence[str]) -> np.ndarray:
        events = engine.encode([EncodeRequest(str(n), text, "embed", truncate=True) for n, text in enumerate(texts)])
        vectors = []
        for event in events:
            if event.error is not None:
                raise event.error
            if isinstance(event.encoding, Embedding):
                vectors.append(event.encoding.vector)
        return np.array(vectors, dtype=np.float32)

    return embed
