"""A report as one HTML page that needs nothing else: the scores, and every item with its answer, errors
first, then the worst."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from pipelines.evaluation.asking import Row
from pipelines.evaluation.task_report import TasksReport

_SHOWN_CHARS = 2000
"""Of a prompt, its end; of an answer, its beginning. The whole is in the Parquet file."""


def render(report: TasksReport, rows: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """The page; equal reports and rows give equal text."""
    items = [_shown(model, task, row) for (model, task), made in rows.items() for row in made]
    items.sort(key=lambda item: (item["error"] is None, item["goodness"], item["task"], item["item"], item["model"]))
    data = json.dumps({"report": report.model_dump(mode="json"), "items": items}, ensure_ascii=False)
    # Nothing in the data can end the element that holds it.
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (resources.files("pipelines.evaluation") / "page.html").read_text("utf-8")
    return template.replace("{{data}}", safe)


def _shown(model: str, task: str, row: Row) -> dict[str, Any]:
    return {
        "model": model,
        "task": task,
        "item": row.item,
        "prompt": row.prompt[-_SHOWN_CHARS:],
        "choices": row.choices,
        "references": [reference[:_SHOWN_CHARS] for reference in row.references],
        "prediction": row.prediction[:_SHOWN_CHARS],
        "logprobs": [round(value, 4) for value in row.response.logprobs],
        "programs": row.programs,
        "finish_reason": row.response.finish_reason,
        "error": row.response.error,
        "truncated": row.response.truncated,
        "goodness": round(row.goodness, 6),
    }
