"""From the bytes of a body to a request: everything wrong with them is a 400 that names the field.

Beside what a field may be, three things are refused in all of them, as they break what comes after: nesting without
end, numbers beyond those of a computer, and halves of surrogate pairs, which are no characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serving.openai.errors import ApiError

MAX_DEPTH = 64
"""Lists and objects within each other in one body."""
_SHOWN_CHARS = 80
"""Of a value that is quoted in an error."""
_SHOWN_LEVELS = 6
"""Of the path to one."""

R = TypeVar("R", bound=BaseModel)


class UnusableError(ValueError):
    """JSON that holds what no field may hold; `param` says where, down to some depth."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param} {problem}")
        self.param = param


def parse(text: bytes | str) -> Any:
    """The value that JSON stands for. Raises `ValueError` or `RecursionError` if it is none, or one that is refused."""
    value = json.loads(text, parse_constant=_no_constant)
    _check(value)
    return value


def read_request(kind: type[R], body: bytes) -> R:
    """Parses and checks a request body. Raises `ApiError` (400) that names the field at fault."""
    try:
        data = parse(body)
    except UnusableError as error:
        raise ApiError.bad_request(str(error), param=error.param, code="invalid_value") from error
    except (ValueError, RecursionError) as error:
        raise ApiError.bad_request(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError.bad_request(
            f"the body is not a JSON object; received {_shown(data)}; allowed: an object with the request's fields"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # An unknown field tells more than what follows from its being misspelt: a required one that is missing.
        errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise _field_error(kind, errors[0]) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _field_error(kind: type[BaseModel], error: ErrorDetails) -> ApiError:
    field = error.get("ctx", {}).get("field")
    param = short(_path(error["loc"] if field is None else (*error["loc"], field)) or error["type"])
    if error["type"] == "extra_forbidden":
        message, code = f"{param} is not supported; allowed: {', '.join(kind.model_fields)}", "unsupported_parameter"
        if len(error["loc"]) > 1:
            message = f"{param} is not supported"
        return ApiError.bad_request(message, param=param, code=code)
    if error["type"] == "missing":
        return ApiError.bad_request(f"{param} is required", param=param, code="missing_required_parameter")
    message = f"{param}: {error['msg']}"
    if error["loc"]:
        message += f"; received {_shown(error['input'])}"
    return ApiError.bad_request(message, param=param, code="invalid_value")


def _path(parts: Sequence[str | int]) -> str:
    """The name of a field; a part without a character is `""`."""
    return ".".join(str(part) or '""' for part in parts)


def _shown(value: Any) -> str:
    return short(repr(value))


def short(text: str) -> str:
    """What an error quotes of a text that a client sent."""
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def _check(data: Any) -> None:
    """Raises `UnusableError` for a value that no field may have."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), {"body": data} if isinstance(data, str | float) else data)]
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict | list):
            continue
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            kind = type(each)
            problem = None
            if isinstance(name, str) and not _is_unicode(name):
                problem = "has half of a surrogate pair in its name, which is no character"
            elif kind is str and not _is_unicode(each):
                problem = "holds half of a surrogate pair, which is no character"
            elif kind is float and not math.isfinite(each):
                problem = "is too large a number; allowed: up to 1.8e308"
            elif kind is dict or kind is list:
                if len(path) == MAX_DEPTH:
                    problem = f"is nested too deeply; allowed: {MAX_DEPTH} levels"
                waiting.append(((*path, str(name)), each))
            if problem is not None:
                named = _path((*path, name)[:_SHOWN_LEVELS])
                raise UnusableError(short(named.encode(errors="backslashreplace").decode()), problem)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
