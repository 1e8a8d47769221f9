"""What every configuration model shares: frozen, unknown keys forbidden, references between stages, and fields that
do not decide content.

A field marked with `placement()` (a path, a worker count, a memory limit) is left out of a stage's fingerprint,
because it must not change what the stage produces. A field typed `Input` names another stage of the recipe or a
published artifact (`kind/name@version`); the graph of a recipe is read off these fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A frozen configuration model; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class InputMarker:
    """Marks a field as a reference to a stage or an artifact."""


Input = Annotated[str, InputMarker(), Field(min_length=1)]


def placement(default: Any, **kwargs: Any) -> Any:
    """A field with a default that says where or how fast work is done, never what comes out of it."""
    return Field(default, json_schema_extra={"placement": True}, **kwargs)


def content_literals(config: BaseModel) -> dict[str, Any]:
    """The fields of `config` that decide content, as JSON values; references and placement fields left out."""
    result: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("placement"):
            continue
        if any(isinstance(m, InputMarker) for m in info.metadata) or _holds_references(info.annotation):
            continue
        result[name] = _literal(getattr(config, name))
    return result


def _literal(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return content_literals(value)
    if isinstance(value, dict):
        return {str(k): _literal(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(v) for v in value]
    return value


def _holds_references(annotation: Any) -> bool:
    """True for `dict[str, Input]`, `Input | None` and the like."""
    if any(isinstance(m, InputMarker) for m in getattr(annotation, "__metadata__", ())):
        return True
    return any(_holds_references(arg) for arg in getattr(annotation, "__args__", ()))


def references(config: BaseModel) -> Iterator[tuple[str, str]]:
    """The inputs a stage config names, as (role, reference); a dict of inputs gives `field.key` roles."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if value is None:
            continue
        if any(isinstance(m, InputMarker) for m in info.metadata):
            yield name, value
        elif _holds_references(info.annotation):
            items = value.items() if isinstance(value, dict) else [(None, value)]
            for key, reference in items:
                yield (name if key is None else f"{name}.{key}"), reference
