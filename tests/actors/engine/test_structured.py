"""Texts held to a structure: always of that structure, whatever the model, the tokenizer and the temperature."""

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actors.engine.engine import Engine
from actors.engine.request import Completion, Request
from actors.engine.seq2seq import Seq2SeqEngine
from actors.engine.structured import Structures, masks
from actors.text import Text
from configs.errors import RequestError
from configs.schema.generation import Sampling, Structure

CONTEXT = 1024


@pytest.fixture(scope="module")
def engine(make_model) -> Engine:
    return Engine.load(
        make_model(max_position_embeddings=CONTEXT), max_sequences=32, max_queued=1000, precision="fp32", device="cpu"
    )


def answers(engine: Engine, structures: list[Structure], **fields: Any) -> list[Completion]:
    """One text a structure, each with a seed and a prompt of its own."""
    asked = [
        Request(
            str(n),
            (5 + n % 300, 7),
            Sampling.model_validate({"max_new_tokens": 900, "seed": n, "structure": structure, **fields}),
        )
        for n, structure in enumerate(structures)
    ]
    return engine.generate(asked)


class Schemas:
    """Random JSON schemas with values of bounded length, so that any text under them ends."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def any(self, depth: int = 2) -> dict[str, Any]:
        kinds: list[Callable[[int], dict[str, Any]]] = [
            self.string, self.integer, self.number, self.literal, self.pattern,
        ]  # fmt: skip
        if depth:
            kinds += [self.object, self.object, self.array, self.either, self.pair]
        return self._draw.choice(kinds)(depth - 1)

    def string(self, _: int) -> dict[str, Any]:
        least = self._draw.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self._draw.randrange(6)}

    def pattern(self, _: int) -> dict[str, Any]:
        formats = [{"format": "date"}, {"format": "uuid"}, {"format": "ipv4"}]
        patterns = [{"pattern": p} for p in ("^[A-Z]{2,4}$", "^\\d{3}-\\d{2}$", "^(yes|no)$", "^#[0-9a-f]{6}$")]
        return {"type": "string", **self._draw.choice(formats + patterns)}

    def integer(self, _: int) -> dict[str, Any]:
        low = self._draw.randrange(-500, 500)
        return {"type": "integer", "minimum": low, "maximum": low + self._draw.randrange(10_000)}

    def number(self, _: int) -> dict[str, Any]:
        if self._draw.random() < 0.5:
            return {"type": "number", "exclusiveMinimum": 0, "maximum": self._draw.randrange(1, 50)}
        return {"type": self._draw.choice(["boolean", "null"])}

    def literal(self, _: int) -> dict[str, Any]:
        values = ["red", "grün", 'a "quoted" \\ text', "line\nbreak", 3, -1.5, None, True, [1, "two"], {"x": None}]
        if self._draw.random() < 0.3:
            return {"const": self._draw.choice(values)}
        return {"enum": self._draw.sample(values, self._draw.randrange(1, 6))}

    def object(self, depth: int) -> dict[str, Any]:
        names = self._draw.sample(
            ["id", "name", "Straße", "a b", "x-y", "list", "🦉", 'q"'], self._draw.randrange(1, 5)
        )
        required = self._draw.sample(names, self._draw.randrange(len(names) + 1))
        properties = {name: self.any(depth) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def array(self, depth: int) -> dict[str, Any]:
        least = self._draw.randrange(3)
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": least,
            "maxItems": least + self._draw.randrange(3),
        }

    def pair(self, depth: int) -> dict[str, Any]:
        return {"type": "array", "prefixItems": [self.any(depth), self.any(depth)], "items": False, "minItems": 2}

    def either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any(depth), self.any(depth)]}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_text_under_a_json_schema_is_always_valid(engine: Engine, temperature: float) -> None:
    schemas = [Schemas(1000 * int(temperature) + n).any() for n in range(100)]
    structures = [Structure(json_schema=json.dumps(schema)) for schema in schemas]
    for schema, done in zip(schemas, answers(engine, structures, temperature=temperature), strict=True):
        if done.finish_reason == "length":
            # A number of endless digits, which greedy decoding may fall into.
            assert len(done.token_ids) == 900
            assert temperature == 0
            continue
        assert done.finish_reason == "stop", done.error
        jsonschema.validate(json.loads(done.text), schema)


def test_a_schema_with_references_is_followed(engine: Engine) -> None:
    leaf = {"type": "integer", "minimum": 0, "maximum": 9}
    tree = {"anyOf": [leaf, {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}]}
    schema = {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    for done in answers(engine, [Structure(json_schema=json.dumps(schema))] * 20):
        assert done.finish_reason == "stop"
        jsonschema.validate(json.loads(done.text), schema)


@pytest.mark.parametrize("regex", ["[0-9]{3}-[a-f]{2}", "(yes|no)", "a{2,5}b?", "[äöü]{4}", "x", "", "🦉{2}"])
def test_a_text_under_a_regex_matches_it(engine: Engine, regex: str) -> None:
    for done in answers(engine, [Structure(regex=regex)] * 8, temperature=2):
        assert done.finish_reason == "stop"
        assert re.fullmatch(regex, done.text)


def test_a_text_under_a_grammar_is_a_sentence_of_it(engine: Engine) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER){0,3}\nNUMBER: /[1-9][0-9]{0,2}/'
    for done in answers(engine, [Structure(grammar=grammar)] * 20, temperature=2):
        assert done.finish_reason == "stop"
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){0,3}", done.text)


def test_a_choice_is_one_of_them(engine: Engine) -> None:
    choices = ("red", "red and green", 'a "quoted" \\ text', "line\nbreak\ttab", "🦉", "{}", "/", "|", "\x01")
    texts = {done.text for done in answers(engine, [Structure(choice=choices)] * 64, temperature=10)}
    assert texts <= set(choices)
    assert len(texts) > 3


def test_a_text_that_is_cut_off_says_so(engine: Engine) -> None:
    (done,) = answers(engine, [Structure(regex="a{50}")], max_new_tokens=5)
    assert done.finish_reason == "length"
    assert set(done.text) == {"a"}


def test_structures_and_other_requests_share_steps_without_a_trace(engine: Engine) -> None:
    structures = [None, Structure(regex="[a-z]{9}"), None, Structure(json_schema='{"type": "boolean"}')] * 4
    together = answers(engine, structures, max_new_tokens=20, logprobs=1)
    for n, done in enumerate(together):
        sampling = Sampling(max_new_tokens=20, seed=n, structure=structures[n], logprobs=1)
        (alone,) = engine.generate([Request(str(n), (5 + n % 300, 7), sampling)])
        assert (done.token_ids, done.text, done.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(json_schema="{"), "json_schema"),
        (Structure(json_schema='{"type": "spaceship"}'), "Invalid type: spaceship"),
        (Structure(json_schema='{"type": "integer", "minimum": 5, "maximum": 3}'), "Unsatisfiable"),
        (Structure(json_schema='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Structure(json_schema="false"), "Unsatisfiable"),
        (Structure(json_schema="3"), "an object"),
        (Structure(json_schema='{"not": {}, "x-guidance": {"lenient": true}}'), "not"),
        (Structure(regex="("), "regex"),
        (Structure(regex="a(?=b)"), "regex"),
        (Structure(grammar='start: "a" b'), "unknown name"),
        (Structure(grammar='first: "a"'), "no start rule"),
        (Structure(grammar='start: start "a"'), "grammar"),
        (Structure(grammar="nonsense ((("), "grammar"),
    ],
)
def test_what_is_no_structure_or_cannot_be_met_is_refused(engine: Engine, structure: Structure, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        answers(engine, [structure])
    assert caught.value.param == "structure"
    assert len(str(caught.value)) < 600
    assert not engine.has_work


def test_exactly_one_structure_can_be_asked_for() -> None:
    for fields in ({}, {"regex": "a", "grammar": 'start: "a"'}, {"choice": ()}):
        with pytest.raises(ValueError, match=r"structure|choice|exactly one"):
            Structure.model_validate(fields)
    with pytest.raises(ValueError, match="min_tokens"):
        Sampling(structure=Structure(regex="a"), min_tokens=1)


CORPUS = [Path(json.__file__).read_text(encoding="utf-8")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=list('{}[]":,0123456789abcdefghijklmnopqrstuvwxyz-+.eE\\ '),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2 has it: a mark for spaces, one before the text, and bytes for what has no token."""
    alphabet = sorted(set(CORPUS[0]) - {" ", "\n"} | {"▁"})
    vocab = {token: n for n, token in enumerate(["<unk>", "</s>", *BYTES, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return tokenizer


def engine_with(tokenizer: Tokenizer, folder: Path, *, eos: str | None = "</s>") -> Engine:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size() + 13, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip
    return Engine.load(folder, precision="fp32", device="cpu", max_queued=100)


@pytest.mark.parametrize("make", [unigram, sentencepiece_bpe], ids=["unigram", "bpe"])
def test_sentencepiece_like_tokenizers_are_held_to_structures(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    engine = engine_with(make(), tmp_path)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "n": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    structures = [Structure(json_schema=json.dumps(schema)), Structure(regex="[a-z ]{3,9}")] * 10
    for structure, done in zip(structures, answers(engine, structures, max_new_tokens=400), strict=True):
        assert done.finish_reason == "stop", done.error
        if structure.regex:
            assert re.fullmatch(structure.regex, done.text)
        else:
            jsonschema.validate(json.loads(done.text), schema)
    with pytest.raises(RequestError, match="no token"):
        answers(engine, [Structure(regex=" +x")])


def test_an_encoder_decoder_is_held_to_a_structure(make_seq2seq: Callable[[str], Path]) -> None:
    engine = Seq2SeqEngine.load(make_seq2seq("t5"), precision="fp32", device="cpu")
    sampling = Sampling(max_new_tokens=40, structure=Structure(regex="[a-f]{6}"), logprobs=1)
    requests = [Request(str(n), (5 + n, 7, 9), sampling.model_copy(update={"seed": n})) for n in range(6)]
    for done in engine.generate(requests):
        assert done.finish_reason == "stop"
        assert re.fullmatch("[a-f]{6}", done.text)
        assert len(done.logprobs) == len(done.token_ids)


def test_a_model_without_an_end_token_ends_where_nothing_can_follow(tmp_path: Path) -> None:
    engine = engine_with(sentencepiece_bpe(), tmp_path, eos=None)
    for done in answers(engine, [Structure(regex="[a-c]{4}")] * 5):
        assert (done.finish_reason, len(done.text)) == ("stop", 4)


def test_a_tokenizer_whose_tokens_depend_on_their_neighbours_is_refused(tmp_path: Path) -> None:
    engine = engine_with(wordpiece(), tmp_path)
    with pytest.raises(RequestError, match="tokenizer cannot be held to a structure") as caught:
        answers(engine, [Structure(regex="a")])
    assert caught.value.param == "structure"


def test_the_time_a_mask_takes_is_shown(tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Text.load(tokenizer_folder)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}},
    }
    structures = Structures(text)
    matcher = structures.matcher(Structure(json_schema=json.dumps(schema)))
    assert matcher is not None
    ids = text.encode('{"a": "some text that goes on for a while", "b": [1, 22, 333, 4444]}')
    seconds = []
    for token in ids:
        began = time.perf_counter()
        masks([matcher])
        seconds.append(time.perf_counter() - began)
        matcher.accept(token)
    with capsys.disabled():
        print(
            f"\nmask: median {sorted(seconds)[len(ids) // 2] * 1e6:.0f} us, worst {max(seconds) * 1e6:.0f} us", end=" "
        )
    assert matcher.complete
