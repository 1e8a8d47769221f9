"""Labelled datasets: made from files, and measured by a simple method to compare with."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import Config, Input
from configs.schema.corpus import SourceConfig, SplitConfig

Task = Literal["classify", "tag", "seq2seq"]
"""One class for a text, one tag for each word, or a text for a text."""


class ExamplesConfig(Config):
    """Stage `examples`: a dataset of labelled examples from files."""

    kind: Literal["examples"] = "examples"
    task: Task
    source: SourceConfig
    """`classify`: `fields.label` is the class. `tag`: format `paragraphs`, each line a word and, after a tab or space,
    its tag (CoNLL). `seq2seq`: `fields.label` is the text to write, unless there is `target`."""
    target: SourceConfig | None = None
    """Of `seq2seq`, files that hold, line by line, what is to be written for the lines of `source`."""
    heldout: SourceConfig | None = None
    """Where held-out examples come from; unset: from `source`, by the hash of the text."""
    heldout_target: SourceConfig | None = None
    """What is to be written for the lines of `heldout`."""
    split: SplitConfig = SplitConfig()
    """How `source` is split where there is no `heldout`."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Names of classes by what the source calls them; unset: as the source calls them."""

    @model_validator(mode="after")
    def _fits_task(self) -> Self:
        for name, source, target in (
            ("source", self.source, self.target),
            ("heldout", self.heldout, self.heldout_target),
        ):
            if source is None:
                if target is not None:
                    raise ValueError("heldout_target goes with heldout: give both, or neither")
                continue
            labelled = source.fields.label is not None
            if self.task == "classify" and not labelled:
                raise ValueError(f"task classify needs {name}.fields.label, the field that holds the class")
            if self.task == "seq2seq" and labelled == (target is not None):
                raise ValueError(f"task seq2seq needs either {name}.fields.label or a target of lines for {name}")
            if self.task == "tag" and source.format != "paragraphs":
                raise ValueError(f"task tag reads sentences between blank lines: set {name}.format to paragraphs")
            if self.task != "seq2seq" and target is not None:
                raise ValueError(f"a target goes with task seq2seq, not {self.task}")
        if self.labels and self.task != "classify":
            raise ValueError(f"labels name classes of task classify, not of {self.task}")
        return self


class BaselineConfig(Config):
    """Stage `baseline`: what a simple method reaches on a dataset, for a model to be compared with.

    `classify`: logistic regression over TF-IDF of words and pairs of words. `tag`: the tag that each word had most
    often in training, `O` for words that never occurred. `seq2seq`: the first three lines of the source.
    """

    kind: Literal["baseline"] = "baseline"
    data: Input
