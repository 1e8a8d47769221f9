import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from actors.text import Text
from configs.errors import ContractError
from configs.schema.corpus import SourceConfig, TokenizerConfig
from pipelines.corpus import words
from pipelines.corpus.encode import Encoder, agreeing_encoder, fastest_encoder, first_difference
from pipelines.corpus.tokenizer import SPECIAL_TOKENS, UNKNOWN, save_tokenizer, train_tokenizer
from pipelines.stage import StageContext
from pipelines.stages.tokenizer import TokenizerStage

OTHERS = ("wordpiece", "unigram", "word")
MESSAGES = [{"role": "user", "content": "What is <|end|> in json?"}, {"role": "assistant", "content": "a mark"}]


@pytest.fixture(scope="module")
def source(source_folder: Path) -> SourceConfig:
    return SourceConfig(path=str(source_folder / "json"))


@pytest.fixture(scope="module")
def make(
    source: SourceConfig, context_at: Callable[[Path], StageContext], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a trained tokenizer of 700 entries; made once."""
    made: dict[str, Path] = {}

    def folder(algorithm: str) -> Path:
        if algorithm not in made:
            context = context_at(tmp_path_factory.mktemp("kinds") / algorithm)
            TokenizerStage().run(TokenizerConfig(source=source, algorithm=algorithm, vocab_size=700), {}, context)
            made[algorithm] = context.out
        return made[algorithm]

    return folder


@pytest.fixture(scope="module", params=OTHERS)
def folder(request: pytest.FixtureRequest, make: Callable[[str], Path]) -> Path:
    return make(request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder, "words")


def test_it_has_the_special_tokens_and_opens_in_transformers(folder: Path) -> None:
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened.convert_tokens_to_ids([*SPECIAL_TOKENS, UNKNOWN]) == [0, 1, 2, 3, 4, 5]
    assert (opened.eos_token, opened.unk_token) == ("<|endoftext|>", UNKNOWN)
    assert len(opened) <= 700
    text = Text.load(folder)
    ids = opened.apply_chat_template(MESSAGES[1:], add_generation_prompt=True, return_dict=False)
    assert text.render_chat(MESSAGES[1:]) == ids


def test_known_text_comes_back_to_the_last_space(folder: Path, source: SourceConfig) -> None:
    """Of words known whole, for the tokenizer that has no smaller pieces."""
    text = Text.load(folder)
    samples = ["  def f(x):\n\t# a  b ,c ## ### ##\n\n    return  x ", "the object", " "]
    for sample in samples:
        ids = text.encode(sample)
        if 5 not in ids:
            assert text.decode(ids) == sample
    assert 5 not in text.encode("    return the object\n")
    if "WordLevel" not in (folder / "tokenizer.json").read_text():
        encoder = Path(source.path, "encoder.py").read_text()
        assert text.decode(text.encode(encoder)) == encoder


def test_streamed_text_equals_text_decoded_at_once(folder: Path) -> None:
    text = Text.load(folder)
    ids = [*text.encode("def encode(self, o):\n  ## '漢字' # <|end|>\n"), 4, *text.encode(" the object"), 0]
    stream = text.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == text.decode(ids)


def test_no_text_becomes_a_special_token(folder: Path) -> None:
    text = Text.load(folder)
    encoder = Encoder.load(folder, "tokenizers")
    for token in (*SPECIAL_TOKENS, UNKNOWN):
        for sample in (token, f"a {token}{token} b", f"\n{token}"):
            assert set(text.encode(sample)).isdisjoint({0, 1, 2, 3, 4})
            assert encoder.encode(sample).tolist() == text.encode(sample)
    assert [i for i in text.render_chat(MESSAGES) if i < 5] == [2, 4, 3, 4, 3]


@given(
    text=st.text(st.sampled_from(" \n\t.,#'_(def é\u0301\u00a0\u2028漢Ⅷ٣x²") | st.characters(exclude_categories=["Cs"]))
)
@settings(max_examples=300, deadline=None)
def test_words_that_are_remembered_have_the_ids_that_tokenizers_gives(encoder: Encoder, text: str) -> None:
    assert encoder.encode(text).tolist() == encoder.encode_exactly(text).tolist()


def test_every_character_splits_words_as_it_does_in_tokenizers(encoder: Encoder) -> None:
    for first in range(0, 0x3000, 64):
        for text in ("".join(f"a{chr(c)}b 1{chr(c)} {chr(c)}\n{chr(c)}{chr(c)}" for c in range(first, first + 64)),):
            assert encoder.agrees(text), hex(first)


def test_a_long_text_has_the_same_ids_also_once_the_words_are_forgotten(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_KEPT", 50)
    text = Path(words.__file__).read_text() * 2
    assert encoder.agrees(text)
    assert encoder.agrees(text[::-1])


def test_a_tokenizer_that_reads_text_in_another_way_is_not_encoded_by_the_word(folder: Path, tmp_path: Path) -> None:
    for part, value in (("normalizer", {"type": "Lowercase"}), ("pre_tokenizer", {"type": "WhitespaceSplit"})):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        description = json.loads((folder / "tokenizer.json").read_bytes())
        (tmp_path / "tokenizer.json").write_text(json.dumps({**description, part: value}))
        encoder, reason = fastest_encoder(tmp_path)
        assert encoder.backend == "tokenizers"
        assert "gigatoken" in reason


def test_a_document_is_encoded_by_the_word_and_unknown_characters_are_counted(folder: Path) -> None:
    encoder, _ = fastest_encoder(folder)
    assert encoder.backend == "words"
    assert first_difference(encoder, ["a b"]) is None
    assert 5 in encoder.encode("漢字")
    report = json.loads((folder / "report.json").read_bytes())
    assert report["vocab_size"] <= 700
    assert 0 <= report["unknown_rate"] < 0.6
    assert report["by_source"]["source"]["fertility"] == report["fertility"] > 1
    assert report["special_tokens_from_text"] == []


def test_a_token_of_the_word_level_kind_is_a_whole_word(make: Callable[[str], Path]) -> None:
    text = Text.load(make("word"))
    assert len(text.encode(" return the object")) == 3
    assert text.encode(" floccinaucinihilipilification") == [5]


def test_words_between_white_space_stay_whole_and_special_tokens_names_do_not(tmp_path: Path) -> None:
    line = " = <unk> 's 10 @,@ 000 mark = "
    save_tokenizer(train_tokenizer([line] * 3, 400, "white_space"), tmp_path)
    text = Text.load(tmp_path)
    ids = agreeing_encoder(tmp_path, [line]).encode(line).tolist()
    assert ids == text.encode(line)
    assert [text.decode([i]) for i in ids] == [" =", " <unk>", " 's", " 10", " @,@", " 000", " mark", " =", " "]
    assert text.encode(" other") == [5]
    for token in (*SPECIAL_TOKENS, UNKNOWN):
        for sample in (token, f" {token}{token} ", f"a{token}\n{token}b"):
            assert set(text.encode(sample)).isdisjoint({0, 1, 2, 3, 4})


@pytest.mark.parametrize("algorithm", [*OTHERS, "white_space"])
def test_another_process_learns_the_same_bytes(algorithm: str, source: SourceConfig, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipelines.corpus.tokenizer import save_tokenizer, train_tokenizer
texts = [p.read_text() for p in sorted(Path(sys.argv[1]).rglob("*.py"))]
save_tokenizer(train_tokenizer([*texts, "naïve façade"], 700, sys.argv[2]), Path(sys.argv[3]))
"""
    made = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", code, source.path, algorithm, str(tmp_path / name)]
        assert subprocess.run(command, timeout=60).returncode == 0
        made.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert made[0] == made[1]


def test_an_existing_tokenizer_is_taken_over_as_it_is(
    make: Callable[[str], Path], source: SourceConfig, make_context: Callable[[str], StageContext]
) -> None:
    folder = make("unigram")
    config = TokenizerConfig(source=source, existing=str(folder), measured_on={"again": source})
    assert set(TokenizerStage().sources(config)) == {"source", "existing", "measured_on.again"}
    context = make_context("taken")
    summary = TokenizerStage().run(config, {}, context)
    for name in ("tokenizer.json", "chat_template.jinja", "contract.json", "tokenizer_config.json"):
        assert (context.out / name).read_bytes() == (folder / name).read_bytes()
    assert summary["algorithm"] == "existing"
    assert summary["by_source"]["again"] == summary["by_source"]["source"]


def test_an_existing_tokenizer_without_an_end_of_text_needs_one_named(
    tmp_path: Path, source: SourceConfig, make_context: Callable[[str], StageContext]
) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "the": 2, "a": 3}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[SEP]", "[UNK]"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"unk_token": "[UNK]"}')
    with pytest.raises(ContractError, match="set end_of_text"):
        TokenizerStage().run(TokenizerConfig(source=source, existing=str(folder)), {}, make_context("refused"))
    context = make_context("named")
    config = TokenizerConfig(source=source, existing=str(folder), end_of_text="[SEP]")
    assert TokenizerStage().run(config, {}, context)["unknown_rate"] > 0.5
    encoder = Encoder.load(context.out, "tokenizers")
    assert encoder.end_of_text_id == 1
    assert encoder.encode("the a " * 10).tolist() == [2, 3] * 10
    with pytest.raises(ContractError, match=r"no tokenizer\.json"):
        TokenizerStage().sources(TokenizerConfig(source=source, existing=str(tmp_path)))


def test_an_existing_tokenizer_is_not_trained(source: SourceConfig) -> None:
    with pytest.raises(ValueError, match="leave out vocab_size"):
        TokenizerConfig(source=source, existing="x", vocab_size=1000)
    with pytest.raises(ValueError, match="end_of_text is for an existing"):
        TokenizerConfig(source=source, end_of_text="x")
