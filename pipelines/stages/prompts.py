"""Stage `prompts`: the training split of a task as a template asks it, for a decoder to be fine-tuned on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from actors.store.artifacts import Artifact
from configs.errors import ConfigError, DataError
from configs.load import load_task, load_template
from configs.prompts import render_answer, render_completion, render_messages, word_for
from configs.schema.prompting import PromptsConfig, PromptTemplate
from pipelines.corpus.sources import is_validation
from pipelines.evaluation.items import Item, load_items, longest_text, task_digest
from pipelines.prompting.examples import Pool
from pipelines.stage import StageContext


class PromptsStage:
    """Nothing that the task scores is in the dataset, by content; the same content is in it once."""

    kind: ClassVar[str] = "prompts"
    artifact_kind: ClassVar[str | None] = "dataset"
    code_version: ClassVar[int] = 1

    def sources(self, config: PromptsConfig) -> Mapping[str, str]:
        """Digests of the task with its data, and of the template.

        Raises:
            ConfigError: the task or the template cannot be read.
            DataError: the task's data is not there.
        """
        task = load_task(config.task)
        template = load_template(config.template, task)
        return {"task": task_digest(task, "evaluation", "train"), "template": template.digest}

    def run(self, config: PromptsConfig, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
        """Writes train.jsonl, heldout.jsonl and a report.

        Raises:
            ConfigError: the task's items have no answers.
            DataError: a split would be empty, or a record lacks a field of the template.
        """
        task = load_task(config.task)
        template = load_template(config.template, task)
        scored = load_items(task)
        if not all(item.references for item in scored):
            raise ConfigError("the items of this task have no answers to learn", received=f"{config.task}: {task.kind}")
        pool = Pool.of(load_items(task, "train"), scored)
        splits: dict[str, list[Item]] = {"train": [], "heldout": []}
        for item in pool.items:
            splits["heldout" if is_validation(item.id, config.split) else "train"].append(item)
        for name, items in splits.items():
            _refuse_empty(name, items, config)
            lines = (json.dumps(_record(template, item, chat=config.chat), ensure_ascii=False) for item in items)
            (context.out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        counts = {name: len(items) for name, items in splits.items()}
        report = {"task": config.task, "template": template.digest, "prompts": counts, "left_out": pool.left_out}
        (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        context.run.log_dataset(
            name=context.name, digest=self.sources(config)["task"], uri=config.task, context="training", profile=counts
        )
        return report


def _record(template: PromptTemplate, item: Item, *, chat: bool) -> dict[str, Any]:
    """A line of the dataset; `text` is what lineage knows the item by."""
    known = {"id": item.id, "text": longest_text(item)}
    if chat:
        answer = {"role": "assistant", "content": word_for(template, item.answer)}
        return {**known, "messages": [*render_messages(template, item.fields), answer]}
    completion = render_answer(template, item.answer)
    return {**known, "prompt": render_completion(template, item.fields), "completion": completion}


def _refuse_empty(name: str, items: Sequence[Item], config: PromptsConfig) -> None:
    if not items:
        raise DataError(
            f"{name}.jsonl would hold no prompt",
            received=config.task,
            allowed="a training split with items for both",
            next_step="take more data, or change split.validation_fraction",
        )
