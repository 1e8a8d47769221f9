import asyncio
from pathlib import Path

import pytest

from benchmarks.serving import _page
from benchmarks.serving_load import ask, closed_loop, rates
from tests.serving.conftest import local_endpoint


def test_the_client_counts_tokens_and_sees_the_first_one_before_the_last(model_folder: Path) -> None:
    with local_endpoint(model_folder) as url:
        port = int(url.rpartition(":")[2])
        stream = asyncio.run(ask(port, "tiny", "def open", 40, stream=True))
        assert 0 < stream.first_token_seconds < stream.seconds
        # Tokens that come together are one event, and those that are part of a character have no text of their own.
        assert 1 < stream.tokens <= 40
        whole = asyncio.run(ask(port, "tiny", "def open", 40, stream=False))
        assert (whole.tokens, whole.first_token_seconds) == (40, whole.seconds)
        seconds, replies = asyncio.run(closed_loop(port, "tiny", ["a", "b", "c"], 5, concurrency=2, stream=True))
        assert rates(seconds, replies, 5)["output_tokens_per_second"] == pytest.approx(15 / seconds)
        with pytest.raises(RuntimeError, match="404"):
            asyncio.run(ask(port, "other", "def", 4, stream=True))


def test_the_page_has_speeds_ratios_and_memory() -> None:
    def row(rate: float, first: float) -> dict[str, dict[str, float]]:
        return {n: {"output_tokens_per_second": rate, "median_first_token_seconds": first} for n in ("1", "32")}

    page = _page({
        "date": "today", "command": "python -m benchmarks.serving", "versions": {"ray": "2"}, "runs": 1,
        "machine": {"processor": "p", "cores": 2, "memory_gb": 8, "load_before": 0.1, "python": "3"},
        "streamed": {"engine, no HTTP": row(1000, 0.02), "ours": row(900, 0.025), "transformers serve": row(100, 0.2)},
        "whole": {"ours": {"output_tokens_per_second": 950.0}},
        "idle_streams": {"streams": 968, "all_mb": 150.0},
    })  # fmt: skip
    assert "| ours | 900 | 900 |" in page
    assert "| transformers serve | 200.0 | 200.0 |" in page
    assert "90% of the engine's own tokens/s at 32; 5.0 ms added" in page
    assert "9.0 times the tokens/s at 32; 8.0 times as fast to the first token at 1, 8.0 times" in page
    assert "968 open streams that wait cost 150 MB" in page
