"""Text to token ids, fast, with Hugging Face `tokenizers` as the truth.

gigatoken encodes byte-level BPE a hundred times faster than one `tokenizers` thread (130 against 1.4 MB/s on Python
source, one core), `pipelines.corpus.words` WordPiece, Unigram and word-level tokenizers as they are trained here two to
three times as fast. They are used as long as the ids are the same: on a probe set and a sample (`first_difference`) and
on one document in a thousand on the way (`Encoder.agrees`). All else is encoded by `tokenizers`, one thread a process.

The name of a special token in a document is encoded as the characters it is made of. `tokenizers` is told so;
gigatoken, which always recognises such names, gets the tokenizer without its list of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import gigatoken
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from configs.errors import ContractError
from pipelines.corpus.words import WordEncoder, splits_whole_words

Backend = Literal["gigatoken", "words", "tokenizers"]
Ids = npt.NDArray[np.uint32]

_TOKENIZER = "tokenizer.json"
CHECKED_FRACTION = 0.001
"""Share of documents, by hash, that are encoded a second time by `tokenizers`."""

PROBES = (
    "",
    " ",
    "\n",
    "\r\n\r\n  \t x",
    "def f(a, *, b=1):\n    return a_b  # it's we'll THEY'RE\n",
    "a" * 300 + "  " * 40 + "\n" * 5,
    "1234567890 3.14e-10 0x7fff_ffff 1,000",
    "<|endoftext|><|system|>a<|user|> <|assistant|>\n<|end|><|end|",
    "naïve façade — “quotes” … ½ ﬁ İ ß ẞ Ǆ",
    "日本語 한국어 العربية עברית हिन्दी ไทย",
    "🤖👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u200d\ufeff\u00a0\u2028\u2029\u0085\x1c\x00\x7f",
    "\U0001d518\U0001f1eb\U0001f1f7\U000e0067 \ue000 \ufffd\uffff",
    "Ⅷ ٣٤٥ ²³ ⑩ x̧̰ \u2019s \u2019\u017f 'S '\u017f 'LL 'Kk \u212a",
)
"""Texts that splitting rules differ on: runs of white space, contractions, digits, marks, controls, special tokens."""


class Encoder:
    """Encodes documents with one backend; holds a cache of words, so keep one instance a process."""

    def __init__(
        self, backend: Backend, reference: Tokenizer, fast: Callable[[bytes], Ids] | None, end_of_text_id: int
    ) -> None:
        self.backend = backend
        self._reference = reference
        self._fast = fast
        self.vocab_size: int = reference.get_vocab_size()
        self.end_of_text_id = end_of_text_id

    @classmethod
    def load(cls, folder: Path, backend: Backend) -> Encoder:
        """Opens the tokenizer in `folder`.

        Raises:
            ContractError: there is no usable tokenizer.json, or no end-of-text token.
        """
        path = folder / _TOKENIZER
        try:
            reference = Tokenizer.from_file(str(path))
            end_of_text = json.loads((folder / "tokenizer_config.json").read_bytes()).get("eos_token")
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise _unusable(path, str(error)) from error
        if isinstance(end_of_text, dict):  # files of older versions
            end_of_text = end_of_text.get("content")
        end_of_text_id = reference.token_to_id(end_of_text) if isinstance(end_of_text, str) else None
        if end_of_text_id is None:
            raise _unusable(path, f"eos_token {end_of_text!r}")
        reference.encode_special_tokens = True
        reference.no_truncation()
        reference.no_padding()
        fast: Callable[[bytes], Ids] | None = None
        if backend == "gigatoken":
            description = _describe(folder)
            ordinary = [token for token in description["added_tokens"] if not token["special"]]
            fast = gigatoken.Tokenizer.from_json(json.dumps({**description, "added_tokens": ordinary})).encode
        elif backend == "words":
            fast = WordEncoder(reference).encode
        return cls(backend, reference, fast, end_of_text_id)

    def encode(self, text: str | bytes) -> Ids:
        """The ids of `text` (UTF-8 if bytes); no special token is added or recognised. One thread."""
        if self._fast is None:
            return self.encode_exactly(text if isinstance(text, str) else text.decode())
        return self._fast(text.encode() if isinstance(text, str) else text)

    def encode_exactly(self, text: str) -> Ids:
        """The ids that `tokenizers` gives, whatever the backend."""
        # The fast form keeps no offsets: 5.4 MB/s instead of 3.6 for WordPiece.
        (encoding,) = self._reference.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def agrees(self, text: str) -> bool:
        """Whether the backend's ids of `text` are the ones `tokenizers` gives."""
        return np.array_equal(self.encode(text), self.encode_exactly(text))


def _describe(folder: Path) -> dict[str, Any]:
    """What the tokenizer.json in `folder` says, without truncation and padding, which no document gets."""
    try:
        return {**json.loads((folder / _TOKENIZER).read_bytes()), "truncation": None, "padding": None}
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(folder / _TOKENIZER, str(error)) from error


def _unusable(path: Path, received: str) -> ContractError:
    return ContractError(
        f"{path} is not a tokenizer that documents can be encoded with",
        received=received,
        allowed="a tokenizer.json and a tokenizer_config.json whose eos_token is in the vocabulary",
        next_step="use an artifact of the tokenizer stage",
    )


@lru_cache(maxsize=1)
def process_encoder(folder: Path, backend: Backend) -> Encoder:
    """The one encoder that this process keeps."""
    return Encoder.load(folder, backend)


def fastest_encoder(folder: Path) -> tuple[Encoder, str]:
    """An encoder with the fastest backend that knows such tokenizers as the one in `folder`; if that is `tokenizers`,
    why.

    Its ids may be used once `first_difference` has found none.

    Raises:
        ContractError: there is no usable tokenizer.json, or no end-of-text token.
    """
    try:
        return Encoder.load(folder, "words" if splits_whole_words(_describe(folder)) else "gigatoken"), ""
    except RuntimeError as error:  # what gigatoken raises for a model or pre-tokenizer it does not know
        reason = f"gigatoken cannot load this tokenizer: {str(error).splitlines()[0]}"
        return Encoder.load(folder, "tokenizers"), reason


def agreeing_encoder(folder: Path, texts: Iterable[str] = ()) -> Encoder:
    """The fastest encoder whose ids are those of `tokenizers` on `PROBES` and `texts`; raises as `fastest_encoder`."""
    encoder, _ = fastest_encoder(folder)
    return encoder if first_difference(encoder, texts) is None else Encoder.load(folder, "tokenizers")


def first_difference(encoder: Encoder, texts: Iterable[str]) -> str | None:
    """The first of `PROBES` and `texts` that the encoder's backend and `tokenizers` encode differently, shortened."""
    return next((repr(text[:60]) for text in (*PROBES, *texts) if not encoder.agrees(text)), None)
