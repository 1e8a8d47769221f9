"""Attention, embeddings and cuts of tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from actors.text import Text
from configs.errors import RequestError
from pipelines.prompting.attention_maps import AttentionMaps, head_summaries, read_attention
from pipelines.prompting.attention_page import attention_page
from pipelines.prompting.neighbours import neighbours, project
from pipelines.prompting.pictures import attention_picture, embeddings_picture
from pipelines.prompting.token_cuts import cut_text, shown_pieces, visible
from tests.actors.conftest import MakeModel
from tests.actors.engine.conftest import MakeEncoder, MakeSeq2Seq

TEXT = "def dump(obj, fp):"


def test_a_decoder_looks_back_only(make_model: MakeModel) -> None:
    (maps,) = read_attention(make_model(), TEXT)
    assert maps.kind == "decoder"
    assert "".join(maps.queries) == TEXT
    count = len(maps.queries)
    assert maps.weights_LHQK.shape == (2, 4, count, count)
    assert np.allclose(maps.weights_LHQK.sum(-1), 1, atol=1e-5)
    assert (maps.weights_LHQK[..., np.triu_indices(count, 1)[0], np.triu_indices(count, 1)[1]] == 0).all()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "roberta", "xlm-roberta"])
def test_an_encoder_looks_both_ways(make_encoder: MakeEncoder, kind: str) -> None:
    (maps,) = read_attention(make_encoder(kind), "dump the obj")
    assert maps.kind == "encoder"
    assert maps.queries[0] in ("[CLS]", "<s>")
    assert maps.weights_LHQK.shape[:2] == (3, 4)
    assert np.allclose(maps.weights_LHQK.sum(-1), 1, atol=1e-5)
    assert maps.weights_LHQK[0, :, 0, 1:].max() > 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_three_kinds(make_seq2seq: MakeSeq2Seq, name: str) -> None:
    encoder, decoder, cross = read_attention(make_seq2seq(name), TEXT, target="fp.write")
    assert (encoder.kind, decoder.kind, cross.kind) == ("encoder", "decoder", "cross")
    assert cross.keys == encoder.queries
    assert cross.queries == decoder.queries
    assert "".join(cross.queries[1:]) == "fp.write"
    assert cross.weights_LHQK.shape == (3, 4, len(decoder.queries), len(encoder.queries))
    assert np.allclose(cross.weights_LHQK.sum(-1), 1, atol=1e-5)
    assert len(read_attention(make_seq2seq(name), TEXT)[1].queries) > 1  # what it writes by itself


def test_what_a_model_has_no_use_for_is_refused(make_model: MakeModel, make_encoder: MakeEncoder) -> None:
    with pytest.raises(RequestError, match="--pair is for another kind of model"):
        read_attention(make_model(), TEXT, pair="x")
    with pytest.raises(RequestError, match="--chat is for another kind of model"):
        read_attention(make_encoder("bert"), TEXT, chat=True)
    with pytest.raises(RequestError, match="text cannot be drawn"):
        read_attention(make_model(), "")


def test_summaries_tell_heads_apart() -> None:
    before = np.eye(4, k=-1)
    before[0, 0] = 1
    weights = np.stack([np.eye(4), before, np.full((4, 4), 0.25)])[None].astype(np.float32)
    same, previous, even = head_summaries(AttentionMaps("encoder", tuple("abcd"), tuple("abcd"), weights))
    assert (same.same, same.previous, same.first, same.entropy_bits) == (1, 0, 0.25, 0)
    assert (previous.same, previous.previous, previous.first) == (0.25, 1, 0.5)
    assert even.entropy_bits == pytest.approx(2)


def test_pictures_and_page_of_any_token() -> None:
    weights = np.full((1, 2, 2, 3), 1 / 3, dtype=np.float32)
    maps = AttentionMaps("cross", ("</script><b>", "$x$"), ("\n", "", "🦉"), weights)
    for place in ({}, {"layer": 0}, {"layer": 0, "head": 1}):
        assert attention_picture(maps, **place).startswith(b"\x89PNG")
    page = attention_page([maps], "<i>model</i>")
    assert page.count("</script>") == 2
    assert "&lt;i&gt;model" in page
    assert not re.search(r"https?:|src=|href=", page)


def test_the_nearest_token_is_the_one_with_the_same_direction(tokenizer_folder: Path) -> None:
    text = Text.load(tokenizer_folder)
    vectors = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
    (word,) = text.encode(" return")[:1]
    twin = text.encode(")")[0]
    vectors[twin] = 3 * vectors[word]
    view = neighbours(vectors, text, [text.decode([word]), "zq"], count=4)
    assert view.words[0].neighbours[0].id == twin
    assert view.words[0].neighbours[0].cosine == pytest.approx(1, abs=1e-5)
    assert [len(w.neighbours) for w in view.words] == [4, 4]
    assert len(view.words[1].token_ids) == 2
    named = {n.id for w in view.words for n in w.neighbours}
    assert not named & text.special_ids
    assert embeddings_picture(view).startswith(b"\x89PNG")
    with pytest.raises(RequestError, match="no tokens"):
        neighbours(vectors, text, [""], count=1)


def test_the_projection_keeps_what_differs_most() -> None:
    line = np.outer(np.array([-1.0, 0.0, 2.0]), np.array([0.6, 0.8, 0.0])).astype(np.float32)
    points, explained = project(line)
    assert explained == pytest.approx((1, 0), abs=1e-6)
    assert np.ptp(points[:, 0]) == pytest.approx(3, abs=1e-6)
    assert project(np.ones((1, 4), dtype=np.float32))[1] == (0, 0)


def test_a_cut_accounts_for_every_byte(tokenizer_folder: Path) -> None:
    text = "naïve 🦉 <|end|>\n"
    cut = cut_text(tokenizer_folder, text)
    assert cut.restored
    assert bytes.fromhex("".join(token.bytes_hex for token in cut.tokens)) == text.encode()
    owl = text.index("🦉")
    assert sum((token.begin, token.end) == (owl, owl + 1) for token in cut.tokens) == 4
    assert ("🦉", True) in shown_pieces(cut, text)
    assert "".join(run for run, _ in shown_pieces(cut, text)) == text
    assert cut.bytes_per_token == len(text.encode()) / len(cut.tokens)


def test_what_a_tokenizer_puts_around_a_text_is_marked(make_encoder: MakeEncoder) -> None:
    cut = cut_text(make_encoder("bert"), "Dump it")
    assert [token.piece for token in cut.tokens if token.added] == ["[CLS]", "[SEP]"]
    assert "".join(bytes.fromhex(t.bytes_hex).decode() for t in cut.tokens if not t.added) == "Dumpit"
    assert not cut.restored  # it is lower-cased


def test_tokens_are_made_visible() -> None:
    assert visible(" a\n") == "·a⏎"
    assert visible(" " * 12) == "·*12"
    assert visible("") == "∅"
    assert visible("\x00") == "\\x00"
    assert len(visible("x" * 100)) == 24
