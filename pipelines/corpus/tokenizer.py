"""Tokenizers with special tokens and a chat template: byte-level BPE, WordPiece, Unigram, and two of whole words.

The files are what `transformers.AutoTokenizer.from_pretrained` opens. Training is a function of the texts, their order,
the algorithm and the vocabulary size: the same input gives the same bytes.

Byte-level BPE gives back every text. The others know the characters (or words) of the texts they learned from,
give `UNKNOWN` for others, and give back every text that they know all of: a token holds the space before it, and runs
of white space are tokens. A name of a special token in a text is split at its punctuation, so it never becomes one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Algorithm = Literal["bpe", "wordpiece", "unigram", "word", "white_space"]

END_OF_TEXT: Final = "<|endoftext|>"
END_OF_TURN: Final = "<|end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)
"""In the order of their ids, from 0."""
END_OF_TEXT_ID: Final = 0
UNKNOWN: Final = "<|unknown|>"
"""What WordPiece, Unigram and whole words give for what they do not know; its id follows the special tokens'."""

MASK: Final = "<|mask|>"
"""Stands for hidden text; further ones, where spans have masks of their own, are `<|mask_1|>` and so on."""

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('role must be system, user or assistant, got ' ~ message['role']) -}}"
    "{%- endif -%}"
    f"{{{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '{END_OF_TURN}' -}}}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The split of tiktoken's cl100k encoding. On Python source at 4,096 entries it gives 3.30 bytes a token, against 3.19
for GPT-2's and 3.25 for Qwen 2's, and gigatoken has a fast path for each of them."""

WHOLE_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]|\n|[^\S\n]+(?!\S)|\s"
"""Words with the space before them, digits by threes, every other mark and line feed alone, runs of other space."""

WHITE_SPACE: Final = r" ?<\|| ?(?:(?!<\|)\S)+|\s"
"""Whatever stands between white space, with the space before it; other white space alone. `<|`, with which the names of
special tokens begin, stands alone too."""

_CONTINUED: Final = "##"
_MAX_WORD_CHARS = 1000
"""Longer words become unknown in WordPiece, whose search is quadratic in them."""
_SCORE_DIGITS = 3
"""Decimals of a Unigram score that are kept. `tokenizers` adds up probabilities in an order that changes with every
process; scores of two trainings were seen to differ by 4e-11."""


def train_tokenizer(texts: Sequence[str], vocab_size: int, algorithm: Algorithm = "bpe", masks: int = 0) -> Tokenizer:
    """Learns a vocabulary from `texts`; special tokens have ids 0 to 4, then comes what the algorithm begins with.

    Fewer than `vocab_size` entries come out when the texts hold no more pieces worth one. The last ids are those of
    `masks` mask tokens, which come on top.
    """
    tokenizer = _TRAINERS[algorithm](texts, vocab_size)
    tokenizer.add_special_tokens([MASK, *(f"<|mask_{number}|>" for number in range(1, masks))][:masks])
    return tokenizer


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """After the special tokens come the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """The most frequent characters are entries both as the beginning and as the continuation of a word; at most half
    of the vocabulary, so that a text in many scripts leaves room for pieces. Merges are chosen as in BPE."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    frequent = sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size // 4]
    first = [*SPECIAL_TOKENS, UNKNOWN]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # Named beforehand, continuations get their ids here and not in the order of a hash map.
        special_tokens=[*first, *sorted(frequent), *(_CONTINUED + c for c in sorted(frequent))],
        initial_alphabet=frequent,
        limit_alphabet=len(frequent),
        continuing_subword_prefix=_CONTINUED,
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WHOLE_WORDS), "isolated")
    learner.train_from_iterator(texts, trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    model = models.WordPiece(
        vocabulary,
        unk_token=UNKNOWN,
        max_input_chars_per_word=_MAX_WORD_CHARS,
        continuing_subword_prefix=_CONTINUED,
    )
    # A mark is a word of its own, so `##` at the beginning of a token is never text.
    return _over_whole_words(model, decoders.Sequence([decoders.Replace(Regex("^##"), ""), decoders.Fuse()]))


def _train_unigram(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    first = [*SPECIAL_TOKENS, UNKNOWN]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=first, unk_token=UNKNOWN, show_progress=False
    )
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WHOLE_WORDS), "isolated")
    learner.train_from_iterator(texts, trainer)
    pieces = [(piece, round(score, _SCORE_DIGITS)) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]
    learned = sorted(pieces[len(first) :], key=lambda piece: (-piece[1], piece[0]))
    model = models.Unigram([*pieces[: len(first)], *learned], unk_id=len(SPECIAL_TOKENS), byte_fallback=False)
    return _over_whole_words(model, decoders.Fuse())


def _train_words(texts: Sequence[str], vocab_size: int, pattern: str = WHOLE_WORDS) -> Tokenizer:
    """The most frequent words; one that occurs once is none."""
    tokenizer = _over_whole_words(models.WordLevel(unk_token=UNKNOWN), decoders.Fuse(), pattern)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[*SPECIAL_TOKENS, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _over_whole_words(model: models.Model, decoder: decoders.Decoder, pattern: str = WHOLE_WORDS) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    return tokenizer


_TRAINERS: Final[dict[Algorithm, Callable[[Sequence[str], int], Tokenizer]]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
    "word": _train_words,
    "white_space": partial(_train_words, pattern=WHITE_SPACE),
}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja into `folder`."""
    named = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    if tokenizer.token_to_id(UNKNOWN) is not None:
        named["unk_token"] = UNKNOWN
    if tokenizer.token_to_id(MASK) is not None:
        named["mask_token"] = MASK
    config = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        "special_tokens_map.json": json.dumps(named, indent=2, sort_keys=True) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
