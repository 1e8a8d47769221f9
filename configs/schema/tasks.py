"""A task: data, a template and metrics, in one YAML file. Scored by the stage `tasks` and by `ganymede evaluate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.schema.base import Config
from configs.schema.generation import MAX_STOPS

Kind = Literal[
    "language_modelling", "multiple_choice", "preference", "classification", "entities", "generation", "code"
]
Metric = Literal[
    "perplexity", "word_perplexity", "bits_per_byte", "acc", "acc_norm", "preferred", "preferred_norm", "accuracy",
    "macro_f1", "ece",
    "span_precision", "span_recall", "span_f1", "exact_match", "squad_exact", "squad_f1", "number_match", "bleu",
    "chrf", "rouge1", "rouge2", "rouge_l", "pass@1", "pass@5", "pass@10", "pass@100",
]  # fmt: skip

METRICS_OF: Mapping[Kind, tuple[Metric, ...]] = {
    "language_modelling": ("perplexity", "word_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm", "ece"),
    "preference": ("preferred", "preferred_norm"),
    "classification": ("accuracy", "macro_f1", "ece"),
    "entities": ("span_f1", "span_precision", "span_recall"),
    "generation": (
        "exact_match", "squad_exact", "squad_f1", "number_match", "bleu", "chrf", "rouge1", "rouge2", "rouge_l",
    ),
    "code": ("pass@1", "pass@5", "pass@10", "pass@100"),
}  # fmt: skip
"""Metrics that a kind can have; all of them unless the task says which, but of `generation` and `code`."""
_CHOSEN = ("generation", "code")


def _split(value: Any) -> Any:
    """A path alone is a split whose records are all taken; fields by name are files of lines."""
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, dict) and "path" not in value and not set(value) & {"between", "share", "where", "by_file"}:
        return {"path": value}
    return value


class Split(Config):
    """Where the records of a split are, and which of a file's records belong to it."""

    path: str | dict[str, str]
    """A file or glob, as a source's `path` (`data:x` is `x` below $GANYMEDE_DATA); of format `lines` also a file for
    each field, their lines belonging together."""
    between: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Only records whose field is a number within these bounds, both included."""
    share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Only records whose place by the hash of their content, from 0 to 1, is within these bounds, the upper one
    excluded: one file gives two splits that have nothing in common."""
    by_file: str | None = None
    """Of format `functions`, a salt: `share` is of whole files, by the hash that splits a corpus with this salt."""
    where: dict[str, str] = Field(default_factory=dict)
    """Only records whose field is this text."""


class TaskData(Config):
    """Records with fields."""

    format: Literal["jsonl", "json", "tsv", "conll", "parquet", "lines", "text", "functions"]
    """`conll`: sentences between blank lines give fields `words`, `tags` and `text`. `lines`: a line is the field
    `text`. `text`: a file is one document, the field `text`. `functions`: Python source; documented functions give
    records as the stage `instructions` makes them, with fields `task` (`summary` or `signature`), `prompt` and
    `completion`, each in one split alone. A file that ends in .gz is decompressed first."""
    evaluation: Annotated[Split, BeforeValidator(_split)]
    """What is scored."""
    train: Annotated[Split, BeforeValidator(_split)] | None = None
    """Where examples for prompts come from; never what is scored."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a TSV file without a header line."""
    records: str = ""
    """Path to the records of format `json`, names apart by dots (`data.paragraphs.qas`). Each name is a list, or holds
    one; a record also has the fields of what it lies in."""
    begins: str | None = None
    """Regular expression of the lines that begin a document of format `text`; unset: a file is one document."""
    get: str
    """How the data can be had, for who does not have it."""

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        for name, only in (("columns", "tsv"), ("records", "json"), ("begins", "text")):
            if getattr(self, name) and self.format != only:
                raise ValueError(f"{name} is for format {only}, not {self.format}")
        if self.begins is not None:
            try:
                re.compile(self.begins)
            except re.error as error:
                raise ValueError(f"begins is no regular expression: {error}") from None
        for split in (self.evaluation, self.train):
            if split is not None and isinstance(split.path, dict) and self.format != "lines":
                raise ValueError(f"a file for each field is for format lines, not {self.format}")
            if split is not None and (split.by_file is not None) != (self.format == "functions"):
                raise ValueError(
                    "by_file, the salt that splits files, goes with format functions: give both or neither"
                )
        return self


class Answering(Config):
    """How answers are generated. Temperature 0 takes the likeliest token at each place."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MAX_STOPS)] = ()
    """Texts before which an answer ends; so it does at the model's end-of-text tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers to each prompt, for pass@k."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class Program(Config):
    """How the program is made that an answer to a task of code is judged by. Templates; the answer is `{answer}`."""

    template: str = "{answer}\n{test}"
    """An answer passes if the program ends by itself and without an error."""
    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Of processor time, rounded up; a program that waits has four times as much."""
    memory_bytes: Annotated[int, Field(ge=1 << 24)] = 512 << 20


class Task(Config):
    """One task. Templates hold fields in braces, `{text}` or `{answers.0.text}`; `{{` and `}}` are braces."""

    description: str
    kind: Kind
    """`language_modelling`: how likely texts are. `multiple_choice`: the likeliest of some continuations.
    `preference`: whether the answer that people like more is likelier than the other one. `classification`: one of the
    same classes for every text, by likelihood, in words, or from an encoder's head. `entities`: a tag for each word, by
    an encoder. `generation`: answers compared with references. `code`: programs that are run."""
    data: TaskData
    instruction: str = ""
    """What stands once, before examples and prompt."""
    prompt: str = "{text}"
    """Template of what a model reads of an item."""
    delimiter: str = " "
    """What stands between a prompt and its answer."""
    separator: str = "\n\n"
    """What stands between examples, and between the last one and the prompt."""
    choices: tuple[str, ...] | str = ()
    """Answers to choose from: templates, or the name of the field that holds a list of them."""
    answer: str | None = None
    """Template of the right answer; of choices, the text of one; of kind `preference`, what is liked more."""
    rejected: str | None = None
    """Of kind `preference`, template of the answer that is liked less."""
    label: str | None = None
    """Name of the field with the number of the right choice, from 0, instead of `answer`."""
    references: str | None = None
    """Name of a field with several right answers: a list, of texts or of records (`answers.text`); unset: `answer`."""
    method: Literal["likelihood", "generate"] = "likelihood"
    """How a decoder classifies. `generate`: the answer's first word that is the first of a class; none is wrong."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens by which the window of a language model moves: fewer give each token more context, and cost more. Unset:
    the model's window, so that no token is read twice."""
    answering: Answering = Answering()
    program: Program = Program()
    metrics: tuple[Metric, ...] = ()
    """The first one is the headline."""

    @property
    def scores(self) -> tuple[Metric, ...]:
        """The metrics of the task."""
        if self.metrics:
            return self.metrics
        generated = self.kind == "classification" and self.method == "generate"
        return tuple(metric for metric in METRICS_OF[self.kind] if not (generated and metric == "ece"))

    @property
    def generates(self) -> bool:
        """Whether a decoder answers in words."""
        return self.kind in _CHOSEN or (self.kind == "classification" and self.method == "generate")

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        unknown = [metric for metric in self.metrics if metric not in METRICS_OF[self.kind]]
        if unknown:
            raise ValueError(
                f"kind {self.kind} has no metric {', '.join(unknown)}; allowed: {', '.join(METRICS_OF[self.kind])}"
            )
        if self.kind in _CHOSEN and not self.metrics:
            raise ValueError(f"kind {self.kind} needs metrics; allowed: {', '.join(METRICS_OF[self.kind])}")
        chooses = self.kind in ("multiple_choice", "classification")
        if chooses != bool(self.choices):
            raise ValueError(f"kind {self.kind} {'needs choices' if chooses else 'has no choices'}")
        if self.kind == "classification" and not all(isinstance(c, str) and "{" not in c for c in self._fixed()):
            raise ValueError("classes are the same for every item: give choices as a list of plain texts")
        if chooses and (self.answer is None) == (self.label is None):
            raise ValueError(f"kind {self.kind} needs answer, the text of the right choice, or label, a field's name")
        prefers = self.kind == "preference"
        if prefers != (self.rejected is not None) or (prefers and self.answer is None):
            raise ValueError(
                "kind preference needs answer and rejected, the templates of what is liked more and less"
                if prefers
                else "rejected is for kind preference"
            )
        if not chooses and self.label is not None:
            raise ValueError("label is the number of a choice: give answer")
        if self.kind == "generation" and self.answer is None and self.references is None:
            raise ValueError("kind generation needs answer, the template of what is right")
        if (chooses or prefers) and self.references is not None:
            raise ValueError("references are for kind generation; of choices one is right: give answer")
        if self.kind == "entities" and self.data.format != "conll":
            raise ValueError("kind entities reads words and tags: set data.format to conll")
        samples = self.answering.samples
        short = [m for m in self.metrics if m.startswith("pass@") and int(m.removeprefix("pass@")) > samples]
        if short:
            raise ValueError(f"{', '.join(short)} needs more answers to a prompt: answering.samples is {samples}")
        if samples > 1 and self.kind != "code":
            raise ValueError("answering.samples is for kind code: of other kinds one answer is scored")
        for name in ("prompt", "answer", "rejected", *(["choices"] if isinstance(self.choices, tuple) else [])):
            value = getattr(self, name)
            for template in [value] if isinstance(value, str) else value or ():
                try:
                    fields_of(template)
                except ValueError as error:
                    raise ValueError(f"{name} is no template: {error}; write {{{{ and }}}} for braces") from None
        return self

    def _fixed(self) -> Sequence[str | None]:
        return self.choices if isinstance(self.choices, tuple) else (None,)


def fields_of(template: str) -> list[str]:
    """Names of the fields in a template. Raises `ValueError` for braces that do not match, or a field with a format."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None:
            if not name or form or conversion:
                raise ValueError(f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}")
            names.append(name)
    return names


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """`template` with its fields put in. Raises `KeyError` with the name of a field that is not there."""
    parts = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        if name is not None:
            parts.append(str(look_up(name, fields)))
    return "".join(parts)


def look_up(name: str, fields: Mapping[str, Any]) -> Any:
    """The value of a field by its path, names and numbers of list items apart by dots; a name that goes into a list of
    records gives the list of theirs. Raises `KeyError` with the whole path if it leads nowhere.
    """
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) and part in v for v in value):
            value = [v[part] for v in value]
        else:
            raise KeyError(name)
    return value
