import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.store.artifacts import Artifact
from configs.errors import ContractError
from pipelines.corpus.encode import Encoder, fastest_encoder, first_difference
from pipelines.corpus.tokenizer import SPECIAL_TOKENS

BLNS = Path(__file__).parents[4] / "shared/data/blns/blns.json"


@pytest.fixture(scope="module")
def encoder(tokenizer: Artifact) -> Encoder:
    return Encoder.load(tokenizer.path, "gigatoken")


def _decode(tokenizer: Artifact, ids: "np.ndarray") -> str:
    return Tokenizer.from_file(str(tokenizer.path / "tokenizer.json")).decode(ids.tolist(), skip_special_tokens=False)


def test_gigatoken_is_chosen_for_our_tokenizers(tokenizer: Artifact) -> None:
    encoder, reason = fastest_encoder(tokenizer.path)
    assert (encoder.backend, reason) == ("gigatoken", "")
    assert first_difference(encoder, ["def f(): pass"]) is None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=300, deadline=None)
def test_both_backends_give_the_same_ids_and_every_text_comes_back(
    encoder: Encoder, tokenizer: Artifact, text: str
) -> None:
    assert encoder.agrees(text)
    assert _decode(tokenizer, encoder.encode(text)) == text


def test_naughty_strings_come_back(encoder: Encoder, tokenizer: Artifact) -> None:
    if not BLNS.is_file():
        pytest.skip(f"no naughty strings at {BLNS}")
    strings = json.loads(BLNS.read_text(encoding="utf-8"))
    for text in strings:
        assert encoder.agrees(text), text
        assert _decode(tokenizer, encoder.encode(text)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_never_yields_a_special_token(encoder: Encoder, tokenizer: Artifact, token: str) -> None:
    text = f"a {token}{token} b"
    for ids in (encoder.encode(text), encoder.encode_exactly(text)):
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert _decode(tokenizer, ids) == text


def test_a_tokenizer_gigatoken_encodes_differently_is_found_out(tmp_path: Path) -> None:
    """Without a split into words, merges cross spaces; gigatoken splits all the same."""
    _save(tmp_path, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), merges=[("q", "Ġ")])
    encoder, _ = fastest_encoder(tmp_path)
    assert encoder.backend == "gigatoken"
    assert first_difference(encoder, ["no such pair"]) is None
    assert first_difference(encoder, ["no such pair", "Iraq is a country"]) == "'Iraq is a country'"


def test_a_tokenizer_gigatoken_cannot_load_falls_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    encoder, reason = fastest_encoder(tmp_path)
    assert encoder.backend == "tokenizers"
    assert "WordLevel" in reason
    assert encoder.encode("a b a").tolist() == [1, 2, 1]


def _save(folder: Path, pre_tokenizer: object, merges: list[tuple[str, str]] | None = None) -> None:
    entries = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges or [])]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges or []))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')


@pytest.mark.parametrize(
    ("tokenizer_json", "config", "said"),
    [(None, "{}", "No such file"), ("{}", "{}", "tokenizer.json"), ("whole", "{}", "eos_token")],
)
def test_an_unusable_tokenizer_is_an_error_that_names_it(
    tmp_path: Path, tokenizer_json: str | None, config: str, said: str
) -> None:
    if tokenizer_json == "whole":
        _save(tmp_path, pre_tokenizers.ByteLevel())
    elif tokenizer_json is not None:
        (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ContractError, match=said):
        Encoder.load(tmp_path, "gigatoken")
