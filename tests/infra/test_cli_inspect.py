"""`ganymede inspect` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.actors.conftest import MakeModel, make_model, tokenizer_folder
from tests.infra.conftest import Ganymede

__all__ = ["make_model", "tokenizer_folder"]


@pytest.mark.slow
def test_next_token_is_one_document_and_a_picture(ganymede: Ganymede, make_model: MakeModel, tmp_path: Path) -> None:
    png = tmp_path / "next.png"
    done = ganymede(
        "inspect", "next-token", str(make_model()), "--prompt", "def f(", "--top-k", "3", "--temperature", "0.5",
        "--show", "4", "--png", str(png), "--json",
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert list(document["views"]) == ["the model", "temperature 0.5", "top-k 3", "together", "greedy"]
    assert document["views"]["top-k 3"]["tokens_kept"] == 3
    assert document["views"]["together"]["settings"] == {"temperature": 0.5, "top_k": 3}
    assert len(document["candidates"]) == 4
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_attention_writes_a_page_and_prints_what_heads_do(
    ganymede: Ganymede, make_model: MakeModel, tmp_path: Path
) -> None:
    page = tmp_path / "maps.html"
    done = ganymede("inspect", "attention", str(make_model()), "--text", "def f(x)", "--html", str(page))
    assert "decoder attention" in done.stdout
    assert len(done.stdout.splitlines()) == 2 + 2 * 4
    assert page.read_text().startswith("<!doctype html>")


def test_tokens_prints_the_cut(ganymede: Ganymede, tokenizer_folder: Path) -> None:
    cut = ganymede("inspect", "tokens", str(tokenizer_folder), "--text", "ï f")
    assert "[ï]|·f" in cut.stdout


@pytest.mark.slow
def test_embeddings_is_one_document(ganymede: Ganymede, make_model: MakeModel) -> None:
    near = json.loads(ganymede("inspect", "embeddings", str(make_model()), " f", "-n", "3", "--json").stdout)
    assert len(near["words"][0]["neighbours"]) == 3


@pytest.mark.slow
def test_what_cannot_be_shown_is_one_message(ganymede: Ganymede, make_model: MakeModel) -> None:
    done = ganymede("inspect", "attention", str(make_model()), "--text", "f", "--layer", "9")
    assert done.returncode == 2
    assert "0 to 1" in done.stderr
    assert "Traceback" not in done.stderr
