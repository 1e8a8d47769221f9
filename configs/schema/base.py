"""What every configuration model shares: frozen, unknown keys forbidden, references between stages, and fields that
do not decide content.

A field marked with `placement()` (a path, a worker count, a memory limit) is left out of a stage's fingerprint,
because it must not change what the stage produces. A field typed `Input` names another stage of the recipe or a
published artifact (`kind/name@version`); the graph of a recipe is read off these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Config(BaseModel):
    """A frozen configuration model; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class InputMarker:
    """Marks a field as a reference to a stage or an artifact."""

    unless: Callable[[str], bool] = lambda reference: False
    """Values that are no reference; the stage says in `sources` what they stand for."""


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
        if _marker(info) is not None:
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


def _marker(info: FieldInfo) -> InputMarker | None:
    """The mark of a field that is a reference, or holds some: `dict[str, Input]`, `Input | None` and the like."""
    return next((m for m in info.metadata if isinstance(m, InputMarker)), None) or _inner_marker(info.annotation)


def _inner_marker(annotation: Any) -> InputMarker | None:
    own = (m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, InputMarker))
    inner = (_inner_marker(arg) for arg in getattr(annotation, "__args__", ()))
    return next(own, None) or next((marker for marker in inner if marker is not None), None)


def references(config: BaseModel) -> Iterator[tuple[str, str]]:
    """The inputs a stage config names, as (role, reference).

    A dict of inputs gives `field.key` roles, a field of a config within the config `field.field`.
    """
    for name, info in type(config).model_fields.items():
        value, role = getattr(config, name), info.alias or name
        marker = _marker(info)
        if value is None:
            continue
        if isinstance(value, BaseModel):
            yield from ((f"{role}.{inner}", reference) for inner, reference in references(value))
        elif marker is not None:
            items = value.items() if isinstance(value, dict) else [(None, value)]
            for key, reference in items:
                if not marker.unless(reference):
                    yield (role if key is None else f"{role}.{key}"), reference
