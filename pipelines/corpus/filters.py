"""Quality filters: which documents are dropped, and for which reason."""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema.corpus import FiltersConfig


class Filters:
    """Applies what a config asks for."""

    def __init__(self, config: FiltersConfig) -> None:
        self._min_bytes = config.min_bytes

    def apply(self, texts: Sequence[bytes]) -> list[tuple[bytes, str | None]]:
        """Each text (UTF-8) as it is after the filters, and why it is dropped; None for those that are kept."""
        return [(text, "too_short" if len(text) < self._min_bytes else None) for text in texts]
