"""Sources of text, tokenizers, token corpora and instruction pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.schema.base import Config, Input, placement

MESSAGE_FORMATS = ("jsonl", "parquet", "arrow")
"""Formats whose records can hold a list of messages."""


class FieldsConfig(Config):
    """Which field of a record (a key of JSON, a column of a table) is what."""

    text: str = "text"
    """The document; a field of text."""
    messages: str | None = None
    """The document as a conversation instead: a list of messages, each with `role` and `content`. It is encoded by the
    tokenizer's chat template; filters, duplicates and hashes see the contents, with a blank line between."""
    id: str | None = None
    """What the document is called where it comes from; kept beside its tokens, like the next two."""
    source: str | None = None
    """Where the document comes from."""
    label: str | None = None
    """Its class."""

    @model_validator(mode="after")
    def _text_or_messages(self) -> Self:
        if self.messages is not None and "text" in self.model_fields_set:
            raise ValueError("a document is text or messages: leave out text, or messages")
        return self


class CleaningConfig(Config):
    """What is changed in the text of a document before anything else is done with it."""

    normalize: Literal["auto", "nfc", "none"] = "auto"
    """Unicode normal form; `auto` is NFC except for files that hold program source by their ending, whose bytes are
    their meaning. Files left alone are also kept from `mojibake` and `controls`."""
    mojibake: bool = True
    """Repair text that was decoded with the wrong character set (`ftfy`), where its traces are found and the text does
    not look like program source."""
    controls: bool = True
    """Remove control characters other than tab and line feed, lone carriage returns and byte-order marks; end lines
    with a line feed."""
    html: bool = False
    """Take the visible text out of HTML."""
    lowercase: bool = False
    """Make letters lower case, as data sets like SST-2 are."""
    mask: tuple[Literal["email", "ip", "key"], ...] = ()
    """Kinds of personal or secret data to replace by placeholders."""


class LanguageConfig(Config):
    """Languages of documents, told by their beginning (fastText's lid.176)."""

    keep: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = ()
    """ISO 639 codes; documents in other languages are dropped. Unless given, languages are only counted. `und` stands
    for documents whose language is not certain."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability below which a language is not certain. 0.65 is FineWeb's."""


class FiltersConfig(Config):
    """Which documents are good enough."""

    language: LanguageConfig | None = None
    """Tells languages and counts them in the report; off unless given (`language: {}` only counts)."""
    rules: tuple[Literal["gopher_quality", "gopher_repetition", "c4", "fineweb"], ...] = ()
    """Published sets of rules, applied in this order; a document is dropped for the first it breaks. `c4` also takes
    lines out of documents."""
    min_bytes: Annotated[int, Field(ge=1)] = 1
    """Shorter documents are dropped."""


class SourceConfig(Config):
    """Where raw text comes from, and which documents it holds."""

    path: str = placement(...)
    """A file, folder or glob, local or as a URI (`s3://`, `gs://`, `file://`, `hf://datasets/owner/name`);
    `python:stdlib` is the standard library of the running interpreter, `data:x` is `x` below $GANYMEDE_DATA."""
    include: tuple[str, ...] | None = None
    """Glob patterns on the path relative to `path`; a file must match one. Unset: `*.py` for `python:stdlib`, else
    every file of which no part of the path begins with a dot."""
    exclude: tuple[str, ...] = ("site-packages/*", "*/__pycache__/*")
    """Glob patterns on the path relative to `path`; a file that matches one is left out."""
    format: Literal["auto", "text", "lines", "paragraphs", "jsonl", "csv", "tsv", "parquet", "arrow"] = "auto"
    """`text`: a file is a document; `lines`: a line is; `paragraphs`: blank lines end one. `auto` goes by the file's
    ending (.jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather) and takes all others as `text`. A file that ends in
    .gz or .zst is decompressed first."""
    fields: FieldsConfig = FieldsConfig()
    columns: tuple[str, ...] = ()
    """Names of the columns of CSV and TSV files without a header line."""
    cleaning: CleaningConfig = CleaningConfig()
    filters: FiltersConfig = FiltersConfig()
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of records (broken, bad UTF-8), or of files (cut off, no permission) if that is more, that may be unusable
    before the stage fails."""

    @model_validator(mode="after")
    def _messages_lie_in_records(self) -> Self:
        if self.fields.messages is not None and self.format not in ("auto", *MESSAGE_FORMATS):
            raise ValueError(
                f"format {self.format} has no field of messages; allowed with fields.messages: auto, "
                + ", ".join(MESSAGE_FORMATS)
            )
        if self.fields.messages is not None and "c4" in self.filters.rules:
            raise ValueError("filter c4 takes lines out of a text, not out of fields.messages: leave one of them out")
        return self


class SplitConfig(Config):
    """Which documents are held out, decided by the hash of their content."""

    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of documents (by hash) that no training stage sees."""
    salt: str = "split-1"
    """Mixed into the hash; another salt gives another split."""


class TokenizerConfig(Config):
    """Stage `tokenizer`: trained on the training split, with chat template and special tokens; or an existing one."""

    kind: Literal["tokenizer"] = "tokenizer"
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    algorithm: Literal["bpe", "wordpiece", "unigram", "word", "white_space"] = "bpe"
    """`bpe` works on bytes and knows every text; `word` has a token for each of the most frequent words, and takes
    marks and digits apart; `white_space` does not, for texts that were split into words before, like WikiText's."""
    vocab_size: Annotated[int, Field(ge=261, le=1_000_000)] = 4096
    """Entries in the vocabulary, what the algorithm begins with and the special tokens included. With 261 `bpe` has the
    256 bytes and no merges."""
    masks: Annotated[int, Field(ge=0, le=1000)] = 0
    """Mask tokens beside the vocabulary: one for masked language models and BART, one for each hidden span for T5."""
    sample_bytes: Annotated[int, Field(ge=10_000)] = 8_000_000
    """Text the vocabulary is learned from, sampled by document hash."""
    existing: str | None = placement(None)
    """Folder with the tokenizer.json of a Hugging Face tokenizer, which is used as it is; `source` is then only what it
    is measured on."""
    end_of_text: str | None = None
    """Token of an existing tokenizer that ends each document; its eos_token unless set."""
    measured_on: dict[str, SourceConfig] = Field(default_factory=dict)
    """Further sources, by name, that the report tells the fit on."""

    @model_validator(mode="after")
    def _trained_or_existing(self) -> Self:
        given = sorted(self.model_fields_set & {"algorithm", "vocab_size", "masks", "sample_bytes"})
        if self.existing is not None and given:
            raise ValueError(f"an existing tokenizer is not trained: leave out {', '.join(given)}, or existing")
        if self.existing is None and self.end_of_text is not None:
            raise ValueError("end_of_text is for an existing tokenizer: leave it out, or set existing")
        return self


class NearConfig(Config):
    """Near-duplicates by MinHash with banding: two documents fall together if all rows of any band are equal.

    With the defaults, which are FineWeb's (Penedo et al., 2024), that happens to 77 % of the pairs that share three
    quarters of their n-grams, and to 5 % of those that share half.
    """

    words: Annotated[int, Field(ge=1, le=64)] = 5
    """Words in an n-gram."""
    bands: Annotated[int, Field(ge=1, le=256)] = 14
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    """Hashes in a band; more rows ask for more likeness."""


class DedupConfig(Config):
    """Which documents are dropped because an earlier one says the same. Earlier is by source, then by place in it."""

    exact: bool = True
    """Drop documents with the same text."""
    near: NearConfig | None = None
    """Drop documents that share most of their n-grams; off unless given (`near: {}` for the defaults)."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.exact and self.near is None:
            raise ValueError("dedup finds nothing: set exact or near, or dedup: off")
        return self


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Letters, digits, `.`, `_` and `-`: it becomes part of the names of metrics."""


class EvaluationSetConfig(SourceConfig):
    """An evaluation set that training documents must not hold passages of."""

    texts: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """Fields of a record that are checked, each as an item of its own; `fields.text` is not used."""


class ContaminationConfig(Config):
    """What a training document may not share with an evaluation set."""

    sets: dict[SetName, EvaluationSetConfig] = Field(default_factory=dict)
    """Evaluation sets in files, by name."""
    words: Annotated[int, Field(ge=5, le=64)] = 13
    """Words in a row that make an overlap."""
    shortest_words: Annotated[int, Field(ge=3, le=64)] = 8
    """Items of fewer than `words` words are looked for whole if they have this many; shorter ones are not."""
    action: Literal["drop", "refuse", "keep"] = "drop"
    """Drop overlapping documents of the training split; fail and name one; or keep them, and then no model that learned
    from the corpus is scored on the set they overlap with."""

    @model_validator(mode="after")
    def _shortest_is_shorter(self) -> Self:
        if self.shortest_words > self.words:
            raise ValueError(f"shortest_words is {self.shortest_words}; allowed: at most words, {self.words}")
        return self


def _off(value: Any) -> Any:
    """`off` in a recipe, which YAML reads as False."""
    return None if value in (False, "off") else value


class CorpusConfig(Config):
    """Stage `corpus`: tokenized, sharded, checksummed documents."""

    kind: Literal["corpus"] = "corpus"
    tokenizer: Input
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    dedup: Annotated[DedupConfig | None, BeforeValidator(_off)] = None
    """Removal of duplicates, over both splits together; `off` unless given."""
    contamination: ContaminationConfig = ContaminationConfig()
    evaluation_data: dict[SetName, Input] = Field(default_factory=dict)
    """Datasets of the recipe or of the store, by name, whose held-out pairs are evaluation sets too."""
    span_bytes: Annotated[int, Field(ge=1 << 12)] | None = placement(None)
    """Bytes of source that one Ray task encodes; a part of the source's size unless set. Decides no content."""
    shard_tokens: Annotated[int, Field(ge=1 << 10)] = 1 << 22
    """Tokens a shard file holds before the next begins."""
    max_in_flight: Annotated[int, Field(ge=1)] | None = placement(None)
    """Ray tasks at a time; two a CPU unless set."""


class InstructionsConfig(Config):
    """Stage `instructions`: prompt/completion pairs derived from Python source with `ast`."""

    kind: Literal["instructions"] = "instructions"
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    tasks: tuple[Literal["summary", "signature"], ...] = ("summary", "signature")
    """`summary`: function source to the first docstring line; `signature`: docstring to `def` line."""
    max_prompt_chars: Annotated[int, Field(ge=50)] = 600
    """Longer prompts are left out."""
    max_completion_chars: Annotated[int, Field(ge=10)] = 120
    """Longer completions are left out."""
