import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.store.artifacts import Artifact
from actors.text import Text
from configs.errors import DataError
from configs.schema.corpus import SourceConfig, TokenizerConfig
from pipelines.corpus.tokenizer import SPECIAL_TOKENS
from pipelines.stage import StageContext
from pipelines.stages.tokenizer import TokenizerStage

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is json? "},
    {"role": "assistant", "content": "A format."},
]


def test_training_again_gives_the_same_files(
    source_folder: Path, tokenizer: Artifact, make_context: Callable[[str], StageContext]
) -> None:
    context = make_context("again")
    config = TokenizerConfig(source=SourceConfig(path=str(source_folder)), vocab_size=600)
    TokenizerStage().run(config, {}, context)
    assert sorted(p.name for p in context.out.iterdir()) == sorted(r.path for r in tokenizer.manifest.files)
    for record in tokenizer.manifest.files:
        assert (context.out / record.path).read_bytes() == (tokenizer.path / record.path).read_bytes(), record.path


def test_transformers_opens_it_with_special_tokens_and_chat_template(tokenizer: Artifact) -> None:
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer.path)
    assert len(opened) == 600
    assert opened.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (opened.eos_token, opened.pad_token, opened.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)
    assert opened.decode(opened("a  b , c\n")["input_ids"]) == "a  b , c\n"
    rendered = opened.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|system|>Be brief.<|end|><|user|>  What is json? <|end|><|assistant|>A format.<|end|><|assistant|>"
    )


def test_the_contract_holds_and_chat_is_rendered_to_the_same_ids(tokenizer: Artifact) -> None:
    from transformers import AutoTokenizer

    text = Text.load(tokenizer.path)
    opened = AutoTokenizer.from_pretrained(tokenizer.path)
    ids = opened.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert text.render_chat(MESSAGES) == ids
    assert text.contract is not None


def test_merges_compress_text(tokenizer: Artifact) -> None:
    report = json.loads((tokenizer.path / "report.json").read_bytes())
    assert report["vocab_size"] == 600
    assert report["bytes_per_token"] > 1.8


def test_a_source_without_text_is_an_error(tmp_path: Path, make_context: Callable[[str], StageContext]) -> None:
    (tmp_path / "a.py").write_text("")
    with pytest.raises(DataError, match="no text"):
        TokenizerStage().run(
            TokenizerConfig(source=SourceConfig(path=str(tmp_path / "a.py"))), {}, make_context("empty")
        )
