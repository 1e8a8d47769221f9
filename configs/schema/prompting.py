"""Prompt templates, the examples that stand in prompts, and sweeps over both."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from configs.artifacts import hash_json
from configs.schema.base import Config, InputMarker, placement
from configs.schema.corpus import SplitConfig
from configs.schema.model import is_folder
from configs.schema.tasks import Task, fields_of

ANSWER = "answer"
"""The field of the right answer, which `prompt` may not hold."""

TASK_TEMPLATE = "task"
"""Names the template that a task's own file holds."""

Strategy = Literal["fixed", "random", "balanced", "bm25", "embedding"]


class PromptTemplate(Config):
    """How an item of a task becomes a prompt. Fields stand in braces, `{text}`; `{{` and `}}` are braces.

    As a completion: system, instruction, examples (each `prompt`, `delimiter` and the answer) and `prompt`, with
    `separator` between them. As a chat: `system` as a message of its own, each example as a user's and an assistant's
    message, `instruction` at the beginning of the first user's message, no delimiter.
    """

    model_config = ConfigDict(title="template")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Of the artifact; the file's name unless it says another."""
    description: str = ""
    system: str = ""
    """Who the model is to be."""
    instruction: str = ""
    """What it is to do; stands once."""
    prompt: Annotated[str, Field(min_length=1)]
    """One item, up to where its answer begins."""
    delimiter: str = " "
    """What stands between a prompt and its answer."""
    separator: Annotated[str, Field(min_length=1)] = "\n\n"
    words: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """What choices are called in this prompt, by what the task calls them."""

    @property
    def digest(self) -> str:
        """The template's version: equal if and only if it makes the same prompts."""
        return hash_json(self.model_dump(exclude={"name", "description"}))[:16]

    @property
    def fields(self) -> list[str]:
        """Fields that a record has to have."""
        return list(dict.fromkeys(fields_of(self.prompt)))

    @classmethod
    def of_task(cls, name: str, task: Task) -> Self:
        """The template that a task's own file holds."""
        return cls(
            name=name,
            description=task.description,
            instruction=task.instruction,
            prompt=task.prompt,
            delimiter=task.delimiter,
            separator=task.separator,
        )

    @model_validator(mode="after")
    def _is_a_template(self) -> Self:
        for name in ("system", "instruction"):
            _check_braces(name, getattr(self, name))
            if fields_of(getattr(self, name)):
                raise ValueError(f"{name} is the same for every item and has no fields; write {{{{ and }}}} for braces")
        _check_braces("prompt", self.prompt)
        if not self.fields:
            raise ValueError("prompt has no field: every item would be asked the same; allowed: for example {text}")
        if any(field.partition(".")[0] == ANSWER for field in self.fields):
            raise ValueError("prompt holds {answer}, which would give the answer away; it is put after the delimiter")
        if len(set(self.words.values())) < len(self.words):
            raise ValueError("words calls two choices the same")
        return self


class ExampleSelection(Config):
    """Which examples stand in a prompt. They come from a task's `train` split, never from what is scored."""

    strategy: Strategy = "balanced"
    """`fixed`: the first of the split. `random`: drawn once. `balanced`: drawn once, as many of each class as of any
    other. These three are the same in all prompts, so that what they have in common is computed once. `bm25` and
    `embedding`: those nearest to the item, by their words or by the vectors of an encoder; the nearest stands last."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the examples, and orders `random` and `balanced` ones."""
    encoder: str | None = placement(None)
    """Of `embedding`, the folder of an encoder that gives a text a vector."""

    @model_validator(mode="after")
    def _encoder_for_embedding(self) -> Self:
        if (self.strategy == "embedding") != (self.encoder is not None):
            raise ValueError("encoder goes with strategy embedding: give both, or neither")
        return self


def _check_braces(name: str, template: str) -> None:
    try:
        fields_of(template)
    except ValueError as error:
        raise ValueError(f"{name} is no template: {error}; write {{{{ and }}}} for braces") from None


class Drawing(Config):
    """How answers are drawn; the rest of the sampling is the task's."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Model = Annotated[str, InputMarker(unless=is_folder), Field(min_length=1)]
"""A stage, an artifact, or a folder that begins with `/`, `.` or `~`."""


class PromptsConfig(Config):
    """Stage `prompts`: the training split of a task as a template asks it, each item with its answer.

    A dataset for `finetune` with `task: pairs`; what is scored is left out of it.
    """

    kind: Literal["prompts"] = "prompts"
    task: str = placement(...)
    """A packaged task by name, any other by the path of its file. It has `data.train`."""
    template: str = placement(TASK_TEMPLATE)
    """A packaged template by name, another by path; `task` is what the task's own file says."""
    chat: bool = False
    """Whether lines are conversations, for `finetune` with `chat: true`; otherwise texts, for `chat: false`."""
    split: SplitConfig = SplitConfig()
    """Which of them are held out of training."""


class SweepConfig(Config):
    """Stage `sweep`: what prompting is worth. Every model is asked with every template, number of examples and way to
    draw, on the same items; fine-tuned models stand beside them.
    """

    kind: Literal["sweep"] = "sweep"
    models: Annotated[dict[Label, Model], Field(min_length=1)]
    """Decoders to prompt, by their names in the report."""
    references: dict[Label, Model] = Field(default_factory=dict)
    """Models that were trained for the task: encoders by their head, decoders asked as the task's file says."""
    task: str = placement(...)
    """A packaged task by name, any other by the path of its file. It has choices, or its answers are generated."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = placement((TASK_TEMPLATE,))
    """Packaged templates by name, others by path; `task` is what the task's own file says."""
    shots: Annotated[tuple[Annotated[int, Field(ge=0, le=64)], ...], Field(min_length=1)] = (0, 1, 2, 3, 5, 8)
    """Numbers of examples, rising."""
    sampling: Annotated[dict[Label, Drawing], Field(min_length=1)] = Field({"greedy": Drawing()})
    examples: ExampleSelection = ExampleSelection()
    held_to_choices: bool = True
    """Whether answers of a task with choices can be nothing but these; otherwise an answer that begins with none is
    wrong."""
    chat: bool = False
    """Whether prompts go through the models' chat templates."""
    target: float | None = None
    """The score that is wanted, as the task's first metric gives it; unset: that of the best reference."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items that are asked, the first ones by the hash of their content; all unless set."""
    max_sequences: Annotated[int, Field(ge=1)] = 32
    """Answers generated together. It counts as content: the rounding of matrix products depends on it."""

    @model_validator(mode="after")
    def _is_a_sweep(self) -> Self:
        if list(self.shots) != sorted(set(self.shots)):
            raise ValueError(f"shots: received {', '.join(map(str, self.shots))}; allowed: rising numbers")
        if len(set(self.templates)) < len(self.templates):
            raise ValueError("templates: one is named twice")
        both = sorted(set(self.models) & set(self.references))
        if both:
            raise ValueError(f"models and references have names of their own: {', '.join(both)} is in both")
        return self
