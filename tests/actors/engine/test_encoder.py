"""Encoders: the plain forward pass's results in any batch, words and spans in characters, windows and errors."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from actors.engine.encoder import EncoderEngine
from actors.engine.encodings import Classification, Embedding, EncodeRequest, Piece, Tagging, spans
from configs.errors import ArtifactError, CorruptArtifactError, EngineError, OverloadedError, RequestError

SENTENCES = [
    "Alexander Smith lives in London and works there.",
    "Paris, 1889: the tower!",
    "it rained",
    "A much longer sentence, with many more words in it than any of the others has, so that it needs padding.",
    "naïve café",
    "[SEP] and </s> are words here",
]
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
KINDS = ("bert", "distilbert", "modernbert", "roberta", "xlm-roberta")
MakeEncoder = Callable[..., Path]


def load(folder: Path, **options: Any) -> EncoderEngine:
    return EncoderEngine.load(folder, precision="fp32", device="cpu", **options)


@cache
def plain_model(folder: Path, auto_class: Any) -> Any:
    return auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def naive(folder: Path, request: EncodeRequest, auto_class: Any) -> Any:
    """What the model makes of one text alone, through its own tokenizer's files."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(request.text, request.pair)
    model = plain_model(folder, auto_class)
    types = {"token_type_ids": torch.tensor([encoding.type_ids])} if model.config.model_type == "bert" else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([encoding.ids]), **types)


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = " ".join(SENTENCES).split()
    return [" ".join(draw.choices(words, k=draw.randrange(1, 14)))[:110] for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_equal_the_plain_forward_pass_in_any_batch(make_encoder: MakeEncoder, kind: str) -> None:
    folder = make_encoder(kind, "ForSequenceClassification")
    asked = [
        EncodeRequest(str(n), text, "classify", pair="it rained" if n % 3 == 0 else None)
        for n, text in enumerate(texts(20, seed=1))
    ]
    expected = [
        naive(folder, one, transformers.AutoModelForSequenceClassification).logits[0].softmax(-1) for one in asked
    ]
    for batch_tokens in (1, 100, 10_000):
        for event, wanted in zip(load(folder, batch_tokens=batch_tokens).encode(asked), expected, strict=True):
            assert isinstance(event.encoding, Classification)
            assert event.encoding.label == LABELS[int(wanted.argmax())]
            assert list(event.encoding.scores) == list(LABELS)
            got = torch.tensor(list(event.encoding.scores.values()))
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_the_plain_forward_pass_in_any_batch(make_encoder: MakeEncoder, kind: str) -> None:
    folder = make_encoder(kind)
    engine = load(folder, batch_tokens=200)
    for pooling, normalize in (("mean", True), ("cls", False)):
        asked = [
            EncodeRequest(str(n), text, "embed", pooling=pooling, normalize=normalize)
            for n, text in enumerate(texts(15, seed=2))
        ]
        for request, event in zip(asked, engine.encode(asked), strict=True):
            hidden = naive(folder, request, transformers.AutoModel).last_hidden_state[0]
            wanted = hidden.mean(0) if pooling == "mean" else hidden[0]
            wanted = wanted / wanted.norm() if normalize else wanted
            assert isinstance(event.encoding, Embedding)
            torch.testing.assert_close(torch.tensor(event.encoding.vector), wanted, atol=1e-4, rtol=0)
            assert event.prompt_tokens == len(engine.text.encode_input(request.text).token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_words_have_their_first_tokens_label_and_their_own_characters(make_encoder: MakeEncoder, kind: str) -> None:
    folder = make_encoder(kind, "ForTokenClassification")
    asked = [EncodeRequest(str(n), text, "tag") for n, text in enumerate(SENTENCES)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for request, event in zip(asked, load(folder).encode(asked), strict=True):
        assert isinstance(event.encoding, Tagging)
        probabilities = naive(folder, request, transformers.AutoModelForTokenClassification).logits[0].softmax(-1)
        word_ids = tokenizer.encode(request.text).word_ids
        firsts = [n for n, word in enumerate(word_ids) if word is not None and word not in word_ids[:n]]
        words = event.encoding.words
        assert [word.label for word in words] == [LABELS[int(probabilities[n].argmax())] for n in firsts]
        assert [word.probability for word in words] == pytest.approx([float(probabilities[n].max()) for n in firsts])
        shown = [request.text[word.start : word.end] for word in words]
        assert "".join(shown) == request.text.replace(" ", "")
        assert all(piece.strip() == piece for piece in shown)
        assert event.encoding.spans == spans(words)


def test_spans_are_read_from_the_prefixes_of_labels() -> None:
    def read(*labels: str) -> list[tuple[int, int, str]]:
        words = [Piece(10 * n, 10 * n + 9, label, 0.5) for n, label in enumerate(labels)]
        return [(span.start // 10, span.end // 10, span.label) for span in spans(words)]

    assert read("B-PER", "I-PER", "O", "B-LOC") == [(0, 1, "PER"), (3, 3, "LOC")]
    assert read("B-PER", "B-PER", "I-LOC", "I-LOC") == [(0, 0, "PER"), (1, 1, "PER"), (2, 3, "LOC")]
    assert read("I-PER", "I-PER", "O", "I-PER") == [(0, 1, "PER"), (3, 3, "PER")]
    assert read("S-A", "B-A", "I-A", "E-A", "I-A", "U-A", "L-A") == [
        (0, 0, "A"), (1, 3, "A"), (4, 4, "A"), (5, 5, "A"), (6, 6, "A")]  # fmt: skip
    assert read("NOUN", "NOUN", "O", "VERB") == [(0, 0, "NOUN"), (1, 1, "NOUN"), (3, 3, "VERB")]
    two = spans([Piece(0, 4, "B-X", 0.5), Piece(5, 9, "I-X", 1.0)])
    assert two == (Piece(0, 9, "X", 0.75),)


def test_every_request_ends_once_whatever_arrives_and_is_cancelled(make_encoder: MakeEncoder) -> None:
    engine = load(make_encoder("bert"), batch_tokens=64)
    asked = [EncodeRequest(str(n), text, "embed") for n, text in enumerate(texts(60, seed=3))]
    alone = {one.id: engine.encode([one])[0] for one in asked}
    draw = random.Random(3)
    waiting, ended, cancelled = asked[::-1], [], set()
    while waiting or engine.has_work:
        while waiting and draw.random() < 0.7:
            engine.submit(waiting.pop())
        if engine.has_work and draw.random() < 0.3:
            name = draw.choice(sorted(engine._waiting))
            cancelled.add(name)
            engine.cancel(name)
        ended += engine.step()
    assert len(ended) == len({event.request_id for event in ended}) == 60 - len(cancelled)
    assert cancelled
    for event in ended:
        assert event.encoding.vector == pytest.approx(alone[event.request_id].encoding.vector, abs=1e-4)


def test_the_first_that_came_is_in_the_next_batch(make_encoder: MakeEncoder) -> None:
    engine = load(make_encoder("bert"), batch_tokens=40)
    long = SENTENCES[3]
    engine.submit(EncodeRequest("first", long, "embed"))
    for n in range(50):
        engine.submit(EncodeRequest(str(n), "it rained", "embed"))
    assert [event.request_id for event in engine.step()] == ["first"]
    assert len(engine.step()) == 40 // len(engine.text.encode_input("it rained").token_ids)


@pytest.mark.parametrize(("kind", "window"), [("bert", 96), ("roberta", 94), ("modernbert", 96)])
def test_a_text_beyond_the_window_is_refused_or_cut_as_asked(make_encoder: MakeEncoder, kind: str, window: int) -> None:
    engine = load(make_encoder(kind))
    assert engine.context_length == window
    long = "it rained, " * 60
    with pytest.raises(RequestError, match=f"at most {window} tokens") as caught:
        engine.submit(EncodeRequest("a", long, "embed"))
    assert caught.value.param == "text"
    assert not engine.has_work
    (event,) = engine.encode([EncodeRequest("a", long, "embed", truncate=True)])
    assert (event.truncated, event.prompt_tokens) == (True, window)
    whole = engine.text.encode_input(long).token_ids
    assert engine.text.encode_input(long, window=window).token_ids == (*whole[: window - 1], whole[-1])


def test_the_longer_text_of_a_pair_is_cut_first(make_encoder: MakeEncoder) -> None:
    text = load(make_encoder("bert", "ForSequenceClassification")).text
    read = text.encode_input("it rained", "paris " * 50, window=20)
    whole = text.encode_input("it rained", "paris " * 50)
    assert len(read.token_ids) == 20
    kept = read.type_ids.index(1)
    assert read.token_ids[:kept] == whole.token_ids[:kept]
    assert read.token_ids[-1] == whole.token_ids[-1] == 3


def test_several_labels_one_label_and_regression_have_scores_of_their_own(make_encoder: MakeEncoder) -> None:
    request = EncodeRequest("a", SENTENCES[0], "classify")
    for labels, kind in ((LABELS, "multi_label_classification"), (("yes",), None), (("grade",), "regression")):
        folder = make_encoder("bert", "ForSequenceClassification", labels, problem_type=kind)
        logits = naive(folder, request, transformers.AutoModelForSequenceClassification).logits[0]
        wanted = logits if kind == "regression" else logits.sigmoid()
        scores = load(folder).encode([request])[0].encoding.scores
        assert scores == pytest.approx(dict(zip(labels, wanted.tolist(), strict=True)), abs=1e-4)


def test_a_model_does_its_own_task_only(make_encoder: MakeEncoder) -> None:
    engine = load(make_encoder("bert", "ForTokenClassification"))
    with pytest.raises(RequestError, match=r"does not embed.*allowed: tag"):
        engine.submit(EncodeRequest("a", "it rained", "embed"))
    with pytest.raises(RequestError, match="not in a pair"):
        engine.submit(EncodeRequest("a", "it rained", "tag", pair="paris"))
    with pytest.raises(RequestError, match="empty"):
        engine.submit(EncodeRequest("a", "", "tag"))


def test_a_full_queue_refuses_and_a_name_is_used_once(make_encoder: MakeEncoder) -> None:
    engine = load(make_encoder("bert"), max_queued=2)
    engine.submit(EncodeRequest("a", "it rained", "embed"))
    with pytest.raises(RequestError, match="in flight"):
        engine.submit(EncodeRequest("a", "paris", "embed"))
    engine.submit(EncodeRequest("b", "it rained", "embed"))
    with pytest.raises(OverloadedError, match="2 waiting"):
        engine.submit(EncodeRequest("c", "it rained", "embed"))
    with pytest.raises(EngineError, match="in flight"):
        engine.encode([EncodeRequest("d", "it rained", "embed")])
    assert [event.request_id for event in engine.step()] == ["a", "b"]


def test_output_that_is_no_number_ends_its_own_request_only(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = copy(make_encoder("bert"), tmp_path)
    poisoned = load(folder).text.encode_input("paris").token_ids[1]
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][poisoned] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    healthy = load(make_encoder("bert"))
    good, bad = EncodeRequest("good", "it rained", "embed"), EncodeRequest("bad", "paris", "embed")
    events = load(folder).encode([good, bad])
    assert events[0].encoding.vector == pytest.approx(healthy.encode([good])[0].encoding.vector, abs=1e-4)
    assert events[1].finish_reason == "error"
    assert events[1].encoding is None
    assert "not finite" in str(events[1].error)


def test_files_of_sentence_transformers_say_how_to_pool(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = copy(make_encoder("bert"), tmp_path)
    (folder / "1_Pooling").mkdir()
    settings = folder / "1_Pooling/config.json"
    settings.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert load(folder).pooling == "cls"
    settings.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ArtifactError, match=r"pooling_mode_max_tokens.*mean or cls"):
        load(folder)
    settings.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ArtifactError, match="Dense"):
        load(folder)


def test_a_folder_whose_weights_are_not_all_there_is_refused(make_encoder: MakeEncoder, tmp_path: Path) -> None:
    folder = copy(make_encoder("bert", "ForSequenceClassification"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptArtifactError, match=r"hold no classifier\.weight"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors"):
        load(folder)


def test_a_masked_language_model_embeds_without_a_pooler(make_encoder: MakeEncoder) -> None:
    engine = load(make_encoder("bert", "ForMaskedLM"))
    assert engine.task == "embed"
    assert len(engine.encode([EncodeRequest("a", "it rained", "embed")])[0].encoding.vector) == 32


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
